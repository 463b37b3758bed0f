"""The KL autoencoder against the reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import gradient_error, randomise, relative

from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.errors import InputError

diffusers = pytest.importorskip("diffusers")


def levels(*widths: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


SMALL: dict[str, Any] = {**levels(8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "stable diffusion 1": {},
    "grey, 16 channels, no 1x1 convolutions": {
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention, f8": {**levels(8, 8, 16, 24), "mid_block_add_attention": False, "layers_per_block": 1},
    "one level": levels(8),
    "attention at the lower resolutions": {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
}


def pair(options: dict[str, Any]) -> tuple[Any, KLVAE]:
    theirs = diffusers.AutoencoderKL(**{**SMALL, **options}).eval()
    randomise(theirs)
    ours = KLVAE(KLVAEConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_reference(name: str) -> None:
    theirs, ours = pair(VARIANTS[name])
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, ours.pixel_channels, 32, 48, generator=generator)
    with torch.no_grad():
        expected = theirs.encode(pixels).latent_dist.parameters
        assert relative(ours.encode(pixels), expected) < 1e-5
        z = torch.randn(expected[:, : ours.latent_channels].shape, generator=generator)
        assert z.shape[-1] * ours.factor == 48
        assert relative(ours.decode(z), theirs.decode(z).sample) < 1e-5


def test_gradients_equal_reference() -> None:
    theirs, ours = (module.double() for module in pair({}))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    theirs(pixels).sample.square().mean().backward()
    moments = ours.encode(pixels)
    ours.decode(moments.chunk(2, dim=1)[0]).square().mean().backward()
    assert gradient_error(ours, theirs) < 1e-9


@pytest.mark.parametrize(
    ("count", "tensors", "options"),
    [
        (83_653_863, 248, {}),
        (83_819_683, 244, {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}),
        (55_312_063, 204, levels(128, 256, 512) | {"latent_channels": 3}),
    ],
    ids=["stable diffusion 1, 2, xl", "stable diffusion 3", "latent diffusion f4"],
)
def test_published_sizes(count: int, tensors: int, options: dict[str, Any]) -> None:
    config = KLVAEConfig.from_config({**levels(128, 256, 512, 512), "layers_per_block": 2, **options})
    with torch.device("meta"):
        network = KLVAE(config)
    parameters = list(network.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (count, tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [("act_fn", "relu"), ("down_block_types", ["AttnDownBlock2D"] * 3), ("chanels", 3), ("norm_num_groups", 3)],
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        KLVAE(KLVAEConfig.from_config({**SMALL, key: value}))
