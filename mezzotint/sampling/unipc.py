"""UniPC, a unified predictor-corrector (Zhao 2023), in its B2 form on the clean estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import Level, Process
from mezzotint.process.level import half_log_snr
from mezzotint.sampling.path import MEMORY, Denoise, Moment, Path, Rng, Step, entered
from mezzotint.sampling.spacing import LINSPACE, UNIPC, Spacing, final, finite_start, levels, paired

Node = tuple[Level[float], Tensor]  # a level and the clean estimate there


@dataclass(frozen=True, slots=True)
class UniPC:
    """Each evaluation corrects the step that led to it (UniC, alg. 1), then predicts the next (UniP, alg. 2): n calls.

    Near the end the order falls to the steps that are left.
    """

    spacing: Spacing = LINSPACE
    last: str = "clean"
    solver_order: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.solver_order <= MEMORY:
            raise InputError(f"sampler 'unipc' has no solver order {self.solver_order}: use 1 to {MEMORY}")

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        visited = finite_start(levels(process, steps, self.spacing, UNIPC, tokens))
        walk = paired(visited, final(process, self.last))
        return entered([replace(s, order=min(self.solver_order, steps - i)) for i, s in enumerate(walk)], start)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        clean = denoise(x, step.now).clean
        if history:
            x = advance(history[-1], step.now, [*behind(history), (step.now, clean)])
        order = min(step.order, 1 + (history[-1].order if history else 0))
        history.append(Moment(step.now, x, clean, order))
        return advance(history[-1], step.next, behind(history))


def behind(history: list[Moment]) -> list[Node]:
    """The order - 1 points before the last moment, nearest first."""
    return [(past.level, past.clean) for past in history[-2 : -history[-1].order - 1 : -1]]


def advance(origin: Moment, next: Level[float], nodes: Sequence[Node]) -> Tensor:
    """x' = (sigma'/sigma) x - alpha' (e^-h - 1)(m + sum_k rho_k (m_k - m) / r_k), r_k = (lambda_k - lambda) / h."""
    now, here = origin.level, half_log_snr(origin.level)
    h = half_log_snr(next) - here
    scale = -next.alpha * math.expm1(-h)
    r = [(half_log_snr(level) - here) / h for level, _ in nodes]
    x = (next.sigma / now.sigma * origin.x).add_(origin.clean, alpha=scale)
    for (_, clean), r_k, rho in zip(nodes, r, weights(r, h), strict=True):
        x.add_(clean - origin.clean, alpha=scale * rho / r_k)
    return x


def weights(r: Sequence[float], h: float) -> list[float]:
    """rho with sum_k rho_k r_k^(i-1) = i! h^i phi_(i+1) / B (theorem 3.1), B = e^-h - 1; 1/2 for one node."""
    if len(r) < 2:
        return [0.5] * len(r)
    right: list[float] = []
    phi = math.expm1(-h) / -h - 1.0  # h^i phi_(i+1) by its recursion
    for i in range(1, len(r) + 1):
        right.append(phi * math.factorial(i) / math.expm1(-h))
        phi = phi / -h - 1.0 / math.factorial(i + 1)
    return vandermonde(r, right)


def vandermonde(r: Sequence[float], right: list[float]) -> list[float]:
    """rho with sum_k rho_k r_k^i = right_i for i from 0 (Bjorck and Pereyra 1970), in plain floats."""
    n, rho = len(r), list(right)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            rho[i] -= r[k] * rho[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            rho[i] /= r[i] - r[i - k - 1]
        for i in range(k, n - 1):
            rho[i] -= rho[i + 1]
    return rho
