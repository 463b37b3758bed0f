"""FLUX.2's autoencoder against the reference class and what its pipeline does around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import randomise, relative
from torch import Tensor

from mezzotint.codec import Codec
from mezzotint.codec.flux2_vae import Flux2VAE, Flux2VAEConfig, keep_statistics, latent_space
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "block_out_channels": (8, 8, 12, 16),
    "norm_num_groups": 4,
    "latent_channels": 3,
    "layers_per_block": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published shape": {},
    "small decoder": {"decoder_block_out_channels": (4, 8, 8, 12)},
    "grey, two levels, no 1x1 convolutions, other epsilon": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 12),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "batch_norm_eps": 0.1,
    },
}


def pair(options: dict[str, Any]) -> tuple[Any, Flux2VAE]:
    theirs = diffusers.AutoencoderKLFlux2(**{**SMALL, **options}).eval()
    randomise(theirs)
    generator = torch.Generator().manual_seed(2)
    theirs.bn.running_mean.normal_(generator=generator)
    theirs.bn.running_var.uniform_(0.01, 4.0, generator=generator)
    ours = Flux2VAE(Flux2VAEConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Latents as the reference's pipeline prepares a reference picture."""
    pipeline = diffusers.Flux2Pipeline
    stand_in = SimpleNamespace(vae=vae, _patchify_latents=pipeline._patchify_latents)
    return pipeline._encode_vae_image(stand_in, pixels, None)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pixels as the reference's pipeline ends: statistics undone, patches laid out, decoder."""
    mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    z = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
    return vae.decode(diffusers.Flux2Pipeline._unpatchify_latents(z)).sample


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_reference(name: str) -> None:
    theirs, ours = pair(VARIANTS[name])
    codec = Codec(ours, latent_space(ours))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, ours.pixel_channels, 32, 48, generator=generator)
    with torch.no_grad():
        expected = encoded(theirs, pixels)
        assert expected.shape == (2, codec.channels, 32 // codec.factor, 48 // codec.factor)
        assert relative(codec.encode(pixels), expected) < 1e-5
        latents = torch.randn(expected.shape, generator=generator)
        assert relative(codec.decode(latents), decoded(theirs, latents)) < 1e-5


def test_the_posterior_is_the_reference_s() -> None:
    """Mean and log-variance in patches of the same order, so that noise and divergence mean what they do there."""
    theirs, ours = pair({})
    pixels = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior, moments = theirs.encode(pixels).latent_dist, ours.encode(pixels)
    assert moments.shape[1] == 2 * ours.latent_channels
    patches = diffusers.Flux2Pipeline._patchify_latents
    for found, expected in zip(moments.chunk(2, dim=1), (posterior.mean, posterior.logvar), strict=True):
        assert relative(found, patches(expected)) < 1e-5


def test_statistics_of_given_latents_whiten_them() -> None:
    _, ours = pair({})
    mean, variance = torch.linspace(-1, 1, 12), torch.linspace(0.5, 3, 12)
    keep_statistics(ours, mean, variance)
    space = latent_space(ours)
    assert torch.allclose(torch.tensor(space.scale), variance.rsqrt(), rtol=1e-6)
    assert torch.equal(torch.tensor(space.shift), mean)


def test_published_size() -> None:
    config = Flux2VAEConfig()
    written = write_config(config, "AutoencoderKLFlux2")
    assert Flux2VAEConfig.from_config(written) == config
    with torch.device("meta"):
        network, theirs = Flux2VAE(config), diffusers.AutoencoderKLFlux2.from_config(written)
    assert sum(p.numel() for p in network.parameters()) == 84_046_115
    assert sum(b.numel() for b in network.buffers()) == 257
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (network, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 251
    assert (network.factor, network.latent_channels) == (16, 128)


def test_the_published_file_is_read() -> None:
    """Options that the class's first release wrote, and lists as JSON has them."""
    published = {"_class_name": "AutoencoderKLFlux2", "force_upcast": True, "patch_size": [2, 2]}
    assert Flux2VAEConfig.from_config(published) == Flux2VAEConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", [1, 1]),
        ("act_fn", "relu"),
        ("norm_num_groups", 5),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("norm_num_groups", 8),
    ],
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    options = {**SMALL, "decoder_block_out_channels": [8, 8, 8, 12], key: value}
    with pytest.raises(InputError, match=key):
        Flux2VAE(Flux2VAEConfig.from_config(options))
