"""Names of weights: the same numbers have the same digest, however they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from mezzotint.files import sha256_json

if TYPE_CHECKING:
    from torch import Tensor, nn

SILENT = {"silent": True}  # metadata of a field of a configuration


def tensors_digest(tensors: Mapping[str, Tensor], done: Callable[[Tensor], None] = lambda tensor: None) -> str:
    """SHA-256 over names, shapes and values, sorted by name; `done` is told each tensor that was read.

    Floating values are hashed as float32, so weights stored in float16 or bfloat16 keep their digest when they are
    loaded in float32 (widening is exact); names and sharding of files do not matter. About 0.5-1.5 GB/s.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name].detach()
        tensor = stored.cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor.long()
        digest.update(f"{name}:{tuple(tensor.shape)}:".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        done(stored)
    return digest.hexdigest()


def module_digest(module: nn.Module, config: Any) -> str:
    """SHA-256 of a network as a function: its class, its settings and its tensors."""
    settings = {"class": type(module).__name__, "config": settings_of(config)}
    return sha256_json({**settings, "tensors": tensors_digest(module.state_dict())})


def settings_of(config: Any) -> dict[str, Any]:
    """Fields of a configuration dataclass that differ from their defaults: one added later changes no digest.

    Nor does a field marked SILENT, which says nothing about what the network computes.
    """
    telling = [f for f in fields(config) if f.metadata != SILENT]
    return {f.name: getattr(config, f.name) for f in telling if getattr(config, f.name) != _default(f)}


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
