"""At which weight an adapter denoises the user's images best, alone and beside others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mezzotint.adapters import Adapter
from mezzotint.doctor import readings
from mezzotint.doctor.case import Case
from mezzotint.doctor.loras import changed
from mezzotint.doctor.readings import Reading, Score
from mezzotint.doctor.statistics import Mean

MULTIPLES = tuple(2.0**power for power in range(-7, 8))
LEVELS = readings.RATIOS[1::2]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
CLOSE = 1.5  # times that a factor may be from a usual one and still be called it
Weighted = Sequence[tuple[Adapter, float]]


def reading(case: Case, name: str, adapters: Weighted) -> Reading:
    """The claimed reading of the model with these adapters."""
    model = changed(case.bare, adapters)
    steering = case.steered(model, case.images.captions, case.images.labels)
    return Reading(name, case.bare.process, case.usable, steering, model)


def scored(case: Case, adapters: Weighted, count: int | None = None) -> Score:
    found = reading(case, "", [(adapter, weight) for adapter, weight in adapters if weight])
    return readings.score(case, found, LEVELS, count)


@dataclass(frozen=True, slots=True)
class Search:
    """What one adapter does at every multiple of the weight asked for."""

    curve: tuple[tuple[float, float], ...]  # (multiple, mean log error) on a few images
    none: Score
    asked: Score
    best: Score
    multiple: float  # where the best is, between the multiples tried
    tried: float  # the multiple that `best` is of

    @property
    def helps(self) -> Mean:
        """What the adapter gains as asked for, against none."""
        return self.asked.gain(self.none)

    @property
    def better(self) -> Mean:
        """What the best weight gains against the one asked for."""
        return self.best.gain(self.asked)

    @property
    def possible(self) -> Mean:
        """What the adapter gains at its best weight, against none."""
        return self.best.gain(self.none)


def search(case: Case, adapter: Adapter, weight: float) -> Search:
    """Every multiple on a few images, and none, the one asked for and the best of them on all."""
    few = min(readings.FIRST, len(case.usable))
    curve = [(k, scored(case, [(adapter, weight * k)], few).mean.value) for k in MULTIPLES]
    at = min(range(len(curve)), key=lambda i: curve[i][1])
    none, asked = scored(case, []), scored(case, [(adapter, weight)])
    tried = curve[at][0]
    best = asked if tried == 1.0 else scored(case, [(adapter, weight * tried)])
    return Search(tuple(curve), none, asked, best, _lowest(curve, at), tried)


def _lowest(curve: Sequence[tuple[float, float]], at: int) -> float:
    """The lowest point of the parabola through three neighbours, over the logarithm of the multiple."""
    if not 0 < at < len(curve) - 1:
        return curve[at][0]
    left, middle, right = (curve[i][1] for i in (at - 1, at, at + 1))
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
    return curve[at][0] * 2.0 ** max(-0.5, min(0.5, shift))


@dataclass(frozen=True, slots=True)
class Blend:
    """Several adapters together, each alone, and the best weights found for them."""

    none: Score
    alone: tuple[Score, ...]
    together: Score
    weights: tuple[float, ...]
    best: Score

    @property
    def better(self) -> int:
        """The adapter that does best alone."""
        return min(range(len(self.alone)), key=lambda i: self.alone[i].mean.value)


def blend(case: Case, adapters: Weighted) -> Blend:
    """All together as asked for against each alone, and a small grid of shares of their weights."""
    few = min(readings.FIRST, len(case.usable))
    none, together = scored(case, []), scored(case, adapters)
    alone = tuple(scored(case, [each]) for each in adapters)
    if len(adapters) == 2:
        grid = list(product(SHARES, repeat=2))
    else:  # of more, each share of all, and each one left out
        grid = [(share,) * len(adapters) for share in SHARES]
        grid += [tuple(float(i != j) for j in range(len(adapters))) for i in range(len(adapters))]
    tried = {
        shares: scored(case, [(a, w * s) for (a, w), s in zip(adapters, shares, strict=True)], few).mean.value
        for shares in grid
    }
    shares = min(tried, key=lambda each: tried[each])
    weights = tuple(weight * share for (_, weight), share in zip(adapters, shares, strict=True))
    best = scored(case, [(adapter, weight) for (adapter, _), weight in zip(adapters, weights, strict=True)])
    return Blend(none, alone, together, weights, best)


def mistake(multiple: float, rank: int, alpha: float) -> str:
    """Which usual mistakes a factor is that the strength is wrong by, or nothing."""
    root = rank**0.5
    usual = {
        "the rank": rank, "1 over the rank": 1 / rank, "alpha / rank": alpha / rank, "rank / alpha": rank / alpha,
        "the square root of the rank": root, "1 over the square root of the rank": 1 / root, "alpha": alpha,
        "1 over alpha": 1 / alpha,
    } if alpha > 0 else {}  # fmt: skip
    off = {name: abs(math.log(value / multiple)) for name, value in usual.items() if max(value, 1 / value) > CLOSE}
    least = min(off.values(), default=math.inf)
    if least >= math.log(CLOSE):
        return ""
    names = [name for name, each in off.items() if each < least + 0.01]
    return f"{' or '.join(names)} ({usual[names[0]]:.3g})"
