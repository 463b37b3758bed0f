"""The DDPM port's names against that network restated from its formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layouts import count, on_meta, shapes_of, there_and_back
from networks import randomise, relative
from original_networks import Weights, ddpm_port

from mezzotint.backbones import published_unets as published
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.layouts.ddpm import ddpm, ddpm_config
from mezzotint.conditioning import Conditioning

TINY = replace(
    published.ddpm_cifar10(), sample_size=None, dropout=0.0, block_out_channels=(32, 64, 64, 64), layers_per_block=1
)


def test_network_through_the_layout_equals_the_original() -> None:
    network = UNet(TINY).eval()
    randomise(network)
    weights = Weights(there_and_back(network.state_dict(), ddpm(TINY)))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([17.0, 803.0])
    with torch.no_grad():
        expected = ddpm_port(weights, x, t, levels=4, layers=1)
        assert relative(network(x, t, Conditioning()), expected) < 1e-5
    assert not weights.unread()


@pytest.mark.parametrize("config", [TINY, published.ddpm_cifar10(), published.ddpm_256()], ids=["tiny", "32", "256"])
def test_configuration_comes_back_from_shapes(config: UNetConfig) -> None:
    tensors = on_meta(lambda: UNet(config))
    original = there_and_back(tensors, ddpm(config))
    assert count(original) == count(tensors)
    read = UNetConfig.from_config(ddpm_config(shapes_of(original)))
    assert read == replace(config, sample_size=None, dropout=0.0)
