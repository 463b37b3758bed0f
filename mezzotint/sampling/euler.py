"""Euler, Euler ancestral (Karras 2022, alg. 1; k-diffusion) and Euler on a rectified flow (Liu 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import CLEAN, Process, RectifiedFlow
from mezzotint.sampling.gaussian import checked, transition
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Step, entered
from mezzotint.sampling.spacing import FRACTIONAL, LINSPACE, Spacing, levels, paired


@dataclass(frozen=True, slots=True)
class Euler:
    """x / alpha follows noise = d(x / alpha) / d(sigma / alpha): x' = alpha' clean + sigma' noise; ancestral at eta 1.

    On a flow this is x' = x + (sigma' - sigma)(noise - clean). Start noise has the deviation sigma of the first level,
    not 1, under linspace and trailing spacing.
    """

    eta: float = 0.0
    spacing: Spacing = LINSPACE

    def __post_init__(self) -> None:
        checked(self.eta)

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        visited = levels(process, steps, self.spacing, FRACTIONAL, tokens)
        scale = 1.0 if self.spacing.rule == "leading" else visited[0].sigma
        return entered(paired(visited, CLEAN), start, scale)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        estimate = denoise(x, step.now)
        history.append(Moment(step.now, x, estimate.clean))
        return transition(estimate, step, self.eta, rng)


@dataclass(frozen=True, slots=True)
class FlowEuler:
    """x' = x + (sigma' - sigma)(noise - clean), the same rule once more, for rectified flows alone.

    Refuses other schedules, so that a flow's name never stands for another method.
    """

    spacing: Spacing = LINSPACE

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        if not isinstance(process.schedule, RectifiedFlow):
            raise InputError(f"sampler 'flow_euler' cannot serve schedule '{process.schedule.name}': use 'euler'")
        return entered(paired(levels(process, steps, self.spacing, FRACTIONAL, tokens), CLEAN), start)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        estimate = denoise(x, step.now)
        history.append(Moment(step.now, x, estimate.clean))
        return transition(estimate, step, 0.0, rng)
