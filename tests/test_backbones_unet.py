"""The U-Net against the reference implementation: strict loading, outputs, gradients, published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
UNCONDITIONAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddpm": {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    "adm": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attn_norm_num_groups": 8,
        "num_class_embeds": 5,
        "out_channels": 6,
    },
    "adm, attention at every level": {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "residual resampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    },
    "no attention, scaled middle": {"add_attention": False, "mid_block_scale_factor": 1.4142, "norm_eps": 1e-6},
    "scaled middle attention": {"mid_block_scale_factor": 1.4142, "norm_eps": 1e-3},
    "no middle": {"mid_block_type": None},
    "clock as class": {"class_embed_type": "timestep"},
    "vector as class": {"class_embed_type": "identity"},
    "wide embedding": {"time_embedding_dim": 48, "block_out_channels": (16, 24), "layers_per_block": 1},
}


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of its own, so that no norm, bias or zero layer can hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradient_error(ours: nn.Module, theirs: nn.Module) -> float:
    """The worst parameter's gradient error, relative to its own largest value.

    Softmax does not see a key's bias, so that gradient is rounding alone: a thousandth of the largest gradient is the floor.
    """
    expected = {key: value.grad for key, value in theirs.named_parameters()}
    floor = 1e-3 * max(value.abs().max().item() for value in expected.values())
    errors = [
        (value.grad - expected[key]).abs().max().item() / max(expected[key].abs().max().item(), floor)
        for key, value in ours.named_parameters()
    ]
    return max(errors)


def inputs(channels: int, size: tuple[int, int] = (16, 16), batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *size, generator=generator)
    return x, torch.tensor([3.0, 417.25, 999.0])[:batch]


def pair(options: dict[str, Any]) -> tuple[Any, UNet]:
    """The reference with random weights, and ours loaded strictly from it through its own config."""
    theirs = diffusers.UNet2DModel(**options).eval()
    randomise(theirs)
    ours = UNet(UNetConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_unconditional_equals_reference(name: str) -> None:
    options = {**SMALL, **UNCONDITIONAL[name]}
    theirs, ours = pair(options)
    x, t = inputs(3)
    label = None
    conditioning = Conditioning()
    if options.get("num_class_embeds") or options.get("class_embed_type") == "timestep":
        label = torch.tensor([4, 0, 2])
        conditioning = Conditioning(label=label)
    elif options.get("class_embed_type") == "identity":
        label = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
        conditioning = Conditioning(pooled=label)
    with torch.no_grad():
        expected = theirs(x, t, class_labels=label).sample
        assert relative(ours(x, t, conditioning), expected) < 1e-5
        fast = ours.to(memory_format=torch.channels_last)
        assert relative(fast(x.to(memory_format=torch.channels_last), t, conditioning), expected) < 1e-5


@pytest.mark.parametrize("name", ["plain", "adm"])
def test_gradients_equal_reference(name: str) -> None:
    theirs, ours = pair({**SMALL, **UNCONDITIONAL[name]})
    label = torch.tensor([1, 4, 4]) if name == "adm" else None
    x, t = inputs(3)
    theirs(x, t, class_labels=label).sample.square().mean().backward()
    ours(x, t, Conditioning(label=label)).square().mean().backward()
    assert gradient_error(ours, theirs) < 1e-5


def test_concat_is_joined_behind_the_input() -> None:
    theirs, ours = pair({**SMALL, "in_channels": 5})
    x, t = inputs(5)
    with torch.no_grad():
        joined = ours(x[:, :2], t, Conditioning(concat=x[:, 2:]))
        assert relative(joined, theirs(x, t).sample) < 1e-5


PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "DDPM CIFAR-10": (
        35_746_307,
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    count, options = PUBLISHED[name]
    with torch.device("meta"):
        network = UNet(UNetConfig.from_config(options))
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_embedding_type", "fourier"),
        ("act_fn", "gelu"),
        ("down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"]),
        ("attention_head_dim", 7),
        ("blok_out_channels", [1, 2]),
        ("norm_num_groups", 12),
        ("up_block_types", ["UpBlock2D"]),
    ],
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key if key != "down_block_types" else "SkipDownBlock2D"):
        UNet(UNetConfig.from_config({**SMALL, key: value}))


def test_private_keys_are_ignored() -> None:
    config = UNetConfig.from_config({**SMALL, "_class_name": "UNet2DModel", "_diffusers_version": "0.1"})
    assert config.block_out_channels == (16, 32)


def test_missing_conditioning_is_refused() -> None:
    network = UNet(UNetConfig.from_config({**SMALL, "num_class_embeds": 3}))
    with pytest.raises(ValueError, match="label"):
        network(*inputs(3), Conditioning())
