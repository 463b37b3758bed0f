"""The original DiT's names against that network restated from its formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import count, on_meta, shapes_of, there_and_back
from networks import randomise, relative
from original_networks import Weights, diffusion_transformer

from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.backbones.initialise import initialise
from mezzotint.backbones.presets import dit as preset
from mezzotint.checkpoints.keymap import renamed, restored
from mezzotint.checkpoints.layouts.dit import EMBEDDERS, dit, dit_config
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    sample_size=8,
    out_channels=8,
    num_embeds_ada_norm=7,
    norm_eps=1e-6,
    freq_shift=0,
)


ORIGINAL: dict[str, Any] = {"freq_shift": 0, "norm_eps": 1e-6}  # of the original code, where the reference has others


def random_dit() -> DiT:
    """Random weights, the embedders of all blocks alike as in the released ones."""
    network = DiT(TINY).eval()
    randomise(network)
    state = network.state_dict()
    for name in EMBEDDERS.values():
        for key in [key for key in state if f".emb.{name}." in key]:
            state[key].copy_(state["transformer_blocks.0" + key[len("transformer_blocks.0") :]])
    return network


def test_network_through_the_layout_equals_the_original() -> None:
    network = random_dit()
    weights = Weights(there_and_back(network.state_dict(), dit(TINY)))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, label = torch.tensor([3.0, 417.0, 999.0]), torch.tensor([6, 7, 0])
    with torch.no_grad():
        expected = diffusion_transformer(weights, x, t, label, heads=2)
        assert relative(network(x, t, Conditioning(label=label)), expected) < 1e-5
    assert not weights.unread()


@pytest.mark.parametrize(("size", "grid"), [(32, 16), (64, 32)])
def test_positions_come_back_to_the_bit(size: int, grid: int) -> None:
    """As the original's float64 formula rounds them at the published widths and sizes (256 and 512 pixels)."""
    numpy = pytest.importorskip("numpy")
    config = preset("XL/2", 4, 8, 1000, size)
    omega = 1.0 / 10000 ** (numpy.arange(config.channels // 4, dtype=numpy.float64) / (config.channels / 4))
    column, row = (axis.reshape(-1).astype(numpy.float64) for axis in numpy.meshgrid(range(grid), range(grid)))
    angles = [numpy.outer(axis, omega) for axis in (column, row)]
    table = numpy.concatenate([part(angle) for angle in angles for part in (numpy.sin, numpy.cos)], axis=1)
    expected = torch.from_numpy(table).float()[None]
    assert torch.equal(restored({}, dit(config))["pos_embed"], expected)


@pytest.mark.parametrize("name", ["S/2", "B/4", "L/8", "XL/2"])
def test_configuration_comes_back_from_shapes(name: str) -> None:
    config = preset(name, 4, 8, 1000, 32)
    original = there_and_back(on_meta(lambda: DiT(config)), dit(config))
    read = DiTConfig.from_config(dit_config(shapes_of(original)))
    assert read == config
    assert "freq_shift" not in write_config(read, "DiTTransformer2DModel")  # which knows no such option
    assert DiTConfig.from_config(dit_config(shapes_of(original), **ORIGINAL)) == replace(config, **ORIGINAL)
    published = {"S/2": 32_963_360, "XL/2": 675_129_632}  # with the table of positions, as the released files
    assert count(original) == published.get(name, count(original))


def test_copies_that_training_pulled_apart_cannot_go_back() -> None:
    network = initialise(DiT(TINY))
    with torch.no_grad():
        network.state_dict()["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"].add_(1e-3)
    with pytest.raises(InputError, match="copies"):
        restored(network.state_dict(), dit(TINY))


def test_positions_that_were_trained_are_refused() -> None:
    original = restored(random_dit().state_dict(), dit(TINY))
    original["pos_embed"] = original["pos_embed"] + 1e-3
    with pytest.raises(InputError, match="table"):
        renamed(original, dit(TINY))


def test_unknown_width_needs_the_heads() -> None:
    shapes = shapes_of(restored(random_dit().state_dict(), dit(TINY)))
    with pytest.raises(InputError, match="heads"):
        dit_config(shapes)
    assert DiTConfig.from_config(dit_config(shapes, heads=2, **ORIGINAL)) == TINY
