"""DDPM's ancestral sampling (Ho, Jain, Abbeel 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mezzotint.process import CLEAN, Process
from mezzotint.sampling.gaussian import transition
from mezzotint.sampling.path import Denoise, Moment, Path, Rng, Step, entered
from mezzotint.sampling.spacing import LEADING, WHOLE, Spacing, chosen, levels, paired


@dataclass(frozen=True, slots=True)
class DDPM:
    """x' ~ q(x' | x, clean), the posterior (eq. 6, 7), along the listed timesteps: the Gaussian transition at eta 1.

    `variance` small is beta~ = sigma'^2 (1 - r^2), the posterior's own; large is beta = sigma^2 (1 - r^2), which Ho's
    CIFAR-10 model uses (section 3.2). A network that gives its own variance v overrules it: log sigma_q^2 =
    u log beta + (1 - u) log beta~, u = (v + 1) / 2 (Nichol 2021, eq. 15), so sigma_q is d (sigma / sigma')^u with
    d^2 = beta~. All end without noise. Between timesteps that are not neighbours both betas follow from alpha_bar.
    """

    variance: str = "small"
    spacing: Spacing = LEADING

    def path(self, process: Process, steps: int, start: int = 0, tokens: int | None = None) -> Path:
        return entered(paired(levels(process, steps, self.spacing, WHOLE, tokens), CLEAN), start)

    def step(self, denoise: Denoise, x: Tensor, step: Step, history: list[Moment], rng: Rng) -> Tensor:
        estimate = denoise(x, step.now)
        history.append(Moment(step.now, x, estimate.clean))
        share: float | Tensor = chosen({"small": 0.0, "large": 1.0}, self.variance, "variance")
        if estimate.variance is not None:
            share = 0.5 * (estimate.variance + 1.0)
        widest = step.now.sigma / step.next.sigma if step.next.sigma > 0.0 else 1.0
        return transition(estimate, step, 1.0, rng, widest**share)
