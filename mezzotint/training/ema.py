"""A moving average of the weights: steadier than the last step's, it is what is validated, previewed and saved."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mezzotint.training.parallel import own


def follow(network: nn.Module) -> nn.Module:
    """A frozen copy to start the average from; what does not train is the network's own and takes no memory."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    shared = [*frozen, *network.buffers()] if frozen else []
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    return copy.deepcopy(network, memo).eval().requires_grad_(False)


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, step: int, decay: float, warmup: bool) -> None:
    """average <- d average + (1 - d) network after step 0, 1, ...; d = min(decay, (1 + step) / (10 + step)) in warm-up.

    The warm-up forgets the random start; buffers (running statistics) of a network that trains whole are copied.
    """
    if warmup:
        decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(average.parameters(), network.parameters(), strict=True)
    moving = [(own(mine), own(new)) for mine, new in pairs if new.requires_grad]
    torch._foreach_lerp_([mine for mine, _ in moving], [new for _, new in moving], 1 - decay)
    for mine, new in zip(average.buffers(), network.buffers(), strict=True):
        if mine is not new:
            mine.copy_(new)


@contextlib.contextmanager
def at_rest(network: nn.Module) -> Iterator[nn.Module]:
    """The network without its dropout for a while: a run without an average judges what it trains."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield network
    finally:
        for module in training:
            module.training = True
