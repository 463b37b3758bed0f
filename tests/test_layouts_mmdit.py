"""Stability's single-file layout of Stable Diffusion 3 against the reference library's converter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor

from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig, sd3_medium, sd35_large, sd35_medium
from mezzotint.backbones.mmdit_controlnet import MMDiTControlNet, MMDiTControlNetConfig
from mezzotint.checkpoints.keymap import renamed, restored
from mezzotint.checkpoints.layouts.mmdit import mmdit, mmdit_config, mmdit_controlnet, mmdit_controlnet_config
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 5,
    "num_layers": 3,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 14,
    "pos_embed_max_size": 9,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "SD 3": {},
    "SD 3.5 Medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "SD 3.5 Large": {"qk_norm": "rms_norm"},
}
# as the reference library's conversion script builds Stability's files, but smaller
STABILITY: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "joint_attention_dim": None,
    "caption_projection_dim": 2048,
    "pooled_projection_dim": 14,
    "pos_embed_max_size": None,
    "pos_embed_type": None,
    "use_pos_embed": False,
    "force_zeros_for_pooled_projection": False,
}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_references_converter(name: str) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    theirs = diffusers.SD3Transformer2DModel(**{**SMALL, **VARIANTS[name]})
    randomise(theirs)
    folder = theirs.state_dict()
    config = MMDiTConfig.from_config(dict(theirs.config))
    original = restored(folder, mmdit(config))
    assert same(renamed(original, mmdit(config)), folder)
    assert same(restored(renamed(original, mmdit(config)), mmdit(config)), original)
    taken = dict(original)
    assert same(convert(taken), folder)
    assert not taken  # it takes out what it knows: every name of ours was known


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_from_shapes(name: str) -> None:
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**{**SMALL, **VARIANTS[name]})
    config = MMDiTConfig.from_config(dict(theirs.config))
    original = restored(theirs.state_dict(), mmdit(config))
    assert MMDiTConfig.from_config(mmdit_config(shapes(original))) == config


@pytest.mark.parametrize("config", [sd3_medium(), sd35_medium(), sd35_large()])
def test_published_sizes_are_recognised(config: MMDiTConfig) -> None:
    with torch.device("meta"):
        original = restored(MMDiT(config).state_dict(), mmdit(config))
    assert mmdit_config(shapes(original)) == write_config(config, "SD3Transformer2DModel")
    # the facts by which the reference library tells the files apart
    assert (original["joint_blocks.0.context_block.adaLN_modulation.1.bias"].shape[-1] == 9216) == (
        config.num_layers == 24
    )
    assert original["pos_embed"].shape[1] == config.pos_embed_max_size**2
    assert ("joint_blocks.37.x_block.mlp.fc1.weight" in original) == (config.num_layers == 38)


def test_control_network_of_stability() -> None:
    """Fused by hand from the facts of the reference's conversion script, which is not part of the library."""
    theirs = diffusers.SD3ControlNetModel(**STABILITY)
    randomise(theirs)
    folder = theirs.state_dict()
    config = MMDiTControlNetConfig.from_config(dict(theirs.config))
    names = {
        "to_out.0": "proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
        "norm1.linear": "adaLN_modulation.1",
    }
    expected: dict[str, Tensor] = {}
    for name, tensor in folder.items():
        for ours, original in names.items():
            name = name.replace(ours, original)
        if ".to_" not in name:
            expected[name] = tensor
    for index in range(2):
        at = f"transformer_blocks.{index}.attn"
        for leaf in ("weight", "bias"):
            expected[f"{at}.qkv.{leaf}"] = torch.cat([folder[f"{at}.to_{part}.{leaf}"] for part in "qkv"])
    original = restored(folder, mmdit_controlnet(config))
    assert same(original, expected)
    assert same(renamed(original, mmdit_controlnet(config)), folder)
    assert MMDiTControlNetConfig.from_config(mmdit_controlnet_config(shapes(original))) == config


def test_published_control_networks_are_recognised() -> None:
    """19 blocks of 38 heads: half of SD 3.5 Large."""
    options = {**STABILITY, "num_layers": 19, "num_attention_heads": 38, "pooled_projection_dim": 2048}
    config = MMDiTControlNetConfig.from_config(options)
    with torch.device("meta"):
        original = restored(MMDiTControlNet(config).state_dict(), mmdit_controlnet(config))
        theirs = diffusers.SD3ControlNetModel(**options)
    found = renamed(original, mmdit_controlnet(config))
    assert shapes(found) == shapes(theirs.state_dict())
    assert MMDiTControlNetConfig.from_config(mmdit_controlnet_config(shapes(original))) == config


def test_a_control_network_that_reads_text_has_no_original_layout() -> None:
    with pytest.raises(InputError, match="keep it as a folder"):
        mmdit_controlnet(MMDiTControlNetConfig())


def test_a_file_of_another_kind_is_named() -> None:
    with pytest.raises(InputError, match=r"x_embedder\.proj\.weight"):
        mmdit_config({"img_in.weight": (3072, 64)})
