"""Latent consistency distillation (Luo et al. 2023; Song et al. 2023) as functions of tensors.

A consistency function maps every point of one trajectory of the teacher's probability-flow ODE to its clean end. It is
learned from neighbours: f(x, t_n+k) should equal f(x', t_n), where x' is one step of the teacher from t_n+k to t_n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import CLEAN, Level, Process, RectifiedFlow, prediction
from mezzotint.sampling import LCM
from mezzotint.sampling.spacing import LEADING, WHOLE, distilled, levels

FEW = range(1, 9)  # the numbers of steps that a distilled model is for


def ladder(process: Process, solver_steps: int, sampler: LCM, tokens: int | None = None) -> tuple[Level[float], ...]:
    """The levels of distillation, cleanest first; the teacher steps from each one to the one below it.

    A table of T timesteps: t_i = i T / solver_steps - 1, over t_0 = 0, the boundary (Luo 2023, section 4.3, with k = T
    / solver_steps). A flow: its shifted grid of `solver_steps` levels, and what `sampler` visits beside it in 1 to 8
    steps, over the clean image. InputError where `sampler` would visit levels of a table that are not among them.
    """
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        visited = [step.now for steps in FEW for step in sampler.path(process, steps, tokens=tokens).steps]
        grid = levels(process, solver_steps, LEADING, WHOLE, tokens)
        found = {round(level.sigma, 6): level for level in (*visited, *grid)}  # two grids may differ in the last digit
        return CLEAN, *(found[sigma] for sigma in sorted(found))
    total, taught = schedule.timesteps, sampler.original_steps
    if not 1 <= solver_steps <= total:
        raise InputError(f"lcm.solver_steps {solver_steps} cannot be placed on {total} timesteps: use 1 to {total}")
    times = {0.0, *distilled(total, solver_steps, solver_steps, solver_steps)}
    missing = sorted(set(distilled(total, taught, taught, taught)) - times)
    if missing:
        raise InputError(
            f"lcm.solver_steps {solver_steps} leaves out timestep {missing[0]:g}, which sampler 'lcm' visits:"
            f" use {taught} or a multiple of it that divides {total}"
        )
    return tuple(process.level(t) for t in sorted(times))


def rungs(ladder: Sequence[Level[float]], index: Tensor) -> Level[Tensor]:
    """The levels of a batch: index (B,) into the ladder; t (B,), alpha and sigma (B, 1, 1, 1), float32."""
    table = torch.tensor([(level.t, level.alpha, level.sigma) for level in ladder], device=index.device)  # (N, 3)
    t, alpha, sigma = table[index].unbind(1)
    return Level(t, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1))


def consistent(process: Process, raw: Tensor, x: Tensor, level: Level[Tensor], sampler: LCM) -> Tensor:
    """f(x, t) = c_skip(t) x + c_out(t) clean (Luo 2023, section 4.1), (B, C, h, w), as `sampler` computes it."""
    c_skip, c_out = (scaling.view(-1, 1, 1, 1) for scaling in sampler.scalings(level.t))
    return c_skip * x + c_out * prediction.estimate(process.prediction, raw, x, level).clean


def solved(process: Process, raw: Tensor, x: Tensor, now: Level[Tensor], next: Level[Tensor]) -> Tensor:
    """One DDIM step of the raw output from `now` to `next`: x' = alpha' clean + sigma' noise (Luo 2023, section 4.3).

    On a flow that is Euler's step, x' = x + (sigma' - sigma) raw.
    """
    parts = prediction.estimate(process.prediction, raw, x, now)
    return next.alpha * parts.clean + next.sigma * parts.noise


def huber(ours: Tensor, theirs: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c of the difference d (Song & Dhariwal 2023, section 3.3), element by element."""
    squared = (ours - theirs) ** 2
    return squared / ((squared + c * c).sqrt() + c)  # the same without the difference of two near numbers


def scales(low: float, high: float, count: int, rng: torch.Generator) -> Tensor:
    """Guidance scales (count,) uniform between the two (Luo 2023, section 4.2; theirs, w, is scale - 1)."""
    return low + (high - low) * torch.rand(count, generator=rng)
