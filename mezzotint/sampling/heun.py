"""Heun's second-order method (Karras 2022, algorithm 1, without churn)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mezzotint.process import CLEAN, Level, Process
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Step, entered
from mezzotint.sampling.spacing import FRACTIONAL, LINSPACE, Spacing, levels, paired


@dataclass(frozen=True, slots=True)
class Heun:
    """An Euler step, then the mean of both ends' slopes: n levels cost 2n - 1 evaluations, the last step being Euler's.

    The slope is the paper's d_i, d(x / alpha) / d(sigma / alpha) = noise. On a rectified flow, and from pure noise
    where x / alpha has no value, it is d(x / k) / d(sigma / k) = noise - clean with k = alpha + sigma.
    """

    spacing: Spacing = LINSPACE

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        visited = levels(process, steps, self.spacing, FRACTIONAL, tokens)
        scale = 1.0 if self.spacing.rule == "leading" else visited[0].sigma
        return entered(paired(visited, CLEAN), start, scale)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        now, next = step.now, step.next
        here = denoise(x, now)
        history.append(Moment(now, x, here.clean))
        ahead = (next.alpha * here.clean).add_(here.noise, alpha=next.sigma)
        if next.sigma == 0.0:
            return ahead
        there = denoise(ahead, next)
        bend = there.noise - here.noise
        if straight(now):
            reach = next.sigma - now.sigma * (next.alpha + next.sigma) / (now.alpha + now.sigma)
            return ahead.add_(bend - (there.clean - here.clean), alpha=0.5 * reach)
        return ahead.add_(bend, alpha=0.5 * (next.sigma - now.sigma * next.alpha / now.alpha))


def straight(level: Level[float]) -> bool:
    """alpha + sigma = 1: on a rectified flow everywhere, on a variance-preserving process at pure noise alone."""
    return math.isclose(level.alpha + level.sigma, 1.0, abs_tol=1e-9)
