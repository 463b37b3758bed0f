"""Machines: how quickly one does each kind of operator, measured or from a table of public figures."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mezzotint.errors import InputError
from mezzotint.plan.accelerators import ACCELERATORS, SHARES, Accelerator
from mezzotint.plan.operators import Call

CPU_BASE = 16 * 2**20  # bytes: what the libraries take at their first use (measured)
ACCELERATOR_BASE = 700 * 2**20  # bytes: context, libraries and kernels on an accelerator, about


@dataclass(frozen=True, slots=True)
class Point:
    """One measured kernel: its sizes as in `Call.shape`, and what it reached."""

    shape: tuple[int, ...]
    rate: float  # floating-point operations a second; of what only moves numbers, bytes


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine. Rates are by dtype and by kind of kernel."""

    name: str
    kind: str  # cpu or accelerator
    memory: float | None  # bytes
    points: Mapping[str, Mapping[str, Sequence[Point]]]  # dtype: kernel: what was measured
    overhead: float  # seconds that a call takes at least
    base: float = 0.0  # bytes that are taken before anything is loaded
    source: str = ""  # where the figures come from
    measured: bool = False
    whole: Mapping[str, float] = field(default_factory=dict[str, float])  # networks over their kernels, by way

    def seconds(self, calls: Mapping[Call, float]) -> float | None:
        """The time of a run's calls, one after the other; None where the machine's speed is not known."""
        if not self.points:
            return None
        return sum(self.by_kind(calls).values())

    def share(self, calls: Mapping[Call, float]) -> float:
        """How many times as long a whole run takes as its calls apart, as measured; 1 where that was not."""
        return self.whole.get("backward" if any(call.backward for call in calls) else "forward", 1.0)

    def by_kind(self, calls: Mapping[Call, float]) -> dict[str, float]:
        """The same by kind of operator, the largest first."""
        found: dict[str, float] = {}
        share = self.share(calls)
        for call, count in calls.items():
            times = count if call.kind == "update" else share * count  # passes over all weights, apart from networks
            found[call.kind] = found.get(call.kind, 0.0) + times * self.call(call)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def call(self, call: Call) -> float:
        """One call: its operations or its bytes at the rate measured for its like, never less than the overhead."""
        kernel = _kernel(call)
        points = self._points(call.dtype, call.name, kernel)
        if call.flops and kernel in COMPUTING:
            return self.overhead + call.flops / _nearby(points, call.shape)
        return self.overhead + call.bytes / _nearby(points, (max(int(call.bytes), 1),))

    def _points(self, dtype: str, name: str, kernel: str) -> Sequence[Point]:
        rates = self.points.get("float32" if dtype == "float64" else dtype)  # small tables alone are in float64
        if rates is None:
            raise InputError(
                f"{self.name} has no figures for {dtype}: it has {', '.join(self.points)}. Choose one with --dtype."
            )
        return rates.get(name) or rates.get(kernel) or rates["copying"]


COMPUTING = ("convolution", "convolution_backward", "attention", "attention_backward", "linear")
MOVING = ("norm", "activation", "copying", "other")


def _kernel(call: Call) -> str:
    """The kernel whose rate holds for a call: linear layers and what only moves numbers go back as they go forth."""
    name = f"{call.kind}_backward"
    return name if call.backward and name in COMPUTING else call.kind


def _nearby(points: Sequence[Point], shape: tuple[int, ...]) -> float:
    """The rate at some sizes: the logarithms of measured rates, weighed by the inverse square of how far their sizes
    are, in logarithms too (Shepard 1968)."""
    place = [math.log2(max(size, 1)) for size in shape]
    total = weight = 0.0
    for point in points:
        far = sum((math.log2(max(size, 1)) - mine) ** 2 for size, mine in zip(point.shape, place, strict=False))
        near = 1.0 / (far + 0.05)
        near *= near
        total, weight = total + near * math.log(point.rate), weight + near
    return math.exp(total / weight)


def accelerator(name: str) -> Machine:
    """A public accelerator by its name; InputError lists the known ones and the nearest."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in ACCELERATORS:
        near = difflib.get_close_matches(key, ACCELERATORS, n=1, cutoff=0.5)
        meant = f" (did you mean '{near[0]}'?)" if near else ""
        raise InputError(f"no device '{name}' is known{meant}: cpu, or one of {', '.join(ACCELERATORS)}")
    return _tabled(key, ACCELERATORS[key])


def _tabled(name: str, card: Accelerator) -> Machine:
    """An estimate: published peaks times the share that large kernels reach, and bandwidth times its share."""
    points: dict[str, dict[str, list[Point]]] = {}
    for dtype, peak in card.flops.items():
        points[dtype] = {kernel: [Point((1,), peak * SHARES[kernel])] for kernel in COMPUTING}
        points[dtype] |= {kernel: [Point((1,), card.bandwidth * SHARES["bandwidth"])] for kernel in MOVING}
    return Machine(
        name, "accelerator", card.memory, points, 6e-6, ACCELERATOR_BASE, f"estimate from {card.source}", False
    )
