"""A moving average of the weights: steadier than the last step's, it is what is validated, previewed and saved."""

from __future__ import annotations

import copy

import torch
from torch import nn


def follow(network: nn.Module) -> nn.Module:
    """A frozen copy to start the average from."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, step: int, decay: float, warmup: bool) -> None:
    """average <- d average + (1 - d) network after step 0, 1, ...; d = min(decay, (1 + step) / (10 + step)) in warm-up.

    The warm-up forgets the random start; buffers (running statistics) are copied.
    """
    if warmup:
        decay = min(decay, (1 + step) / (10 + step))
    ours, theirs = ([p.detach() for p in module.parameters()] for module in (average, network))
    torch._foreach_lerp_(ours, theirs, 1 - decay)
    for mine, new in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(new)
