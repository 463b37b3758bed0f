"""CLIP's vocabulary and new words in it, against code that defined the one and the reference's way of the other."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import relative
from text_parts import tiny_clip, tiny_clip_tokenizer

from mezzotint.errors import InputError
from mezzotint.text import clip, vocabulary
from mezzotint.text.joint import Joint

packaged = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip_torch is not installed")


def original_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """OpenAI's tokenizer as the package carries it, loaded alone: the package itself needs torchvision."""
    found = importlib.util.find_spec("open_clip")
    assert found is not None and found.submodule_search_locations
    if importlib.util.find_spec("ftfy") is None:  # it mends broken encodings, of which these prompts have none
        monkeypatch.setitem(sys.modules, "ftfy", types.SimpleNamespace(fix_text=lambda text: text))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the module sets it on import; this restores it
    spec = importlib.util.spec_from_file_location(
        "original", Path(found.submodule_search_locations[0]) / "tokenizer.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@packaged
def test_the_packaged_vocabulary_is_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = vocabulary.clip_vocabulary(), original_tokenizer(monkeypatch)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # as open_clip writes them
    assert ours.get_vocab() == {names.get(token, token): i for token, i in theirs.encoder.items()}
    assert len(ours) == 49408 and (ours.bos_token_id, ours.eos_token_id) == (49406, 49407)
    prompts = [
        "a photo of a cat",
        "Monocrystalline solar-cell #42: it's cracked, 3.5 mm (not 12%)!",
        "  spaces\tand\nlines  ",
        "naïve café, Übergröße, 太陽電池の亀裂, трещина, 🙂🙂 don't they'll we've",
        "EL-Bild 2024/11 @@ ~~~ ... ?!",
        "",
    ]
    for prompt in prompts:
        assert ours(prompt, add_special_tokens=False).input_ids == theirs.encode(prompt), prompt
    words = vocabulary.clip_framed(ours)
    for length in (77, 20):
        framed = vocabulary.clip_framed(ours, length, padding="!").rows(prompts[:1])[0][0, 0]
        assert framed.tolist() == theirs(prompts[0], context_length=length)[0].tolist()  # OpenCLIP fills with 0, "!"
    assert words.rows(["a photo of a cat"])[0][0, 0, :9].tolist() == [
        49406, 320, 1125, 539, 320, 2368, 49407, 49407, 49407,
    ]  # fmt: skip


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary.clip_vocabulary.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps open_clip_torch=="):
        vocabulary.clip_vocabulary()


@pytest.fixture
def encoder(tmp_path: Path) -> clip.Clip:
    tiny_clip(tmp_path / "text_encoder")
    tiny_clip_tokenizer(tmp_path / "tokenizer")
    return clip.load_folder(tmp_path / "text_encoder", tmp_path / "tokenizer", pooling="end")


def by(folder: str, rows: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {word: {folder: vectors} for word, vectors in rows.items()}


PROMPTS = ["a <crack> on the cell", "<dark>", "the cell", "a <dark> <crack>, the <crack>"]


def test_new_words_are_read_as_textual_inversions_are(encoder: clip.Clip, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    rows = {"<crack>": torch.randn(3, 32), "<dark>": torch.randn(1, 32)}
    network = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    pipeline: Any = StableDiffusionPipeline(
        None,
        network,
        tokenizer,
        None,
        None,
        None,
        None,
        requires_safety_checker=False,  # type: ignore
    )
    for word, vectors in rows.items():
        pipeline.load_textual_inversion({word: vectors}, token=word)
    theirs = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    before = encoder.encode(PROMPTS)
    found = encoder.with_words(by("text_encoder", rows))
    ours = found.encode(PROMPTS)
    assert ours.tokens is not None and before.tokens is not None
    assert relative(ours.tokens, theirs) < 1e-5
    assert relative(ours.tokens[2], before.tokens[2]) < 1e-6 and relative(ours.tokens[0], before.tokens[0]) > 0.1

    again = encoder.encode(PROMPTS)  # the encoder that was given the words has not learnt them
    assert again.tokens is not None and torch.equal(again.tokens, before.tokens)
    kept, held = dict(encoder.network.named_parameters()), dict(found.network.named_parameters())
    assert all(held.pop(name) is tensor for name, tensor in kept.items())
    assert list(held) == ["text_model.embeddings.token_embedding.rows"]
    assert found.readings()[0].digest != encoder.readings()[0].digest

    found.save(tmp_path / "saved")
    opened = clip.load_folder(tmp_path / "saved" / "text_encoder", tmp_path / "saved" / "tokenizer", pooling="end")
    reopened = opened.encode(PROMPTS)
    assert reopened.tokens is not None and torch.equal(reopened.tokens, ours.tokens)


def test_words_can_be_added_one_after_the_other(encoder: clip.Clip) -> None:
    rows = by("text_encoder", {"<crack>": torch.randn(2, 32), "<dark>": torch.randn(1, 32)})
    first, second = ({word: vectors} for word, vectors in rows.items())
    stepwise, at_once = encoder.with_words(first).with_words(second), encoder.with_words(rows)
    one, other = stepwise.encode(PROMPTS).tokens, at_once.encode(PROMPTS).tokens
    assert one is not None and other is not None and torch.equal(one, other)
    assert stepwise.readings() == at_once.readings()


def test_several_encoders_learn_a_word_together(encoder: clip.Clip, tmp_path: Path) -> None:
    tiny_clip(tmp_path / "text_encoder_2", 48, projection=24, heads=3, eos=2)
    second = clip.load_folder(tmp_path / "text_encoder_2", tmp_path / "tokenizer", layer=-2, pooling="projection")
    rows = {"text_encoder": torch.randn(2, 32), "text_encoder_2": torch.randn(2, 48)}
    found = Joint((encoder, second)).with_words({"<crack>": rows}).encode(PROMPTS)
    alone = [part.with_words({"<crack>": rows}).encode(PROMPTS) for part in (encoder, second)]
    tokens, pooled = ([getattr(part, name) for part in alone] for name in ("tokens", "pooled"))
    assert found.tokens is not None and torch.equal(found.tokens, torch.cat(tokens, -1))
    assert found.pooled is not None and torch.equal(found.pooled, torch.cat(pooled, -1))
    with pytest.raises(InputError, match="as many vectors for each of 2 encoders"):
        Joint((encoder, second)).with_words({"<crack>": rows | {"text_encoder_2": rows["text_encoder_2"][:1]}})


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"<crack>": torch.zeros(2, 31)}, r"vectors of shape \(2, 31\); .* reads \(n, 32\)"),
        ({"<crack>": torch.zeros(32)}, r"vectors of shape \(32,\)"),
        ({"<crack>": torch.zeros(0, 32)}, r"vectors of shape \(0, 32\)"),
        ({"the</w>": torch.zeros(1, 32)}, "has 'the</w>' already"),
        ({"<a>": torch.zeros(1, 32), "<a>_1": torch.zeros(1, 32), "<A>": torch.zeros(2, 32)}, ""),
    ],
)
def test_words_that_cannot_be_added_are_refused(encoder: clip.Clip, rows: dict[str, torch.Tensor], says: str) -> None:
    if not says:
        encoder.with_words(by("text_encoder", rows))  # capitals are letters of their own in a new word
        return
    with pytest.raises(InputError, match=says):
        encoder.with_words(by("text_encoder", rows))
