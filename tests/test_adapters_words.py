"""Textual inversion files in their published forms, against diffusers' reading of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.adapters import read_words, write_words
from mezzotint.adapters.textual_inversion import family
from mezzotint.errors import InputError

SD1, SD2, REFINER = {"text_encoder": 768}, {"text_encoder": 1024}, {"text_encoder_2": 1280}
SDXL = {"text_encoder": 768, "text_encoder_2": 1280}
ROWS = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(3, 1280, generator=torch.Generator().manual_seed(1))


def web_interface(rows: Tensor) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "<plate>", "step": 500}


FORMS: dict[str, tuple[Any, str, Tensor]] = {
    "one vector": ({"<plate>": ROWS[0]}, "<plate>", ROWS[:1]),
    "several vectors": ({"<plate>": ROWS}, "<plate>", ROWS),
    "web interface": (web_interface(ROWS), "<plate>", ROWS),
    "web interface, safetensors": ({"emb_params": ROWS}, "file", ROWS),
    "a bare tensor": (ROWS, "file", ROWS),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_one_encoder(name: str) -> None:
    data, word, rows = FORMS[name]
    found = read_words(data, "file", SD1)
    assert found.keys() == {word}
    assert found[word].keys() == {"text_encoder"}
    assert torch.equal(found[word]["text_encoder"], rows)
    assert family(data) == "Stable Diffusion 1.x"


@pytest.mark.parametrize("name", ["one vector", "several vectors", "web interface"])
def test_the_reference_reads_the_same(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    from mezzotint.text.vocabulary import clip_vocabulary

    data, word, _ = FORMS[name]
    mixin = diffusers.loaders.TextualInversionLoaderMixin
    tokenizer = clip_vocabulary()
    tokens, embeddings = mixin._retrieve_tokens_and_embeddings([None], [data], tokenizer)
    _, rows = mixin._extend_tokens_and_embeddings(tokens, embeddings, tokenizer)
    assert tokens == [word]
    assert torch.equal(
        torch.stack([row.flatten() for row in rows]), read_words(data, "file", SD1)[word]["text_encoder"]
    )


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_two_encoders_have_vectors_each(names: tuple[str, str]) -> None:
    data = {names[1]: WIDE.half(), names[0]: ROWS.half()}
    found = read_words(data, "plate", SDXL)["plate"]
    assert torch.equal(found["text_encoder"], ROWS.half().float())
    assert torch.equal(found["text_encoder_2"], WIDE.half().float())
    assert read_words(data, "plate", REFINER)["plate"].keys() == {"text_encoder_2"}
    assert family(data) == "Stable Diffusion XL"


def test_t5_learns_a_word_where_the_file_and_the_model_have_it() -> None:
    data, three = {"clip_l": ROWS, "clip_g": WIDE}, {**SDXL, "text_encoder_3": 4096}
    wide = torch.randn(2, 4096)
    assert read_words(data, "plate", three)["plate"].keys() == SDXL.keys()
    for name in ("t5", "t5xxl", "text_encoders_2", "text_encoder_3"):
        found = read_words({**data, name: wide}, "plate", three)["plate"]
        assert found.keys() == three.keys() and torch.equal(found["text_encoder_3"], wide)
        assert read_words({**data, name: wide}, "plate", SDXL)["plate"].keys() == SDXL.keys()  # T5 was left out


@pytest.mark.parametrize(
    "encoders", [("text_encoder",), ("bert",), ("text_encoder", "text_encoder_2", "text_encoder_3")]
)
def test_what_is_written_is_read_again(encoders: tuple[str, ...]) -> None:
    vectors = {part: torch.randn(2, 8 + i) for i, part in enumerate(encoders)}
    written = write_words({"<plate>": vectors})
    assert list(written) == (["<plate>"] if len(encoders) == 1 else ["clip_l", "clip_g", "t5"])
    found = read_words(written, "<plate>", {part: matrix.shape[1] for part, matrix in vectors.items()})
    assert all(torch.equal(found["<plate>"][part], matrix) for part, matrix in vectors.items())


def test_several_words_in_one_file() -> None:
    found = read_words({"<a>": ROWS[:1], "<b>": ROWS}, "file", SD1)
    assert [len(vectors["text_encoder"]) for vectors in found.values()] == [1, 3]


@pytest.mark.parametrize(
    ("data", "encoders", "said"),
    [
        ({"<plate>": ROWS}, SD2, "768 numbers.*reads 1024.*Stable Diffusion 1.x"),
        ({"<plate>": ROWS}, SDXL, "768 numbers.*reads 768 and 1280.*Stable Diffusion 1.x"),
        ({"<plate>": torch.ones(2, 1024)}, SD1, "Stable Diffusion 2.x"),
        ({"clip_l": ROWS, "clip_g": WIDE}, SD1, "768 and 1280 numbers.*Stable Diffusion XL"),
        ({"<plate>": torch.ones(2, 99)}, SD1, "another model"),
        ({"clip_l": ROWS, "llama": WIDE}, SDXL, "'llama'"),
        ({"clip_l": ROWS, "t5": WIDE}, SDXL, "no vectors for clip_g"),
        ({}, SD1, "empty"),
        ({"weight": torch.ones(2, 3, 4)}, SD1, "no textual inversion"),
        ({"step": 3}, SD1, "no textual inversion"),
        ({"string_to_param": {"*": ROWS, "+": ROWS}}, SD1, "2 parameters"),
    ],
)
def test_other_files_and_other_families_are_refused(data: Any, encoders: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=f"(?s){said}"):
        read_words(data, "plate", encoders)
