"""The autoencoder with a codebook against the reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import gradient_error, randomise, relative

from mezzotint.codec.codec import Codec
from mezzotint.codec.latent_space import LatentSpace
from mezzotint.codec.vq import VQ, Codebook, VQConfig
from mezzotint.errors import InputError

diffusers = pytest.importorskip("diffusers")


def levels(*widths: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
    }


SMALL: dict[str, Any] = {**levels(8, 16, 16), "norm_num_groups": 4, "num_vq_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "f4": {},
    "f8, attention at the lowest resolution, codes of another width": {
        **levels(8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        "latent_channels": 6,
        "vq_embed_dim": 4,
    },
    "no attention": {"mid_block_add_attention": False},
}


def pair(options: dict[str, Any]) -> tuple[Any, VQ]:
    theirs = diffusers.VQModel(**{**SMALL, **options}).eval()
    randomise(theirs)
    ours = VQ(VQConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_reference(name: str) -> None:
    """The continuous latents, and pixels by way of the nearest codes."""
    theirs, ours = pair(VARIANTS[name])
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 48, generator=draw)
    with torch.no_grad():
        expected = theirs.encode(pixels).latents
        assert relative(ours.encode(pixels), expected) < 1e-5
        assert expected.shape[1:] == (ours.latent_channels, 32 // ours.factor, 48 // ours.factor)
        z = torch.randn(expected.shape, generator=draw)
        assert relative(ours.decode(z), theirs.decode(z).sample) < 1e-5
        assert relative(ours.decode(z), theirs.decode(z, force_not_quantize=True).sample) > 1e-2


def test_codes_are_the_nearest_of_all() -> None:
    """More vectors than are looked up at a time; the distances written out in float64."""
    codebook = Codebook(64, 3)
    randomise(codebook)
    z = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    codes = codebook.embedding.weight.detach()
    away = (z.double().permute(0, 2, 3, 1)[..., None, :] - codes.double()).square().sum(-1)  # (B, h, w, codes)
    expected = codes[away.argmin(-1)].permute(0, 3, 1, 2)
    with torch.no_grad():
        assert torch.equal(codebook(z), expected)
        half = codebook.bfloat16()(z.bfloat16())
        assert half.dtype == torch.bfloat16 and (half == expected.bfloat16()).all(1).float().mean() > 0.95


@pytest.mark.parametrize("commitment", [0.25, 1.5])
def test_the_loss_of_the_codebook_and_the_gradient_that_passes_it_equal_the_references(commitment: float) -> None:
    """In float64, with the weight on the term that van den Oord et al. 2017, eq. 3, put it on: legacy off."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    theirs, ours = VectorQuantizer(24, 3, beta=commitment, legacy=False), Codebook(24, 3).double()
    randomise(theirs)
    theirs.double()
    ours.load_state_dict(theirs.state_dict())
    draw = torch.Generator().manual_seed(1)
    z, pull = (torch.randn(2, 3, 6, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    seen = [z.clone().requires_grad_(), z.clone().requires_grad_()]
    found, loss = ours.learn(seen[0], commitment)
    expected, expected_loss, _ = theirs(seen[1])
    assert relative(found, expected) < 1e-12 and relative(loss, expected_loss) < 1e-12
    for codes, value in ((found, loss), (expected, expected_loss)):
        ((codes * pull).sum() + 3 * value).backward()
    assert seen[0].grad is not None and seen[1].grad is not None
    assert relative(seen[0].grad, seen[1].grad) < 1e-12 and gradient_error(ours, theirs) < 1e-12
    # of what is made of the codes, all goes to z and nothing to the codebook
    ours.zero_grad()
    again = z.clone().requires_grad_()
    (ours.learn(again, commitment)[0] * pull).sum().backward()
    assert again.grad is not None and torch.equal(again.grad, pull) and ours.embedding.weight.grad is None


def test_as_a_codec_of_scaled_latents() -> None:
    """As the reference's pipeline decodes: divided by the scale, quantised, decoded."""
    theirs, ours = pair({})
    codec = Codec(ours, LatentSpace(scale=0.5))
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(codec.decode(latents), theirs.decode(latents / 0.5).sample) < 1e-5


def test_published_size() -> None:
    """VQ-f4 with 8192 codes, LDM-4's first stage."""
    with torch.device("meta"):
        network = VQ(VQConfig.from_config({**levels(128, 256, 512), "num_vq_embeddings": 8192}))
    parameters = list(network.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (55_322_782, 205)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_type", "spatial"), ("down_block_types", ["DownBlock2D"] * 3), ("num_codes", 3), ("act_fn", "relu")],
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        VQ(VQConfig.from_config({**SMALL, key: value}))
