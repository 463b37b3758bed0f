"""What to paint on what: every image of a set follows from the seed, its number and the good images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mezzotint.synthesis import classes
from mezzotint.synthesis.recipe import Recipe
from mezzotint.synthesis.sources import Source


@dataclass(frozen=True, slots=True)
class Task:
    """One image to paint: everything but its mask, which follows from the seed."""

    index: int
    source: Source
    target: classes.Class
    seed: int  # of the noise and, with the index, of the mask

    @property
    def name(self) -> str:
        return f"{self.index:06d}"


def tasks(plan: Recipe, good: Sequence[Source], known: Sequence[classes.Class]) -> list[Task]:
    """What to paint on what: every good image in turn, in an order drawn from the seed, kinds of defect in turn.

    Task i depends on the seed, on i and on the good images alone: a larger count goes on where a smaller one ended.
    """
    kinds = classes.defects(known, plan.kinds)
    order = np.random.default_rng(plan.seed).permutation(len(good)).tolist()
    found: list[Task] = []
    for i in range(plan.count):
        source = good[order[i % len(good)]]
        kind = kinds[(i + i // len(good)) % len(kinds)]
        seed = int(np.random.default_rng((plan.seed, i)).integers(2**31))
        found.append(Task(i, source, classes.of(known, source.type, kind), seed))
    return found
