"""Latent diffusion's names for U-Nets against the reference library's converter."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from layouts import assert_same, count, on_meta, shapes_of, there_and_back
from networks import randomise

from mezzotint.backbones import published_unets as published
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.unet import unet, unet_config
from mezzotint.errors import InputError

converters = pytest.importorskip("diffusers.loaders.single_file_utils")

TINY = ConditionalUNetConfig(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=8,
)
PICTURE: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
VARIANTS = {
    "like SD 1": TINY,
    "like SD 1 with attention at the finest level": replace(
        TINY,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "like SDXL": replace(TINY, use_linear_projection=True, transformer_layers_per_block=(1, 2, 3), **PICTURE),
    "like unCLIP": replace(TINY, class_embed_type="projection", projection_class_embeddings_input_dim=40),
    "by class, inpainting": replace(TINY, in_channels=9, num_class_embeds=7, layers_per_block=2),
}
PUBLISHED = {
    "sd1": published.sd1(),
    "sd1 inpainting": published.sd1(9),
    "sd2": published.sd2(),
    "sdxl": published.sdxl(),
    "sdxl_refiner": published.sdxl_refiner(),
    "ldm8_text2img": published.ldm8_text2img(),
    "ldm4_cin256": published.ldm4_cin256().unet,
}


def reference(original: dict[str, Any], config: ConditionalUNetConfig) -> dict[str, Any]:
    """What the reference library makes of an original file."""
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    return converters.convert_ldm_unet_checkpoint(named, asdict(config))


@pytest.mark.parametrize("name", VARIANTS)
def test_converter_of_the_reference_agrees_to_the_bit(name: str) -> None:
    config = VARIANTS[name]
    network = UNet(config)
    randomise(network)
    tensors = network.state_dict()
    original = there_and_back(tensors, unet(config))
    assert_same(reference(original, config), tensors)
    read = ConditionalUNetConfig.from_config(unet_config(shapes_of(original), heads=8))
    assert read == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network_has_a_place_for_every_tensor(name: str) -> None:
    config = PUBLISHED[name]
    tensors = on_meta(lambda: UNet(config))
    original = there_and_back(tensors, unet(config))
    assert count(original) == count(tensors)
    assert_same(reference(original, config), tensors)
    read = ConditionalUNetConfig.from_config(unet_config(shapes_of(original)))
    assert read == replace(config, sample_size=None)


def test_names_of_stable_diffusion() -> None:
    """Names that are in every published file, and that tell the versions apart."""
    for config, width in ((published.sd1(), 768), (published.sd2(), 1024)):
        original = shapes_of(restored(on_meta(lambda config=config: UNet(config)), unet(config)))
        assert original["input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] == (320, width)
        assert original["output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
        assert len(original) == 686


def test_told_guidance_has_a_place() -> None:
    config = published.lcm_sd1()
    original = there_and_back(on_meta(lambda: UNet(config)), unet(config))
    read = ConditionalUNetConfig.from_config(unet_config(shapes_of(original)))
    assert read == replace(config, sample_size=None)


def test_latent_diffusion_without_text_is_read_too() -> None:
    config = published.ldm4_uncond()
    original = there_and_back(on_meta(lambda: UNet(config)), unet(config))
    assert UNetConfig.from_config(unet_config(shapes_of(original))).plan() == config.plan()


def test_depths_that_no_configuration_says_are_refused() -> None:
    original = shapes_of(there_and_back(on_meta(lambda: UNet(TINY)), unet(TINY)))
    last = "middle_block.1.transformer_blocks.0."
    deeper = {name.replace(last, last.replace(".0.", ".1.")): shape for name, shape in original.items() if last in name}
    with pytest.raises(InputError, match="depths"):
        unet_config({**original, **deeper})
