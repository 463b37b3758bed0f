"""Adapters on modules of the original layouts, fused ones among them, and on text encoders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from networks import randomise, relative
from torch import Tensor, nn

from mezzotint.adapters import BACKBONE, Adapter, attach, describe, merge, modules_of, read, to_diffusers, to_kohya
from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import Flux2Config
from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig
from mezzotint.checkpoints.keymap import Entry, renamed, restored
from mezzotint.checkpoints.layouts.flux2 import flux2
from mezzotint.checkpoints.layouts.mmdit import mmdit
from mezzotint.conditioning import Conditioning
from mezzotint.text.clip_network import ClipConfig, ClipText

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FLUX2: dict[str, Any] = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (2, 6, 4, 4),
}
MMDIT: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 14,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def case(name: str) -> tuple[nn.Module, list[Entry], tuple[Tensor, Tensor, Conditioning]]:
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([30.0, 741.0])
    if name == "flux2":
        network = Flux2(Flux2Config.from_config(FLUX2)).eval()
        rows, (channels, width) = flux2(network.config), (12, 20)
    else:
        network = MMDiT(MMDiTConfig.from_config(MMDIT)).eval()
        rows, (channels, width) = mmdit(network.config), (4, 10)
    randomise(network)
    told = Conditioning(
        tokens=torch.randn(2, 5, width, generator=generator),
        pooled=torch.randn(2, 14, generator=generator) if name != "flux2" else None,
        guidance=torch.tensor([1.0, 3.5]) if name == "flux2" else None,
    )
    return network, rows, (torch.randn(2, channels, 4, 6, generator=generator), t, told)


def original_adapter(original: dict[str, Tensor], style: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file with an adapter on every matrix of the original, and the original with it merged, by the formula."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    merged = dict(original)
    for index, (key, weight) in enumerate(original.items()):
        if weight.ndim not in (2, 4) or not key.endswith(".weight"):
            continue
        module, rank = key.removesuffix(".weight"), 2 + index % 2
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) / 2
        magnitude = 0.5 + torch.rand(len(weight), generator=generator)
        alpha = float(rank) if style == "peft" else 1.0 + index % 3
        changed = weight + alpha / rank * torch.einsum("or,r...->o...", up.flatten(1), down)
        if style == "dora":
            norm = changed.flatten(1).norm(dim=1)
            changed = changed * (magnitude / norm).reshape(-1, *[1] * (weight.ndim - 1))
        merged[key] = changed
        stem, halves = {
            "dotted": (f"diffusion_model.{module}", ("lora_A", "lora_B")),
            "peft": (f"base_model.model.{module}", ("lora_A", "lora_B")),
            "kohya": (f"lora_unet_{module.replace('.', '_')}", ("lora_down", "lora_up")),
            "dora": (f"lora_unet_{module.replace('.', '_')}", ("lora_down", "lora_up")),
        }[style]
        tensors |= {f"{stem}.{half}.weight": matrix for half, matrix in zip(halves, (down, up), strict=True)}
        if style != "peft":
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        if style == "dora":
            tensors[f"{stem}.dora_scale"] = magnitude.reshape(-1, *[1] * (weight.ndim - 1))
    return tensors, merged


@pytest.mark.parametrize("style", ["dotted", "peft", "kohya", "dora"])
@pytest.mark.parametrize("name", ["flux2", "mmdit"])
def test_adapters_of_the_original_layout_fit_the_folder(name: str, style: str) -> None:
    """Fused projections, swapped halves: merged there and renamed is the same as divided and merged here."""
    network, rows, told = case(name)
    tensors, merged = original_adapter(restored(network.state_dict(), rows), style)
    adapter = read(tensors, {}, {BACKBONE: modules_of(network)}, {BACKBONE: rows})
    assert adapter.facts.format == {"dotted": "original", "peft": "peft"}.get(style, "kohya")
    expected = renamed(merged, rows)
    found = merge(network, BACKBONE, [(adapter, 1.0)]).state_dict()
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 2e-6, key
    exact = copy.deepcopy(network)
    exact.load_state_dict(expected)
    with torch.no_grad():
        wanted = exact(*told)
        assert relative(network(*told), wanted) > 1e-2
        assert relative(attach(network, BACKBONE, [(adapter, 1.0)])(*told), wanted) < 1e-5
    kohya = to_kohya(adapter)
    again = read(*kohya, {BACKBONE: modules_of(network)})
    assert [low.module for low in again.parts[BACKBONE]] == [low.module for low in adapter.parts[BACKBONE]]
    again = read(*to_diffusers(adapter, "transformer"), {BACKBONE: modules_of(network)})
    with torch.no_grad():
        assert relative(attach(network, BACKBONE, [(again, 1.0)])(*told), wanted) < 1e-5


@pytest.mark.parametrize("style", ["dotted", "peft", "kohya"])
def test_flux2_equals_the_reference(style: str) -> None:
    """The reference's own conversions. It leaves the halves of the last modulation unswapped: not compared."""
    network, rows, _ = case("flux2")
    theirs = diffusers.Flux2Transformer2DModel(**FLUX2)
    theirs.load_state_dict(network.state_dict())
    tensors, _ = original_adapter(restored(network.state_dict(), rows), style)
    odd = ("adaLN", "modulation", "guidance_in") if style == "kohya" else ("adaLN",)  # it does not know these at all
    tensors = {key: value for key, value in tensors.items() if not any(word in key for word in odd)}
    if style == "dotted":  # it reads alphas in kohya's files alone
        tensors = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    mixin = diffusers.loaders.lora_pipeline.Flux2LoraLoaderMixin
    theirs.load_lora_adapter(mixin.lora_state_dict(dict(tensors)), adapter_name="first", prefix="transformer")
    theirs.fuse_lora()
    theirs.unload_lora()
    adapter = read(tensors, {}, {BACKBONE: modules_of(network)}, {BACKBONE: rows})
    found = merge(network, BACKBONE, [(adapter, 1.0)]).state_dict()
    changed = 0
    for key, expected in theirs.state_dict().items():
        assert (found[key] - expected).abs().max() < 2e-6, key
        changed += not torch.equal(expected, network.state_dict()[key])
    assert changed >= 20


def test_stable_diffusion_3_equals_the_reference() -> None:
    """The folder's names, as diffusers' trainers write them, and with underscores, as OneTrainer does."""
    torch.manual_seed(0)
    network, _, _ = case("mmdit")
    theirs = diffusers.SD3Transformer2DModel(**MMDIT)
    theirs.load_state_dict(network.state_dict(), strict=False)
    tensors: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    for name, shape in modules_of(network).items():
        if name.endswith(("to_q", "add_k_proj", "to_out.0", "to_add_out", "ff.net.0.proj", "norm1.linear", "proj_out")):
            pair = torch.randn(2, shape[1]) / shape[1] ** 0.5, torch.randn(shape[0], 2)
            for half, matrix in zip("AB", pair, strict=True):
                tensors[f"transformer.{name}.lora_{half}.weight"] = matrix
            stem = f"lora_transformer_{name.replace('.', '_')}"
            other |= {f"{stem}.lora_{way}.weight": matrix for way, matrix in zip(("down", "up"), pair, strict=True)}
    theirs.load_lora_adapter(dict(tensors), adapter_name="first", prefix="transformer")
    theirs.fuse_lora(lora_scale=0.3)
    theirs.unload_lora()
    for file in (tensors, other):
        adapter = read(file, {}, {BACKBONE: modules_of(network)})
        found = merge(network, BACKBONE, [(adapter, 0.3)]).state_dict()
        for key, expected in theirs.state_dict().items():
            assert key == "pos_embed.pos_embed" or (found[key] - expected).abs().max() < 1e-6, key


def test_text_encoders_equal_the_reference() -> None:
    """kohya's names for the first encoder, through the reference's conversion and peft."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59}
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **ends)).eval()
    randomise(theirs)
    network = ClipText(ClipConfig.from_config(theirs.config.to_dict()), projection=False)
    network.load_state_dict({f"text_model.{key}": value for key, value in theirs.state_dict().items()})
    tensors: dict[str, Tensor] = {}
    for name, shape in modules_of(network).items():
        stem = f"lora_te_{name.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(3, shape[1]) / shape[1] ** 0.5
        tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], 3) / 2
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    adapter = read(tensors, {}, {"text_encoder": modules_of(network)})
    loader = diffusers.loaders.lora_pipeline.StableDiffusionLoraLoaderMixin
    converted, alphas = loader.lora_state_dict(dict(tensors))
    loader.load_lora_into_text_encoder(converted, alphas, theirs, prefix="text_encoder", adapter_name="first")
    ids = torch.randint(0, 58, (2, 9))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states
        for found in (attach, merge):
            states = found(network, "text_encoder", [(adapter, 1.0)])(ids)
            assert relative(states[-1], expected[-1]) < 1e-5
        assert relative(network(ids)[-1], expected[-1]) > 1e-2


def fact_file(stem: str, width: int, rows: int) -> dict[str, Tensor]:
    return {f"{stem}.lora_down.weight": torch.ones(1, width), f"{stem}.lora_up.weight": torch.ones(rows, 1)}


FAMILIES: Sequence[tuple[str, int, int, str | None]] = [
    ("diffusion_model.double_blocks.0.img_attn.qkv", 6144, 18432, "FLUX.2 dev"),
    ("lora_unet_single_blocks_3_linear1", 4096, 36864, "FLUX.2 klein 9B"),
    ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 3072, 27648, "FLUX.2 klein 4B"),
    ("lora_unet_single_blocks_3_linear1", 3072, 21504, "FLUX.1"),
    ("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072, "FLUX.1"),
    ("transformer.transformer_blocks.0.attn.add_k_proj", 2432, 2432, "Stable Diffusion 3.5 large"),
    ("diffusion_model.joint_blocks.0.x_block.attn.qkv", 1536, 4608, "Stable Diffusion 3.5 medium"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 2048, 320, "Stable Diffusion XL"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, None),
]


@pytest.mark.parametrize(("stem", "width", "rows", "family"), FAMILIES)
def test_the_family_shows_in_the_widths(stem: str, width: int, rows: int, family: str | None) -> None:
    assert describe(fact_file(stem, width, rows), {}).family == family


def test_a_kept_adapter_has_no_hold_on_the_network() -> None:
    """Requests with different adapters at the same time: each sees its own, the base none."""
    network, rows, told = case("flux2")
    original = restored(network.state_dict(), rows)
    adapter: Adapter = read(
        original_adapter(original, "dotted")[0], {}, {BACKBONE: modules_of(network)}, {BACKBONE: rows}
    )
    with torch.no_grad():
        plain = network(*told)
        first, second = attach(network, BACKBONE, [(adapter, 1.0)]), attach(network, BACKBONE, [(adapter, -0.5)])
        alone = first(*told)
        second(*told)
        assert torch.equal(first(*told), alone)
        assert torch.equal(network(*told), plain)
    with pytest.raises(ValueError, match="in one call"):
        attach(first, BACKBONE, [(adapter, 1.0)])
