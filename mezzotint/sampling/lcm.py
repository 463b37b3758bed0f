"""Latent consistency sampling (Luo 2023; Song 2023, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import CLEAN, Process, RectifiedFlow
from mezzotint.process.level import Number
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Step, entered
from mezzotint.sampling.spacing import LEADING, WHOLE, distilled, levels, paired


@dataclass(frozen=True, slots=True)
class LCM:
    """f(x, t) = c_skip x + c_out clean, noised afresh to the next level: x' = alpha' f + sigma' z.

    c_skip = d^2 / (s^2 + d^2), c_out = s / sqrt(s^2 + d^2), s = timestep_scaling * t, d = sigma_data: the boundary
    condition f(x, 0) = x (Luo 2023, section 4.1). Levels are chosen among the `original_steps` that the model was
    distilled on, from the cleanest up to the share `reach` of them.
    """

    original_steps: int = 50
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    reach: float = 1.0

    def scalings(self, t: Number) -> tuple[Number, Number]:
        """c_skip and c_out at t; distillation trains under the same two."""
        s, d = self.timestep_scaling * t, self.sigma_data
        norm: Any = (s * s + d * d) ** 0.5
        return d * d / (s * s + d * d), s / norm

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        taught = max(1, int(self.original_steps * self.reach))
        if not 1 <= steps <= taught:
            raise InputError(f"sampler 'lcm' cannot take {steps} steps here: use 1 to {taught}, as distilled")
        if isinstance(process.schedule, RectifiedFlow):
            # not a grid of `steps` levels: that ends near clean, so a model of two steps would draw in one
            grid = levels(process, self.original_steps, LEADING, WHOLE, tokens)[-taught:]
            visited = [grid[i * taught // steps] for i in range(steps)]
        else:
            chosen = distilled(process.schedule.timesteps, steps, self.original_steps, taught)
            visited = [process.level(t) for t in chosen]
        return entered(paired(visited, CLEAN), start)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        clean = denoise(x, step.now).clean
        c_skip, c_out = self.scalings(step.now.t)
        consistent = (c_skip * x).add_(clean, alpha=c_out)
        history.append(Moment(step.now, x, consistent))
        if step.next.sigma == 0.0:
            return consistent
        return (step.next.alpha * consistent).add_(rng(x), alpha=step.next.sigma)
