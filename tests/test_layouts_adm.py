"""Improved and guided diffusion's names against those networks restated from their formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from layouts import count, on_meta, shapes_of, there_and_back
from networks import randomise, relative
from original_networks import Weights, guided_diffusion

from mezzotint.backbones import published_unets as published
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.keymap import renamed
from mezzotint.checkpoints.layouts.adm import adm, adm_config
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError

TINY = UNetConfig(
    in_channels=3,
    out_channels=6,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=16,
)
RESIDUAL: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
SCALE_SHIFT: dict[str, Any] = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
VARIANTS = {
    "latent diffusion": TINY,
    "improved diffusion": replace(TINY, **SCALE_SHIFT, num_attention_heads=2, layers_per_block=2),
    "ADM": replace(TINY, **RESIDUAL, **SCALE_SHIFT, num_class_embeds=5),
    "ADM 512": replace(TINY, **RESIDUAL, **SCALE_SHIFT, clock_channels=64, time_embedding_dim=256),
}
PUBLISHED = {
    "iddpm_cifar10": published.iddpm_cifar10(),
    "iddpm_imagenet64": published.iddpm_imagenet64(),
    "iddpm_imagenet64 by class": published.iddpm_imagenet64(1000),
    "iddpm_lsun256": published.iddpm_lsun256(),
    "adm_64": published.adm_64(),
    "adm_128": published.adm_128(),
    "adm_256": published.adm_256(),
    "adm_256 without classes": published.adm_256(None),
    "adm_512": published.adm_512(),
    "ldm4_uncond": published.ldm4_uncond(),
    "ldm8_churches": published.ldm8_churches(),
}


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("name", VARIANTS)
def test_network_through_the_layout_equals_the_original(name: str, order: Literal["legacy", "new"]) -> None:
    """Every tensor of the original is read, and the output is the same; the other order gives another output."""
    config = VARIANTS[name]
    network = UNet(config).eval()
    randomise(network)
    weights = Weights(there_and_back(network.state_dict(), adm(config, order)))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([17.0, 803.0])
    label = None if config.num_class_embeds is None else torch.tensor([4, 0])

    def heads(channels: int) -> int:
        return config.num_attention_heads or channels // 16

    with torch.no_grad():
        expected = guided_diffusion(weights, x, t, label, heads=heads, order=order, layers=config.layers_per_block)
        assert not weights.unread()
        assert relative(network(x, t, Conditioning(label=label)), expected) < 1e-5
        other = adm(config, "new" if order == "legacy" else "legacy")
        network.load_state_dict(renamed(weights.tensors, other))
        assert relative(network(x, t, Conditioning(label=label)), expected) > 1e-3


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network_has_a_place_for_every_tensor(name: str) -> None:
    config = PUBLISHED[name]
    tensors = on_meta(lambda: UNet(config))
    original = there_and_back(tensors, adm(config))
    assert count(original) == count(tensors)
    read = UNetConfig.from_config(adm_config(shapes_of(original)))
    assert read.plan() == replace(config, dropout=0.0).plan()
    for field in ("in_channels", "out_channels", "num_class_embeds", "flip_sin_to_cos", "freq_shift"):
        assert getattr(read, field) == getattr(config, field)


def test_order_follows_what_was_published() -> None:
    """Only ADM 64 stacks q, k and v before heads; improved diffusion's network of the same widths does not."""
    assert adm(published.adm_64()) == adm(published.adm_64(), "new")
    for other in (published.iddpm_imagenet64(1000), published.adm_256(), published.ldm4_uncond(), TINY):
        assert adm(other) == adm(other, "legacy")


def test_unknown_widths_need_the_heads() -> None:
    original = there_and_back(on_meta(lambda: UNet(TINY)), adm(TINY))
    with pytest.raises(InputError, match="heads"):
        adm_config(shapes_of(original))
    assert UNetConfig.from_config(adm_config(shapes_of(original), head_width=16)) == TINY


def test_file_of_another_layout_is_refused() -> None:
    with pytest.raises(InputError, match="input blocks"):
        adm_config({"conv_in.weight": (32, 3, 3, 3)})
    shapes = shapes_of(there_and_back(on_meta(lambda: UNet(TINY)), adm(TINY)))
    torn = {name: shape for name, shape in shapes.items() if not name.startswith("input_blocks.3.")}
    with pytest.raises(InputError, match="gaps"):
        adm_config(torn, heads=1)
    cut = {name: shape for name, shape in shapes.items() if not name.startswith("input_blocks.5.")}
    with pytest.raises(InputError, match="5 input blocks do not fall into levels"):
        adm_config(cut, heads=1)
