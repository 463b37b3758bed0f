"""Activations that are computed again in the backward pass and not kept for it (Chen et al. 2016)."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mezzotint.errors import InputError

Network = TypeVar("Network", bound=nn.Module)
# What published files call the lists of equal blocks: in U-Nets and autoencoders, diffusion transformers, CLIP, MiniLM
# and language models, T5.
STACKS = ("resnets", "attentions", "transformer_blocks", "single_transformer_blocks", "layers", "layer", "block")


def recompute(network: Network) -> Network:
    """The network, of which every repeated block keeps its inputs alone and runs again when its gradient is asked for.

    Output, gradients and random numbers (dropout) are those of the network as it was, to the last bit; names, copies
    and what runs without gradients do not change. A block in which several blocks stand leaves it to them. InputError
    where there is no block.
    """
    found = blocks(network)
    if not found:
        raise InputError("recompute: this network has no repeated blocks, so nothing can be computed again.")
    for block in found:
        block.__class__ = _recomputed(type(block))  # and not a function on the object, which a copy would share
    return network


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, outermost first, without those that stand in another of them."""
    found: list[nn.Module] = []
    for name, part in network.named_children():
        stack = list(part.children()) if name in STACKS and isinstance(part, nn.ModuleList) else []
        for block in stack:
            inner = blocks(block)
            found += inner if len(inner) > 1 else [block]
        if not stack:
            found += blocks(part)
    return list(dict.fromkeys(found))


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a block whose activations are computed again wherever gradients are."""

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *inputs, **named)
        return checkpoint(kind.forward, self, *inputs, use_reentrant=False, **named)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
