"""ControlNet's own names against the reference library's converter."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from layouts import assert_same, count, on_meta, shapes_of, there_and_back
from networks import randomise

from mezzotint.backbones import published_unets as published
from mezzotint.backbones.controlnet import ControlNet, ControlNetConfig
from mezzotint.checkpoints.layouts.controlnet import controlnet, controlnet_config

converters = pytest.importorskip("diffusers.loaders.single_file_utils")

TINY = ControlNetConfig(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=8,
    conditioning_channels=1,
    conditioning_embedding_out_channels=(8, 16, 24, 32),
)
VARIANTS = {
    "like SD 1": TINY,
    "like SD 2": replace(TINY, use_linear_projection=True, transformer_layers_per_block=(1, 2, 3)),
}


def reference(original: dict[str, Any], config: ControlNetConfig) -> dict[str, Any]:
    """What the reference library makes of an original file."""
    named = {f"control_model.{name}": tensor for name, tensor in original.items()}
    return converters.convert_controlnet_checkpoint(named, asdict(config))


@pytest.mark.parametrize("name", VARIANTS)
def test_converter_of_the_reference_agrees_to_the_bit(name: str) -> None:
    config = VARIANTS[name]
    network = ControlNet(config)
    randomise(network)
    tensors = network.state_dict()
    original = there_and_back(tensors, controlnet(config))
    assert_same(reference(original, config), tensors)
    assert ControlNetConfig.from_config(controlnet_config(shapes_of(original), heads=8)) == config


def test_published_network_has_a_place_for_every_tensor() -> None:
    config = published.controlnet_sd1()
    tensors = on_meta(lambda: ControlNet(config))
    original = there_and_back(tensors, controlnet(config))
    assert count(original) == count(tensors)
    assert_same(reference(original, config), tensors)
    assert ControlNetConfig.from_config(controlnet_config(shapes_of(original))) == config


def test_vector_of_the_picture_has_a_place() -> None:
    """SDXL's; the reference's converter leaves its tensors out, since those files are published under its own names."""
    config = published.controlnet_sdxl()
    original = there_and_back(on_meta(lambda: ControlNet(config)), controlnet(config))
    assert shapes_of(original)["label_emb.0.0.weight"] == (1280, 2816)
    assert ControlNetConfig.from_config(controlnet_config(shapes_of(original))) == config
