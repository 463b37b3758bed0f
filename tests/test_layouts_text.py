"""Text encoders' names in original single files against the reference library's conversion of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import assert_same, count, on_meta, shapes_of, there_and_back
from text_parts import tiny_bert, tiny_bert_tokenizer, tiny_clip, tiny_clip_tokenizer, tiny_t5
from torch import Tensor

from mezzotint.checkpoints.keymap import renamed, restored
from mezzotint.checkpoints.layouts import text
from mezzotint.errors import InputError
from mezzotint.text import bert, clip
from mezzotint.text.clip_network import ClipConfig, ClipText
from mezzotint.text.weights import read_folder

CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_H = {
    "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
CLIP_BIG_G = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def clip_on_meta(settings: dict[str, Any], projection: bool) -> dict[str, Tensor]:
    return on_meta(lambda: ClipText(ClipConfig.from_config(settings), projection))


@pytest.mark.parametrize(
    ("settings", "projection", "parameters", "tensors"),
    [
        (CLIP_L, False, 123_060_480, 196),
        (CLIP_L, True, 123_650_304, 197),
        (CLIP_H, False, 340_387_840, 372),
        (CLIP_BIG_G, True, 694_659_840, 517),
    ],
    ids=["CLIP-L", "CLIP-L with projection", "OpenCLIP H", "OpenCLIP bigG"],
)
def test_published_clips_are_known_by_their_shapes(
    settings: dict[str, Any], projection: bool, parameters: int, tensors: int
) -> None:
    state = clip_on_meta(settings, projection)
    assert (count(state), len(state)) == (parameters, tensors)
    assert text.clip_config(shapes_of(state)).items() >= settings.items()
    assert there_and_back(state, text.clip_entries(settings, projection)).keys() == state.keys()
    if settings is not CLIP_L:
        original = there_and_back(state, text.open_clip_entries(settings, projection))
        assert text.open_clip_config(shapes_of(original)).items() >= settings.items()


def test_published_t5_is_known_by_its_shapes() -> None:
    from transformers import T5Config, T5EncoderModel

    state = on_meta(lambda: T5EncoderModel(T5Config(**T5_XXL)))
    state.pop("encoder.embed_tokens.weight")  # the shared table under another name
    assert (count(state), len(state) + 1) == (4_762_310_656, 220)
    assert text.t5_config(shapes_of(state)).items() >= T5_XXL.items()
    assert there_and_back(state, text.t5_entries(T5_XXL)).keys() == state.keys()


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}, 4_022_468_096),
        ({"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}, 8_190_735_360),
    ],
    ids=["Qwen3-4B", "Qwen3-8B"],
)
def test_published_language_models_are_counted_by_what_is_read(settings: dict[str, Any], parameters: int) -> None:
    """All but the layers behind the last one read, the final norm and the head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from mezzotint.text.llm import QWEN3_LAYERS, build

    config: dict[str, Any] = {
        "vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, **settings,
    }  # fmt: skip
    with torch.device("meta"):
        whole = Qwen3ForCausalLM(Qwen3Config(**config))
    assert sum(p.numel() for p in whole.parameters()) == parameters
    last = max(QWEN3_LAYERS)
    ours = on_meta(lambda: build({"model_type": "qwen3", **config, "num_hidden_layers": last}, normed=False))
    left_out = sum(p.numel() for p in whole.model.layers[last:].parameters()) + config["hidden_size"]
    head = 0 if config["tie_word_embeddings"] else whole.lm_head.weight.numel()
    assert count(ours) == parameters - left_out - head


def test_published_mistral_is_counted_by_what_is_read() -> None:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    from mezzotint.text.llm import MISTRAL_LAYERS, build

    config = Mistral3Config(tie_word_embeddings=False)  # its defaults are Mistral-Small-3.1's and 3.2's
    with torch.device("meta"):
        whole = Mistral3ForConditionalGeneration(config)
    assert sum(p.numel() for p in whole.parameters()) == 24_011_361_280
    decoder = config.text_config.to_dict() | {"num_hidden_layers": max(MISTRAL_LAYERS)}
    ours = on_meta(lambda: build(decoder, normed=False))
    language = whole.model.language_model
    expected = [language.embed_tokens, *language.layers[:30]]
    assert count(ours) == sum(p.numel() for module in expected for p in module.parameters())


def test_open_clip_converts_as_the_reference_does(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextModelWithProjection

    folder = tiny_clip(tmp_path, 64, projection=64, layers=3, act="gelu", heads=1)
    config, ours = read_folder(folder)
    original = there_and_back(ours, text.open_clip_entries(config))
    network = CLIPTextModelWithProjection.from_pretrained(folder)
    prefixed = {f"x.{name}": tensor for name, tensor in original.items()} | {"x.logit_scale": torch.ones(())}
    assert_same(convert_open_clip_checkpoint(network, dict(prefixed), prefix="x."), ours)
    again = text.behind(prefixed, "x.")
    found = text.open_clip_config(shapes_of(again))
    assert {key: config[key] for key in ClipConfig.__slots__} == {key: found[key] for key in ClipConfig.__slots__}

    kept = text.without_tail(again, layers=2, projection=False)
    shorter = text.open_clip_config(shapes_of(again), keep=2, projection=False)
    expected = {n: t for n, t in ours.items() if ".layers.2." not in n and n != "text_projection.weight"}
    assert_same(renamed(kept, text.open_clip_entries(shorter, projection=False)), expected)
    assert shorter["num_hidden_layers"] == 2 and shorter["architectures"] == ["CLIPTextModel"]


def test_an_open_clip_of_a_single_file_reads_and_saves_as_the_folder_does(tmp_path: Path) -> None:
    config, ours = read_folder(tiny_clip(tmp_path / "text_encoder_2", 64, projection=64, act="gelu", heads=1))
    tiny_clip_tokenizer(tmp_path / "tokenizer_2", pad="!")
    ways: dict[str, Any] = {"layer": -2, "norm": False, "pooling": "projection"}
    folder = clip.load_folder(tmp_path / "text_encoder_2", tmp_path / "tokenizer_2", **ways)
    original = restored(ours, text.open_clip_entries(config)) | {"logit_scale": torch.ones(())}
    found = text.open_clip_config(shapes_of(original))
    tensors = renamed(text.without_tail(original, 3, projection=True), text.open_clip_entries(found))
    words = folder.vocabulary.tokenizer
    single = clip.from_tensors(found, tensors, words, folder="text_encoder_2", **ways)
    expected, held = folder.encode(["a crack", ""]), single.encode(["a crack", ""])
    assert expected.tokens is not None and held.tokens is not None and torch.equal(held.tokens, expected.tokens)
    assert expected.pooled is not None and held.pooled is not None
    torch.testing.assert_close(held.pooled, expected.pooled, rtol=1e-6, atol=1e-6)
    assert single.readings()[0].digest == folder.readings()[0].digest
    single.save(tmp_path / "saved")
    assert_same(read_folder(tmp_path / "saved" / "text_encoder_2")[1], ours)


def test_a_projection_is_stored_the_other_way_round() -> None:
    """In a matrix that is not square the mistake would show by its shape; published ones are square."""
    ours = {"text_projection.weight": torch.randn(2, 5)}
    entries = text.open_clip_entries({"num_hidden_layers": 0})
    assert torch.equal(restored(ours, entries)["text_projection"], ours["text_projection.weight"].T)


def test_clip_and_t5_lose_their_prefix_as_in_the_reference(tmp_path: Path) -> None:
    from diffusers.loaders import single_file_utils as reference

    _, first = read_folder(tiny_clip(tmp_path / "clip", projection=16))
    prefix = text.PREFIXES["sdxl"]["text_encoder"]
    file = {f"{prefix}{name}": tensor for name, tensor in first.items()} | {"other.weight": torch.ones(1)}
    assert_same(text.behind(file, prefix), reference.convert_ldm_clip_checkpoint(dict(file)))
    _, t5 = read_folder(tiny_t5(tmp_path / "t5"))
    prefix = text.PREFIXES["sd3"]["text_encoder_3"]
    file = {f"{prefix}{name}": tensor for name, tensor in t5.items()} | {"other.weight": torch.ones(1)}
    assert_same(text.behind(file, prefix), reference.convert_sd3_t5_checkpoint_to_diffusers(dict(file)))


def test_prefixes_are_where_the_reference_looks() -> None:
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES as KEYS

    table, open_clip = "text_model.embeddings.position_embedding.weight", "positional_embedding"
    first, second = "text_encoder", "text_encoder_2"
    assert KEYS["clip"].startswith(text.PREFIXES["sd1"][first]) and table in KEYS["clip"]
    assert KEYS["clip_sdxl"].startswith(text.PREFIXES["sdxl"][first])
    assert KEYS["clip_sd3"].startswith(text.PREFIXES["sd3"][first])
    assert KEYS["open_clip"].startswith(text.PREFIXES["sd2"][first])
    assert KEYS["open_clip_sdxl"] == text.PREFIXES["sdxl"][second] + open_clip
    assert KEYS["open_clip_sdxl_refiner"].startswith(text.PREFIXES["sdxl_refiner"][second])
    assert KEYS["open_clip_sd3"].startswith(text.PREFIXES["sd3"][second])


def test_ldms_transformer_in_its_original_names_gives_the_same_states(tmp_path: Path) -> None:
    """The original as its code wires it: a norm, then attention or a feed-forward, each added to its input."""
    tiny_bert(tmp_path / "bert", width=64)
    tiny_bert_tokenizer(tmp_path / "tokenizer")
    encoder = bert.load_folder(tmp_path / "bert", tmp_path / "tokenizer")
    ours = encoder.network.state_dict()
    config = {"encoder_layers": 2}
    original = there_and_back(ours, text.bert_entries(config))
    states = original["transformer.token_emb.weight"][torch.tensor([[2, 5, 6, 3]])]
    states = states + original["transformer.pos_emb.emb.weight"][:4]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = (original[f"transformer.{name}.{leaf}"] for leaf in ("weight", "bias"))
        return torch.nn.functional.layer_norm(x, (64,), weight, bias)

    for i in range(4):
        at = f"attn_layers.layers.{i}"
        block = {n.split(f"{at}.1.")[1]: t for n, t in original.items() if n.startswith(f"transformer.{at}.1.")}
        x = norm(states, f"{at}.0")
        if i % 2 == 0:
            q, k, v = ((x @ block[f"to_{part}.weight"].T).unflatten(-1, (2, 8)).transpose(1, 2) for part in "qkv")
            seen = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            states = states + seen @ block["to_out.weight"].T + block["to_out.bias"]
        else:
            inner = torch.nn.functional.gelu(x @ block["net.0.0.weight"].T + block["net.0.0.bias"])
            states = states + inner @ block["net.2.weight"].T + block["net.2.bias"]
    torch.testing.assert_close(
        encoder.network(torch.tensor([[2, 5, 6, 3]])), norm(states, "norm"), rtol=1e-5, atol=1e-5
    )


def test_ldms_published_transformer_is_known_by_its_shapes() -> None:
    state = on_meta(lambda: bert.LdmBert(bert.BertConfig()))
    assert count(state) == 581_994_042  # with the U-Net's 872,300,484 the published 1.45 billion
    original = there_and_back(state, text.bert_entries({"encoder_layers": 32}))
    found = text.bert_config(shapes_of(original))
    assert bert.BertConfig.from_config(found) == bert.BertConfig()
    assert all(name.startswith("transformer.") for name in original)


@pytest.mark.parametrize(
    ("config", "lost", "says"),
    [
        (text.clip_config, "token_embedding.weight", "holds no tensor text_model.embeddings.token_embedding"),
        (text.clip_config, "encoder.layers.1.", "not numbered without gaps"),
    ],
)
def test_an_incomplete_encoder_is_refused(tmp_path: Path, config: Any, lost: str, says: str) -> None:
    _, tensors = read_folder(tiny_clip(tmp_path))
    with pytest.raises(InputError, match=says):
        config(shapes_of({name: tensor for name, tensor in tensors.items() if lost not in name}))
