"""What text encoders can learn: gradients and new words, against transformers' and diffusers' own networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import relative
from parts import bert_folder
from text_parts import (
    tiny_bert,
    tiny_bert_tokenizer,
    tiny_clip,
    tiny_clip_tokenizer,
    tiny_mistral3,
    tiny_mistral3_tokenizer,
    tiny_qwen3,
    tiny_qwen3_tokenizer,
    tiny_t5,
    tiny_t5_tokenizer,
)
from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.text import bert, clip, llm, minilm, t5
from mezzotint.text.encoder import TextEncoder
from mezzotint.text.joint import Joint
from mezzotint.text.rows import learned

PROMPTS = ["a <x> crack", "the cell", "a crack on <x>, the <x>"]
LENGTH = 250  # of the language models; Mistral's template is 226 letters long


@dataclass
class Case:
    """One of our encoders, and how the reference reads numbers with the same weights."""

    encoder: Any
    network: Any  # the reference's
    tokenizer: Any  # the reference's, as it was saved
    read: Callable[[Any, Any], list[Tensor]]  # (network, encoded prompts) -> tokens and pooled
    numbered: Callable[[Any, list[str]], Any]  # (tokenizer, prompts) -> encoded prompts
    prefix: str = ""  # ours has this in front of the reference's names


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("learning")
    tiny_clip(root / "text_encoder")
    tiny_clip(root / "text_encoder_2", 48, projection=24, layers=4, act="gelu", heads=3, eos=2, seed=1)
    tiny_clip_tokenizer(root / "tokenizer")
    tiny_t5(root / "t5")
    tiny_t5_tokenizer(root / "t5_tokenizer")
    tiny_qwen3(root / "qwen3")
    tiny_qwen3_tokenizer(root / "qwen3_tokenizer")
    tiny_mistral3(root / "mistral3")
    tiny_mistral3_tokenizer(root / "mistral3_tokenizer")
    tiny_bert(root / "bert")
    tiny_bert_tokenizer(root / "bert_tokenizer")
    bert_folder(root / "minilm")
    return root


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this model reads")
        yield


def padded(length: int) -> Callable[[Any, list[str]], Any]:
    return lambda tokenizer, prompts: tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


def states(layer: int, norm: bool = False, projected: bool = False) -> Callable[[Any, Any], list[Tensor]]:
    def read(network: Any, found: Any) -> list[Tensor]:
        said = network(input_ids=found.input_ids, output_hidden_states=True)
        tokens = said.hidden_states[layer]
        return [said.last_hidden_state if norm else tokens, *([said.text_embeds] if projected else [])]

    return read


def clip_l(root: Path) -> Case:
    from transformers import CLIPTextModel, CLIPTokenizer

    ours = clip.load_folder(root / "text_encoder", root / "tokenizer")
    theirs = CLIPTextModel.from_pretrained(root / "text_encoder")
    words = CLIPTokenizer.from_pretrained(root / "tokenizer")
    return Case(ours, theirs, words, states(-1, norm=True), padded(77), "text_model.")


def clip_l_penultimate(root: Path) -> Case:
    case = clip_l(root)
    case.encoder = clip.load_folder(root / "text_encoder", root / "tokenizer", layer=-2, norm=False)
    case.read = states(-2)
    return case


def clip_g(root: Path) -> Case:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    ours = clip.load_folder(root / "text_encoder_2", root / "tokenizer", layer=-2, norm=False, pooling="projection")
    theirs = CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2")
    # transformers takes the highest number for the end where the config says 2, so that words must stand behind it
    theirs.config.eos_token_id = ours.vocabulary.end
    theirs.text_model.eos_token_id = ours.vocabulary.end
    words = CLIPTokenizer.from_pretrained(root / "tokenizer")
    return Case(ours, theirs, words, states(-2, projected=True), padded(77))


def five(root: Path) -> Case:
    from transformers import T5EncoderModel, T5TokenizerFast

    ours = t5.load_folder(root / "t5", root / "t5_tokenizer", length=40)
    words = T5TokenizerFast.from_pretrained(root / "t5_tokenizer")
    return Case(ours, T5EncoderModel.from_pretrained(root / "t5"), words, states(-1, norm=True), padded(40))


def ldm(root: Path) -> Case:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
    from transformers import BertTokenizerFast

    ours = bert.load_folder(root / "bert", root / "bert_tokenizer")
    words = BertTokenizerFast.from_pretrained(root / "bert_tokenizer")
    return Case(ours, LDMBertModel.from_pretrained(root / "bert"), words, lambda n, f: [n(f.input_ids)[0]], padded(77))


def language(template: llm.Template) -> tuple[Callable[[Any, Any], list[Tensor]], Callable[[Any, list[str]], Any]]:
    def read(network: Any, found: Any) -> list[Tensor]:
        said = network(input_ids=found.input_ids, attention_mask=found.attention_mask, output_hidden_states=True)
        return [torch.cat([said.hidden_states[layer] for layer in (1, 2, 3)], dim=-1)]

    def numbered(tokenizer: Any, prompts: list[str]) -> Any:
        said = [template.around(prompt) for prompt in prompts]
        return tokenizer(said, padding="max_length", max_length=LENGTH, add_special_tokens=False, return_tensors="pt")

    return read, numbered


def qwen3(root: Path) -> Case:
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    ours = llm.load_folder(root / "qwen3", root / "qwen3_tokenizer", torch.float32, (1, 2, 3), LENGTH)
    theirs = Qwen3ForCausalLM.from_pretrained(root / "qwen3").model
    words = Qwen2TokenizerFast.from_pretrained(root / "qwen3_tokenizer")
    return Case(ours, theirs, words, *language(llm.QWEN3))


def mistral3(root: Path) -> Case:
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    ours = llm.load_folder(root / "mistral3", root / "mistral3_tokenizer", torch.float32, (1, 2, 3), LENGTH)
    theirs = Mistral3ForConditionalGeneration.from_pretrained(root / "mistral3").model.language_model
    words = AutoTokenizer.from_pretrained(root / "mistral3_tokenizer")
    return Case(ours, theirs, words, *language(llm.MISTRAL))


def mini(root: Path) -> Case:
    from transformers import BertModel, PreTrainedTokenizerFast

    def read(network: Any, found: Any) -> list[Tensor]:
        tokens = network(input_ids=found.input_ids, attention_mask=found.attention_mask).last_hidden_state
        real = found.attention_mask[..., None]
        return [tokens, (tokens * real).sum(1) / real.sum(1)]

    words = PreTrainedTokenizerFast(tokenizer_file=str(root / "minilm" / "tokenizer.json"), pad_token="[PAD]")
    theirs = BertModel.from_pretrained(root / "minilm", add_pooling_layer=False)
    return Case(minilm.load_folder(root / "minilm", length=20), theirs, words, read, padded(20))


CASES = [clip_l, clip_l_penultimate, clip_g, five, ldm, qwen3, mistral3, mini]


def said(encoder: TextEncoder, prompts: list[str]) -> list[Tensor]:
    found = encoder.encode(prompts)
    return [part for part in (found.tokens, found.pooled) if part is not None]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_references(root: Path, case: Callable[[Path], Case]) -> None:
    """Of every parameter, through all that is read; layers behind that have none here and there."""
    made = case(root)
    (ours,) = made.encoder.networks.values()
    assert not any(part.requires_grad for part in said(made.encoder, PROMPTS))  # loaded networks build no graph
    before = made.encoder.encode(PROMPTS).tokens
    ours.requires_grad_(True).train()  # nothing drops out
    made.network.requires_grad_(True).eval()
    answers = said(made.encoder, PROMPTS), made.read(made.network, made.numbered(made.tokenizer, PROMPTS))
    assert relative(answers[0][0].detach(), before) < 1e-5
    assert len(answers[0]) == len(answers[1])
    for mine, reference in zip(*answers, strict=True):
        weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
        for part in (mine, reference):
            (part * weight).sum().backward(retain_graph=True)
    expected = {f"{made.prefix}{n}": p.grad for n, p in made.network.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == {n for n in expected if n in dict(ours.named_parameters())}
    assert len(found) > 0.6 * len(list(ours.parameters()))
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in found.items():
        scale = max(expected[name].abs().max().item(), 1e-3 * largest)  # a key's bias has a gradient of rounding alone
        assert (grad - expected[name]).abs().max().item() < 1e-4 * scale, name
    ours.requires_grad_(False)


def reference_words(made: Case, rows: Tensor) -> list[Tensor]:
    """The prompts with a new word of several rows, in the reference's way: tokens added, rows put behind the table."""
    names = ["<x>", *(f"<x>_{i}" for i in range(1, len(rows)))]
    before = len(made.tokenizer)
    made.tokenizer.add_tokens(names)
    assert len(made.tokenizer) == before + len(rows)
    name, table = next((n, m) for n, m in made.network.named_modules() if isinstance(m, nn.Embedding))
    assert table is made.network.get_input_embeddings() if hasattr(made.network, "get_input_embeddings") else True
    grown = nn.Embedding.from_pretrained(torch.cat((table.weight.detach()[:before], rows)))
    for place, module in list(made.network.named_modules()):
        if module is table or (isinstance(module, nn.Embedding) and module.weight is table.weight):
            made.network.set_submodule(place, grown)
    assert name
    with torch.no_grad():
        spelled = [prompt.replace("<x>", "".join(names)) for prompt in PROMPTS]
        return made.read(made.network, made.numbered(made.tokenizer, spelled))


@pytest.mark.parametrize("case", CASES)
def test_new_words_are_read_as_the_reference_reads_them(root: Path, case: Callable[[Path], Case]) -> None:
    made = case(root)
    ((folder, table),) = made.encoder.tables().items()
    rows = torch.randn(3, table.shape[1], generator=torch.Generator().manual_seed(2)) * table.std()
    before, kept = said(made.encoder, PROMPTS), table.clone()
    facts = made.encoder.readings()
    grown = made.encoder.with_words({"<x>": {folder: rows}})
    found, expected = said(grown, PROMPTS), reference_words(made, rows)
    for mine, reference, old in zip(found, expected, before, strict=True):
        assert relative(mine, reference) < 1e-5
        assert relative(mine[0], old[0]) > 1e-3 and relative(mine[1], old[1]) < 1e-6  # the second prompt has no word

    again = said(made.encoder, PROMPTS)
    assert all(torch.equal(one, other) for one, other in zip(again, before, strict=True))
    assert torch.equal(made.encoder.tables()[folder], kept) and made.encoder.tables()[folder] is table
    assert made.encoder.readings() == facts and grown.readings()[0].digest != facts[0].digest
    (network,) = grown.networks.values()
    (mine,) = made.encoder.networks.values()
    held = dict(network.named_parameters())
    assert all(held.pop(name) is parameter for name, parameter in mine.named_parameters())
    (place,) = learned(network)
    assert list(held) == [f"{place}.rows"]
    vectors = grown.vectors("<x>")[folder]
    assert any(torch.equal(vectors[i : i + 3], rows) for i in range(len(vectors) - 2))
    with pytest.raises(InputError, match="already"):
        grown.with_words({"<x>": {folder: rows}})
    with pytest.raises(InputError, match="no vectors for"):
        made.encoder.with_words({"<y>": {}})
    with pytest.raises(InputError, match=r"vectors of shape \(3, 5\)"):
        made.encoder.with_words({"<y>": {folder: rows[:, :5]}})


@pytest.mark.parametrize("case", CASES)
def test_only_the_rows_of_new_words_have_a_gradient(root: Path, case: Callable[[Path], Case]) -> None:
    """Even where everything asks for one: the table of the known words cannot move."""
    made = case(root)
    ((folder, table),) = made.encoder.tables().items()
    known = made.encoder.vectors("crack")[folder]
    grown = made.encoder.with_words({"<x>": {folder: known[:1].repeat(2, 1)}})
    (network,) = grown.networks.values()
    ((place, rows),) = learned(network).items()
    assert rows.rows.dtype == torch.float32
    network.requires_grad_(True)
    torch.stack([part.square().sum() for part in said(grown, PROMPTS)]).sum().backward()
    assert rows.rows.grad is not None and rows.rows.grad.abs().amax(1).min() > 0
    assert rows.weight.grad is None and table.grad is None
    assert not any(n.startswith(place) and p.grad is not None for n, p in network.named_parameters() if "rows" not in n)


@pytest.mark.parametrize("case", CASES)
def test_lengths_count_what_prompts_need(root: Path, case: Callable[[Path], Case]) -> None:
    made = case(root)
    prompts = ["", "a crack", "the cell, the crack on a dark area " * 9]
    found = made.encoder.lengths(prompts)
    if isinstance(made.encoder, llm.LanguageModel):
        around = made.encoder.template.around
        expected = [len(made.tokenizer(around(p), add_special_tokens=False).input_ids) for p in prompts]
    else:
        expected = [len(made.tokenizer(prompt).input_ids) for prompt in prompts]
    assert found == expected
    assert found[2] > made.encoder.readings(False)[0].length > found[1]


def test_several_encoders_count_by_the_shortest_row(root: Path) -> None:
    first, third = clip_l(root).encoder, five(root).encoder
    joint = Joint((first,), third)
    assert joint.lengths(["a crack"]) == first.lengths(["a crack"])
    assert joint.tables().keys() == joint.vectors("crack").keys() == {"text_encoder", "t5"}
    assert t5.NoT5().lengths(["a"]) == [0] and t5.NoT5().tables() == {}


def test_t5_reads_letters_where_a_word_has_no_vectors_for_it(root: Path) -> None:
    first, third = clip_l(root).encoder, five(root).encoder
    joint = Joint((first,), third)
    rows = {folder: torch.randn(2, table.shape[1]) for folder, table in joint.tables().items()}
    whole, part = (joint.with_words({"<x>": given}) for given in (rows, {"text_encoder": rows["text_encoder"]}))
    before, one, other = (said(encoder, PROMPTS)[0] for encoder in (joint, whole, part))
    assert torch.equal(one[:, :77], other[:, :77]) and not torch.equal(one[:, :77], before[:, :77])
    assert torch.equal(other[:, 77:], before[:, 77:]) and not torch.equal(one[0, 77:], before[0, 77:])


def test_minilm_with_words_is_written_and_read_again(root: Path, tmp_path: Path) -> None:
    encoder = minilm.load_folder(root / "minilm", length=20)
    rows = {"<x>": {"text_encoder": torch.randn(3, 16)}, "<y>": {"text_encoder": torch.randn(1, 16)}}
    grown = encoder.with_words(rows)
    grown.save(tmp_path)
    again = minilm.load_saved(tmp_path)
    prompts = [*PROMPTS, "<y> <x>"]
    assert all(torch.equal(a, b) for a, b in zip(said(again, prompts), said(grown, prompts), strict=True))
    assert again.readings() == grown.readings()
    (network,) = encoder.networks.values()
    with torch.no_grad():
        network.get_parameter("encoder.layer.0.output.dense.weight").add_(0.1)  # trained on: its own weights are kept
    encoder.save(tmp_path / "trained")
    trained = minilm.load_saved(tmp_path / "trained")
    assert trained.digest() == encoder.digest()
    assert all(torch.equal(a, b) for a, b in zip(said(trained, prompts), said(encoder, prompts), strict=True))


def test_a_language_model_with_words_is_not_written(root: Path, tmp_path: Path) -> None:
    encoder = qwen3(root).encoder
    with pytest.raises(InputError, match="keep those in their own file"):
        encoder.with_words({"<x>": {"qwen3": torch.randn(1, 32)}}).save(tmp_path)


@pytest.mark.parametrize(
    ("case", "text", "says"),
    [
        (mini, "a zebra", "does not know 'a zebra'"),
        (mini, "", "does not know ''"),
        (five, "ÿ", "does not know"),
        (ldm, "a zebra", "does not know 'zebra', so it cannot say 'a zebra'"),
        (clip_l, " ", "no word for the text encoder"),
    ],
)
def test_words_that_nobody_knows_have_no_vectors(
    root: Path, case: Callable[[Path], Case], text: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        case(root).encoder.vectors(text)
