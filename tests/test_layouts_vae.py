"""Latent diffusion's autoencoders: against the reference library's converter and against their formulas."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from layouts import assert_same, count, on_meta, shapes_of, there_and_back
from networks import randomise, relative
from original_networks import Weights, autoencoder

from mezzotint.checkpoints.layouts.vae import vae, vae_config
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.codec.vq import VQ, VQConfig

converters = pytest.importorskip("diffusers.loaders.single_file_utils")


def kl(widths: tuple[int, ...], layers: int, **options: Any) -> KLVAEConfig:
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    return KLVAEConfig(block_out_channels=widths, layers_per_block=layers, **(levels | options))


TINY = kl((32, 64, 64), 1)
SD3: dict[str, Any] = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
VARIANTS = {"like SD 1": TINY, "two layers": kl((32, 64), 2), "like SD 3": replace(TINY, **SD3)}
PUBLISHED = {
    "Stable Diffusion 1, 2 and XL": kl((128, 256, 512, 512), 2),
    "Stable Diffusion 3": kl((128, 256, 512, 512), 2, **SD3),
    "KL-f4": kl((128, 256, 512), 2, latent_channels=3),
}


def vq(widths: tuple[int, ...], layers: int, attends: str, latent: int, codes: int) -> VQConfig:
    """`attends` marks levels with attention by "+", finest first."""
    return VQConfig(
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("AttnDownEncoderBlock2D" if mark == "+" else "DownEncoderBlock2D" for mark in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if mark == "+" else "UpDecoderBlock2D" for mark in attends[::-1]),
        latent_channels=latent,
        vq_embed_dim=latent,
        num_vq_embeddings=codes,
        scaling_factor=1.0,
    )


TINY_VQ = vq((32, 64), 1, "-+", 4, 11)
CODEBOOKS = {
    "tiny": TINY_VQ,
    "VQ-f4": vq((128, 256, 512), 2, "---", 3, 8192),
    "VQ-f8": vq((128, 256, 256, 512), 2, "---+", 4, 16384),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_converter_of_the_reference_agrees_to_the_bit(name: str) -> None:
    config = VARIANTS[name]
    network = KLVAE(config)
    randomise(network)
    tensors = network.state_dict()
    original = there_and_back(tensors, vae(config))
    assert original["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    named = {f"first_stage_model.{key}": tensor for key, tensor in original.items()}
    assert_same(converters.convert_ldm_vae_checkpoint(named, asdict(config)), tensors)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configuration_comes_back_from_shapes(name: str) -> None:
    config = PUBLISHED[name]
    tensors = on_meta(lambda: KLVAE(config))
    original = there_and_back(tensors, vae(config))
    assert count(original) == count(tensors)
    assert KLVAEConfig.from_config(vae_config(shapes_of(original))) == config


def test_scale_of_the_latents_is_the_callers_to_say() -> None:
    shapes = shapes_of(there_and_back(on_meta(lambda: KLVAE(TINY)), vae(TINY)))
    assert vae_config(shapes, scaling_factor=0.13025, shift_factor=0.5)["scaling_factor"] == 0.13025
    assert vae_config(shapes, scaling_factor=0.13025, shift_factor=0.5)["shift_factor"] == 0.5


def test_levels_with_attention_equal_the_original() -> None:
    """Vector-quantised, with attention at the coarsest level as VQ-f8 has it; the original restated from formulas."""
    network = VQ(TINY_VQ).eval()
    randomise(network)
    original = there_and_back(network.state_dict(), vae(TINY_VQ))
    weights = Weights(original)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        encoded = autoencoder(weights, x, levels=2, layers=1, half="encoder")
        decoded = autoencoder(weights, z, levels=2, layers=1, half="decoder")
        assert relative(network.encoder(x), encoded) < 1e-5
        assert relative(network.decoder(z), decoded) < 1e-5
    around = {f"{name}.{leaf}" for name in ("quant_conv", "post_quant_conv") for leaf in ("weight", "bias")}
    assert weights.unread() == around | {"quantize.embedding.weight"}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_configuration_of_a_codebook_comes_back_from_shapes(name: str) -> None:
    config = CODEBOOKS[name]
    tensors = on_meta(lambda: VQ(config))
    original = there_and_back(tensors, vae(config))
    assert count(original) == count(tensors)
    assert VQConfig.from_config(vae_config(shapes_of(original))) == config
