"""The nouns of sampling: a path of (now, next) levels, what a step leaves behind, and what a sampler is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import Estimate, Level, Process

Denoise = Callable[[Tensor, Level[float]], Estimate]  # (x, level) -> both parts of x
Rng = Callable[[Tensor], Tensor]  # draws standard normal noise shaped like its argument

MEMORY = 3  # moments kept in the history: as many as the longest multistep solver looks back


@dataclass(frozen=True, slots=True)
class Step:
    """From one level to a cleaner one; `order` is the highest that a multistep solver may use here."""

    now: Level[float]
    next: Level[float]
    order: int = 1


@dataclass(frozen=True, slots=True)
class Path:
    """The steps still to take, and what unit start noise is multiplied with before the first one."""

    steps: tuple[Step, ...]
    start_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Moment:
    """What a step leaves in the history: where it was, x there, the clean estimate, and the order it was taken with."""

    level: Level[float]
    x: Tensor
    clean: Tensor
    order: int = 1


class Sampler(Protocol):
    """A frozen set of options with two functions and no state: any number of runs may share one."""

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        """A path of `steps` steps entered at index `start`; `tokens` counts image tokens if a shift needs them."""
        ...

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        """x at step.next from x at step.now; leaves one Moment in the history."""
        ...


def entered(steps: list[Step], start: int, start_scale: float = 1.0) -> Path:
    """The path from index `start` on; an image noised to that level is given unscaled."""
    if not 0 <= start < len(steps):
        raise InputError(f"start index {start} is outside the path of {len(steps)} steps: use 0 to {len(steps) - 1}")
    return Path(tuple(steps[start:]), start_scale if start == 0 else 1.0)
