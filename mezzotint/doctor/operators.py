"""A step by operator: where its time goes and how many operations it is, by kind of layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.doctor.clock import Act, settled
from mezzotint.layers.operators import KINDS, kind_of


@dataclass(frozen=True, slots=True)
class Operators:
    """A run by operator: seconds and number of calls by kind, and the shapes that attention by hand and convolutions
    have."""

    seconds: dict[str, float]
    calls: int
    softmaxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # queries (B, N, d), keys (B, d, M) before a softmax
    attended: tuple[tuple[int, ...], ...]  # queries (B, heads, N, d) of fused attention
    convolved: tuple[tuple[int, int], ...]  # channels and side of each convolution

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def timed(act: Act, device: torch.device | str) -> Operators:
    """One run by operator. What lies between operators is Python's; of that the wrapping here takes its own part from
    the outside, so it is told rather too small."""
    clock = _OperatorClock(torch.device(device))
    with torch.inference_mode(), clock:
        act()
    seconds = {kind: clock.seconds.get(kind, 0.0) for kind in KINDS}
    if not clock.softmaxes:  # products of two activations that no softmax follows are no attention
        seconds["linear"] += clock.products
    else:
        seconds["attention"] += clock.products
    found = tuple(clock.softmaxes), tuple(clock.attended), tuple(clock.convolved)
    return Operators(seconds, clock.calls, *found)


class _OperatorClock(TorchDispatchMode):
    """Adds up the time of every operator under its kind."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.products = 0.0
        self.calls = 0
        self.softmaxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.attended: list[tuple[int, ...]] = []
        self.convolved: list[tuple[int, int]] = []
        self.product: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inference mode leaves composite operators whole
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        out: list[Any] = []
        spent = settled(lambda: out.append(func(*args, **kwargs)), self.device)
        name = func.overloadpacket.__name__
        self.calls += 1
        if name == "bmm":
            self.product, self.products = (tuple(args[0].shape), tuple(args[1].shape)), self.products + spent
        else:
            self.seconds[kind_of(name)] += spent
        if "softmax" in name and self.product is not None:
            self.softmaxes.append(self.product)
            self.product = None
        elif "scaled_dot_product" in name:
            self.attended.append(tuple(args[0].shape))
        elif name == "convolution" and args[1].ndim == 4 and args[1].shape[-1] > 1:
            self.convolved.append((int(args[1].shape[0]), int(args[0].shape[-1])))
        return out[0]


def flops(act: Act) -> dict[str, float]:
    """Floating-point operations of one run by kind, a multiplication and an addition counting two."""
    with torch.inference_mode(), FlopCounterMode(display=False) as run:
        act()
    found: dict[str, float] = defaultdict(float)
    for operator, count in run.get_flop_counts().get("Global", {}).items():
        found["attention" if operator is torch.ops.aten.bmm else kind_of(operator.__name__)] += float(count)
    return dict(found)
