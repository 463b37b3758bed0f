"""From tensors to a network: built without memory, filled in place, nothing missing and nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mezzotint.errors import InputError

Network = TypeVar("Network", bound=nn.Module)


def fill(build: Callable[[], Network], tensors: Mapping[str, Tensor], dtype: torch.dtype, at: Path) -> Network:
    """Build a network on the meta device and put the tensors in place, as `dtype`, in evaluation mode.

    Weights already in `dtype` are not copied. InputError lists missing, unexpected and misshapen tensors briefly.
    """
    try:
        with torch.device("meta"):
            network = build()
    except (InputError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise InputError(f"{at}: no network can be built from its configuration: {error}") from error
    expected = network.state_dict()
    problems = [
        _listing("missing", sorted(expected.keys() - tensors.keys())),
        _listing("unexpected", sorted(tensors.keys() - expected.keys())),
        _listing("of another shape", _misshapen(expected, tensors)),
    ]
    if any(problems):
        raise InputError(f"{at} does not fit its configuration: {'; '.join(p for p in problems if p)}")
    ready = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    network.load_state_dict(ready, strict=True, assign=True)
    adrift = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if adrift:  # a buffer outside the state dict must be computed in forward, or it would be garbage here
        raise ValueError(f"{type(network).__name__} keeps non-persistent buffers: {adrift}")
    return network.eval().requires_grad_(False)


def configure(config: Any, settings: Mapping[str, Any], at: Path) -> Any:
    """A network's configuration (a dataclass with `from_config`) from JSON data; InputError names the file `at`."""
    try:
        return config.from_config(settings)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{at}: {error}") from error


def _misshapen(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    both = sorted(expected.keys() & tensors.keys())
    return [
        f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}"
        for name in both
        if tensors[name].shape != expected[name].shape
    ]


def _listing(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{more})" if names else ""
