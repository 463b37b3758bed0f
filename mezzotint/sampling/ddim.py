"""DDIM (Song, Meng, Ermon 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mezzotint.process import Process, RectifiedFlow
from mezzotint.sampling.gaussian import checked, transition
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Step, entered
from mezzotint.sampling.spacing import LEADING, WHOLE, Spacing, final, levels, paired


@dataclass(frozen=True, slots=True)
class DDIM:
    """x' = alpha' clean + sqrt(sigma'^2 - d^2) noise + d z (eq. 12), d = eta times eq. 16; DDPM at eta 1.

    `last` is the level after the final step: `clean`, or `lowest` for files that say set_alpha_to_one false.
    """

    eta: float = 0.0
    spacing: Spacing = LEADING
    last: str = "clean"

    def __post_init__(self) -> None:
        checked(self.eta)

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        visited = levels(process, steps, self.spacing, WHOLE, tokens)
        last = final(process, self.last)
        if isinstance(process.schedule, RectifiedFlow) or self.spacing.ramp != "none":
            return entered(paired(visited, last), start)
        # DDIM steps to t - T // n, which need not be the next listed timestep.
        stride = process.schedule.timesteps // steps
        ends = [round(now.t / process.schedule.tick) - stride for now in visited]
        steps_taken = [Step(now, process.level(t) if t >= 0 else last) for now, t in zip(visited, ends, strict=True)]
        return entered(steps_taken, start)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        estimate = denoise(x, step.now)
        history.append(Moment(step.now, x, estimate.clean))
        return transition(estimate, step, self.eta, rng)
