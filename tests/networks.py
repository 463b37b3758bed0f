"""What the network tests share: weights that hide nothing, and the errors they are judged by."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of its own, so that no norm, bias or zero layer can hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradient_error(ours: nn.Module, theirs: nn.Module) -> float:
    """The worst parameter's gradient error, relative to its own largest value.

    Softmax does not see a key's bias, so that gradient is rounding alone: a thousandth of the largest gradient is the
    floor.
    """
    found, expected = (
        {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
        for module in (ours, theirs)
    )
    assert found.keys() == expected.keys() == dict(ours.named_parameters()).keys()
    floor = 1e-3 * max(value.abs().max().item() for value in expected.values())
    return max(
        (found[key] - value).abs().max().item() / max(value.abs().max().item(), floor)
        for key, value in expected.items()
    )


def channels_last(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return module
