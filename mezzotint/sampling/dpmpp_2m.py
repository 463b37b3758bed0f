"""DPM-Solver++ (2M) and its SDE form (Lu 2022, "DPM-Solver++")."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import Process, RectifiedFlow
from mezzotint.process.level import half_log_snr
from mezzotint.sampling.gaussian import checked, kept_ratio
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Step, entered
from mezzotint.sampling.spacing import DPM, LINSPACE, Spacing, final, finite_start, levels, paired


@dataclass(frozen=True, slots=True)
class DPMpp2M:
    """Second-order multistep in h = lambda' - lambda, lambda = log(alpha / sigma), on the clean estimate (algorithm 2).

    x' = (sigma'/sigma) r^eta x + alpha' (1 - r^(1 + eta)) D + sigma' sqrt(1 - r^(2 eta)) z with r = e^-h and
    D = clean + h / (2 h_before) (clean - clean_before): the ODE at eta 0, the SDE (section 6) at eta 1. The last step
    is of first order, D = clean, if it ends clean or, with `lower_order_final`, on a path of fewer than 15 steps.
    """

    eta: float = 0.0
    spacing: Spacing = LINSPACE
    last: str = "clean"
    solver_order: int = 2
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        checked(self.eta)
        if self.solver_order not in (1, 2):
            raise InputError(f"sampler 'dpmpp_2m' has no solver order {self.solver_order}: use 1 or 2")

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        visited = levels(process, steps, self.spacing, DPM, tokens)
        if not isinstance(process.schedule, RectifiedFlow):
            visited = finite_start(visited)
        walk = paired(visited, final(process, self.last))
        gentle = walk[-1].next.sigma == 0.0 or (self.lower_order_final and steps < 15)
        orders = [self.solver_order] * (steps - 1) + [1 if gentle else self.solver_order]
        return entered([replace(step, order=order) for step, order in zip(walk, orders, strict=True)], start)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        now, next = step.now, step.next
        clean = denoise(x, now).clean
        history.append(Moment(now, x, clean))
        direction = clean
        if step.order == 2 and len(history) > 1:
            before = history[-2]
            h, h_before = half_log_snr(next) - half_log_snr(now), half_log_snr(now) - half_log_snr(before.level)
            direction = clean + (clean - before.clean) * (0.5 * h / h_before)
        r = kept_ratio(step)
        kept = r**self.eta
        x = (x * (next.sigma / now.sigma * kept)).add_(direction, alpha=next.alpha * (1.0 - r * kept))
        fresh = next.sigma * math.sqrt(1.0 - kept * kept)
        return x.add_(rng(x), alpha=fresh) if fresh > 0.0 else x
