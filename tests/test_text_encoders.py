"""Every prompt encoder against the reference pipelines' own reading of the same prompts, on the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import relative
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
from torch import Tensor

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text import bert, clip, llm, t5
from mezzotint.text.encoder import TextEncoder
from mezzotint.text.joint import Joint
from mezzotint.text.vocabulary import open_tokenizer
from mezzotint.text.weights import read_folder

LONG = "the crack on the cell, the dark area of the steel " * 6
PROMPTS = ["a crack on the cell", "", "the cell " * 9, LONG]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tiny encoder and tokenizer, once."""
    root = tmp_path_factory.mktemp("text")
    tiny_clip(root / "text_encoder", 32)
    tiny_clip_tokenizer(root / "tokenizer")
    tiny_clip(root / "text_encoder_p", 32, projection=16, eos=2)
    tiny_clip(root / "text_encoder_2", 48, projection=24, layers=4, act="gelu", heads=3, eos=2, seed=1)
    tiny_clip_tokenizer(root / "tokenizer_2", pad="!")
    tiny_t5(root / "text_encoder_3")
    tiny_t5_tokenizer(root / "tokenizer_3")
    tiny_qwen3(root / "qwen3")
    tiny_qwen3_tokenizer(root / "qwen3_tokenizer")
    tiny_mistral3(root / "mistral3")
    tiny_mistral3_tokenizer(root / "mistral3_tokenizer")
    tiny_bert(root / "bert")
    tiny_bert_tokenizer(root / "bert_tokenizer")
    return root


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The reference logs what it cuts, and ours warns; a test of its own looks at the words."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model reads")
        yield


def agrees(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None and ours.shape == theirs.shape
    assert relative(ours, theirs) < TOLERANCE


def reference_clip(root: Path, folder: str, tokenizer: str) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kind = CLIPTextModel if folder == "text_encoder" else CLIPTextModelWithProjection
    return kind.from_pretrained(root / folder), CLIPTokenizer.from_pretrained(root / tokenizer)


def stable_diffusion(root: Path, tokenizer: str = "tokenizer") -> Any:
    from diffusers import StableDiffusionPipeline

    network, words = reference_clip(root, "text_encoder", tokenizer)
    network.__dict__["text_model"] = network  # where diffusers 0.42 looks for the norm; transformers 5.6 moved it
    return StableDiffusionPipeline(None, network, words, None, None, None, None, requires_safety_checker=False)  # type: ignore


def stable_diffusion_xl(root: Path, base: bool = True) -> Any:
    from diffusers import StableDiffusionXLPipeline

    first = reference_clip(root, "text_encoder", "tokenizer") if base else (None, None)
    second = reference_clip(root, "text_encoder_2", "tokenizer_2")
    return StableDiffusionXLPipeline(
        None, first[0], second[0], first[1], second[1], None, None, force_zeros_for_empty_prompt=base
    )  # type: ignore


def stable_diffusion_3(root: Path, with_t5: bool) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5EncoderModel, T5TokenizerFast

    first = reference_clip(root, "text_encoder_p", "tokenizer")
    second = reference_clip(root, "text_encoder_2", "tokenizer_2")
    third = T5EncoderModel.from_pretrained(root / "text_encoder_3") if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=96, pooled_projection_dim=40, pos_embed_max_size=4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, None, None, *first, *second, third, T5TokenizerFast.from_pretrained(root / "tokenizer_3")
    )  # type: ignore


def sdxl(root: Path) -> Joint:
    first = clip.load_folder(root / "text_encoder", root / "tokenizer", layer=-2, norm=False)
    second = clip.load_folder(
        root / "text_encoder_2", root / "tokenizer_2", layer=-2, norm=False, pooling="projection", padding="!"
    )
    return Joint((first, second), stands_for_nothing="zeros")


def sd3(root: Path, with_t5: bool = True, length: int = 256) -> Joint:
    first = clip.load_folder(root / "text_encoder_p", root / "tokenizer", layer=-2, norm=False, pooling="projection")
    second = clip.load_folder(root / "text_encoder_2", root / "tokenizer_2", layer=-2, norm=False, pooling="projection")
    third = t5.load_folder(root / "text_encoder_3", root / "tokenizer_3", length=length)
    return Joint((first, second), third if with_t5 else t5.NoT5(length, 96))


@pytest.mark.parametrize("skip", [None, 1, 2])
@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
def test_one_clip_is_read_as_stable_diffusion_reads_it(parts: Path, tokenizer: str, skip: int | None) -> None:
    pipeline = stable_diffusion(parts, tokenizer)
    encoder = clip.load_folder(parts / "text_encoder", parts / tokenizer).skipping(skip or 0)
    positive, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, ["dark", "", "area", LONG], clip_skip=skip)
    agrees(encoder.encode(PROMPTS).tokens, positive)
    if skip is None:
        agrees(encoder.encode(["dark", "", "area", LONG]).tokens, negative)
        agrees(encoder.empty(2).tokens, pipeline.encode_prompt(["a", "b"], "cpu", 1, True)[1])
    assert encoder.readings(False)[0].layers == (-1 - (skip or 0),)


def test_the_padding_token_can_be_named(parts: Path) -> None:
    """Stable Diffusion 2's files disagree about it; the one it was trained with is "!", number 0."""
    named = clip.load_folder(parts / "text_encoder", parts / "tokenizer", padding="!")
    agrees(
        named.encode(PROMPTS).tokens, stable_diffusion(parts, "tokenizer_2").encode_prompt(PROMPTS, "cpu", 1, False)[0]
    )
    assert named.vocabulary.pad == 0 and named.readings(False)[0].padding == "!"


def test_the_last_layer_but_one_with_the_norm_is_a_network_of_one_layer_less(parts: Path) -> None:
    """OpenCLIP H: 24 layers read at the last but one, or the 23 that the published folder keeps."""
    whole = clip.load_folder(parts / "text_encoder", parts / "tokenizer", layer=-2)
    tensors = {k: v for k, v in whole.network.state_dict().items() if ".layers.2." not in k}
    shorter = clip.from_tensors({**(whole.settings or {}), "num_hidden_layers": 2}, tensors, whole.vocabulary.tokenizer)
    torch.testing.assert_close(shorter.encode(PROMPTS).tokens, whole.encode(PROMPTS).tokens, rtol=0, atol=0)


def test_pooling_takes_the_first_end_token(parts: Path) -> None:
    network, _ = reference_clip(parts, "text_encoder", "tokenizer")
    encoder = clip.load_folder(parts / "text_encoder", parts / "tokenizer", pooling="end")
    with torch.no_grad():
        theirs = network(encoder.vocabulary.rows(PROMPTS)[0][:, 0])
    agrees(encoder.encode(PROMPTS).pooled, theirs.pooler_output)


@pytest.mark.parametrize("skip", [None, 1])
def test_two_clips_are_read_as_sdxl_reads_them(parts: Path, skip: int | None) -> None:
    pipeline, encoder = stable_diffusion_xl(parts), sdxl(parts).skipping(skip or 0)
    tokens, nothing, pooled, nothing_pooled = pipeline.encode_prompt(PROMPTS, device="cpu", clip_skip=skip)
    found, empty = encoder.encode(PROMPTS), encoder.empty(4)
    agrees(found.tokens, tokens)
    agrees(found.pooled, pooled)
    for ours, theirs in ((empty.tokens, nothing), (empty.pooled, nothing_pooled)):
        assert ours is not None and torch.equal(ours, theirs) and not ours.any()
    negative = pipeline.encode_prompt(PROMPTS, device="cpu", negative_prompt=["dark"] * 4)
    if skip is None:
        agrees(encoder.encode(["dark"] * 4).tokens, negative[1])
        agrees(encoder.encode(["dark"] * 4).pooled, negative[3])


def test_the_refiner_reads_the_second_clip_alone(parts: Path) -> None:
    encoder = clip.load_folder(
        parts / "text_encoder_2", parts / "tokenizer_2", layer=-2, norm=False, pooling="projection"
    )
    tokens, nothing, pooled, nothing_pooled = stable_diffusion_xl(parts, base=False).encode_prompt(
        PROMPTS, device="cpu"
    )
    found, empty = encoder.encode(PROMPTS), encoder.empty(4)
    for ours, theirs in zip(
        (found.tokens, empty.tokens, found.pooled, empty.pooled), (tokens, nothing, pooled, nothing_pooled), strict=True
    ):
        agrees(ours, theirs)


@pytest.mark.parametrize(("with_t5", "length"), [(True, 256), (True, 20), (False, 30)])
def test_three_encoders_are_read_as_sd3_reads_them(parts: Path, with_t5: bool, length: int) -> None:
    pipeline, encoder = stable_diffusion_3(parts, with_t5), sd3(parts, with_t5, length)
    tokens, nothing, pooled, nothing_pooled = pipeline.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, device="cpu", max_sequence_length=length, clip_skip=None
    )
    found, empty = encoder.encode(PROMPTS), encoder.empty(4)
    assert encoder.pooled_width == 40 and found.tokens is not None and found.tokens.shape == (4, 77 + length, 96)
    agrees(found.tokens, tokens)
    agrees(found.pooled, pooled)
    agrees(empty.tokens, nothing)
    agrees(empty.pooled, nothing_pooled)


@pytest.mark.parametrize(("layers", "length"), [((1, 2, 4), 64), ((0, 3, 5), 200), ((2,), 512)])
def test_qwen3_is_read_as_klein_reads_it(parts: Path, layers: tuple[int, ...], length: int) -> None:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    network = Qwen3ForCausalLM.from_pretrained(parts / "qwen3")
    tokenizer = Qwen2TokenizerFast.from_pretrained(parts / "qwen3_tokenizer")
    theirs = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        network, tokenizer, PROMPTS, max_sequence_length=length, hidden_states_layers=list(layers)
    )
    encoder = llm.load_folder(parts / "qwen3", parts / "qwen3_tokenizer", torch.float32, layers, length)
    agrees(encoder.encode(PROMPTS).tokens, theirs)
    assert len(encoder.network.layers) == max(layers) and encoder.width == 32 * len(layers)


@pytest.mark.parametrize(("layers", "length"), [((1, 2, 4), 512), ((5,), 300), ((1, 3), 180)])
def test_mistral_is_read_as_dev_reads_it(parts: Path, layers: tuple[int, ...], length: int) -> None:
    from diffusers import Flux2Pipeline
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    network = Mistral3ForConditionalGeneration.from_pretrained(parts / "mistral3")
    tokenizer = AutoTokenizer.from_pretrained(parts / "mistral3_tokenizer")
    prompts = [*PROMPTS, "a [IMG]crack"]
    theirs = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
        network, tokenizer, prompts, max_sequence_length=length, hidden_states_layers=list(layers)
    )
    encoder = llm.load_folder(parts / "mistral3", parts / "mistral3_tokenizer", torch.float32, layers, length)
    agrees(encoder.encode(prompts).tokens, theirs)


def test_the_templates_are_the_references(parts: Path) -> None:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import AutoTokenizer

    assert llm.MISTRAL_SYSTEM == SYSTEM_MESSAGE
    tokenizer = AutoTokenizer.from_pretrained(parts / "qwen3_tokenizer")
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": LONG}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert llm.QWEN3.around(LONG) == theirs


def test_ldms_own_transformer_is_read_as_its_pipeline_reads_it(parts: Path) -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
    from transformers import BertTokenizer

    network = LDMBertModel.from_pretrained(parts / "bert").eval()
    tokenizer = BertTokenizer.from_pretrained(parts / "bert_tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    encoder = bert.load_folder(parts / "bert", parts / "bert_tokenizer")
    with torch.no_grad():
        agrees(encoder.encode(PROMPTS).tokens, network(ids)[0])


def test_long_prompts_are_read_in_pieces_on_request(parts: Path) -> None:
    encoder, pieces = sdxl(parts), 4
    ids = encoder.clips[0].vocabulary.tokenizer(2 * LONG, add_special_tokens=False).input_ids
    assert 3 * 75 < len(ids) < pieces * 75
    found = encoder.encode([2 * LONG, "a crack"], chunked=True)
    assert found.tokens is not None and found.tokens.shape == (2, pieces * 77, 80)
    network, tokenizer = reference_clip(parts, "text_encoder", "tokenizer")
    with torch.no_grad():
        for i in range(pieces):
            piece = ids[i * 75 : (i + 1) * 75]
            row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (77 - len(row))
            theirs = network(torch.tensor([row]), output_hidden_states=True).hidden_states[-2]
            agrees(found.tokens[:1, i * 77 : (i + 1) * 77, :32], theirs)
    short = encoder.encode(["a crack"])
    assert short.tokens is not None and short.pooled is not None and found.pooled is not None
    torch.testing.assert_close(found.tokens[1:, :77], short.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled[1:], short.pooled, rtol=1e-5, atol=1e-5)
    for other in (t5.load_folder(parts / "text_encoder_3", parts / "tokenizer_3"), klein(parts)):
        with pytest.raises(InputError, match="pieces"):
            other.encode([LONG], chunked=True)


def test_what_is_cut_is_quoted(parts: Path) -> None:
    prompt = "the cell " * 40
    with pytest.warns(UserWarning, match=r"reads 75 tokens of a prompt; left out: 'cell the cell the cell'"):
        clip.load_folder(parts / "text_encoder", parts / "tokenizer").encode([prompt])
    with pytest.warns(UserWarning, match=r"reads 19 tokens of a prompt; left out: 'a of'"):
        t5.load_folder(parts / "text_encoder_3", parts / "tokenizer_3", length=20).encode(
            ["a crack on the cell, the dark area of"]
        )

    with pytest.warns(UserWarning, match=r"reads 40 tokens of a prompt; left out: 'crack on'$"):
        klein(parts).encode(["x" * 34 + " crack on"])  # one token a letter, six of the template before them


def klein(root: Path) -> llm.LanguageModel:
    return llm.load_folder(root / "qwen3", root / "qwen3_tokenizer", torch.float32, (1, 2, 3), 40)


def dev(root: Path) -> llm.LanguageModel:
    return llm.load_folder(root / "mistral3", root / "mistral3_tokenizer", torch.float32, (1, 2, 3), 256)


def latent_diffusion(root: Path) -> bert.Bert:
    return bert.load_folder(root / "bert", root / "bert_tokenizer")


def _reopened(name: str, root: Path) -> TextEncoder:
    """What `save` wrote, opened by our own constructors."""
    if name == "sdxl":
        return sdxl(root)
    if name == "klein":
        return llm.load_folder(root / "text_encoder", root / "tokenizer", torch.float32, (1, 2, 3), 40)
    if name == "dev":
        return llm.load_folder(root / "text_encoder", root / "tokenizer", torch.float32, (1, 2, 3), 256)
    if name == "ldm":
        return bert.load_folder(root / "bert", root / "tokenizer")
    return t5.load_folder(root / "text_encoder_3", root / "tokenizer_3")


@pytest.mark.parametrize(
    ("name", "make", "folders"),
    [
        ("sdxl", sdxl, ["text_encoder", "text_encoder_2"]),
        ("klein", klein, ["text_encoder"]),
        ("dev", dev, ["text_encoder"]),
        ("ldm", latent_diffusion, ["bert"]),
        ("t5", lambda r: t5.load_folder(r / "text_encoder_3", r / "tokenizer_3"), ["text_encoder_3"]),
    ],
)
def test_saved_folders_come_back_and_transformers_opens_them(
    parts: Path, tmp_path: Path, name: str, make: Callable[[Path], TextEncoder], folders: list[str]
) -> None:
    import transformers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel

    encoder = make(parts)
    for part in getattr(encoder, "clips", [encoder]):
        if name in ("klein", "dev"):
            part.folder = "text_encoder"
    assert list(encoder.networks) == folders
    encoder.save(tmp_path)
    again = _reopened(name, tmp_path)
    ours, found = encoder.encode(PROMPTS), again.encode(PROMPTS)
    for before, after in ((ours.tokens, found.tokens), (ours.pooled, found.pooled)):
        if before is not None and after is not None:
            torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert [r.digest for r in again.readings()] == [r.digest for r in encoder.readings()]
    assert (tmp_path / "tokenizer" / "processor_config.json").is_file() == (name == "dev")
    sources = {"klein": "qwen3", "dev": "mistral3"}
    for folder in folders:
        source = parts / sources.get(name, folder)
        kind = "LDMBertModel" if name == "ldm" else transformers.AutoConfig.from_pretrained(source).architectures[0]
        network = LDMBertModel if name == "ldm" else getattr(transformers, kind)
        written, original = (network.from_pretrained(f).state_dict() for f in (tmp_path / folder, source))
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], original[key]) for key in written)


def test_a_sharded_file_in_another_format_is_opened_as_asked(parts: Path, tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    network = Qwen3ForCausalLM.from_pretrained(parts / "qwen3")
    network.to(torch.bfloat16).save_pretrained(tmp_path / "q", max_shard_size="20KB")
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 2
    half = llm.load_folder(tmp_path / "q", parts / "qwen3_tokenizer", None, (1, 2, 3), 40)
    assert half.network.embed_tokens.weight.dtype == torch.bfloat16
    assert half.network.rotary_emb.inv_freq.dtype == torch.float32
    full = llm.load_folder(tmp_path / "q", parts / "qwen3_tokenizer", torch.float32, (1, 2, 3), 40)
    exact = klein(parts)
    assert relative(_tokens(full.encode(PROMPTS)), _tokens(exact.encode(PROMPTS))) < 0.05
    assert full.readings()[0].digest == half.readings()[0].digest != exact.readings()[0].digest


def test_weights_in_the_format_asked_for_are_not_copied(parts: Path) -> None:
    config, tensors = read_folder(parts / "text_encoder")
    encoder = clip.from_tensors(config, tensors, open_tokenizer("CLIPTokenizerFast", parts / "tokenizer"))
    held = encoder.network.state_dict()
    assert {k: v.data_ptr() for k, v in held.items()} == {k: tensors[k].data_ptr() for k in held}


def test_names_as_newer_transformers_write_them_are_taken_too(parts: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    CLIPTextModel.from_pretrained(parts / "text_encoder").save_pretrained(tmp_path)
    ours = clip.load_folder(tmp_path, parts / "tokenizer")
    expected = clip.load_folder(parts / "text_encoder", parts / "tokenizer")
    assert torch.equal(_tokens(ours.encode(PROMPTS)), _tokens(expected.encode(PROMPTS)))
    assert ours.readings()[0].digest == expected.readings()[0].digest


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda c, t: t.pop("text_model.final_layer_norm.bias"),
            "does not fit its configuration.*final_layer_norm.bias",
        ),
        (lambda c, t: t.update({"text_model.odd.weight": torch.ones(1)}), "does not fit.*odd.weight"),
        (lambda c, t: c.update(hidden_size=64), "does not fit.*of another shape"),
        (lambda c, t: c.update(hidden_act="relu6"), "'hidden_act' = 'relu6'; known"),
        (lambda c, t: c.update(num_attention_heads=5), "5 heads do not divide 32"),
        (lambda c, t: c.update(num_hidden_layers=10**9), "1000000000 layers cannot be in 52 tensors"),
        (lambda c, t: c.update(num_hidden_layers=True), "'num_hidden_layers' = True"),
        (lambda c, t: c.update(hidden_size="big"), "'hidden_size' = 'big'"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(parts: Path, damage: Callable[[Any, Any], Any], says: str) -> None:
    config, tensors = read_folder(parts / "text_encoder")
    damage(config, tensors)
    with pytest.raises(InputError, match=says):
        clip.from_tensors(config, tensors, open_tokenizer("CLIPTokenizerFast", parts / "tokenizer"))


def test_wrong_ways_to_read_are_refused(parts: Path, tmp_path: Path) -> None:
    text, words = parts / "text_encoder", parts / "tokenizer"
    with pytest.raises(InputError, match="no layer -5"):
        clip.load_folder(text, words, layer=-5)
    with pytest.raises(InputError, match=r"no text_projection\.weight"):
        clip.load_folder(text, words, pooling="projection")
    with pytest.raises(InputError, match="the padding 'pad'"):
        clip.load_folder(text, words, padding="pad")
    with pytest.raises(InputError, match="is not an intact text encoder"):
        clip.load_folder(tmp_path, words)
    with pytest.raises(InputError, match=r"is not a tokenizer: none of tokenizer\.json"):
        clip.load_folder(text, text)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not an intact tokenizer"):
        clip.load_folder(text, tmp_path)
    with pytest.raises(InputError, match=r"5 layers, so layers \(9, 18, 27\) cannot be read"):
        llm.load_folder(parts / "qwen3", parts / "qwen3_tokenizer")
    config, tensors = read_folder(parts / "text_encoder_3")
    with pytest.raises(InputError, match="layers cannot be in"):
        t5.from_tensors(
            config | {"num_layers": 10**9}, tensors, open_tokenizer("T5TokenizerFast", parts / "tokenizer_3")
        )
    with pytest.raises(InputError, match="'model_type' is 'clip_text_model'; known here: mistral3"):
        llm.load_folder(text, words)


def _tokens(found: Conditioning) -> Tensor:
    assert found.tokens is not None
    return found.tokens
