"""The Gaussian transition that DDPM, DDIM, Euler, Euler ancestral and flow Euler share: one rule, five samplers."""

from __future__ import annotations

import math

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import Estimate
from mezzotint.sampling.path import Rng, Step


def kept_ratio(step: Step) -> float:
    """r = (alpha sigma') / (alpha' sigma) = e^-h, h the gain in log(alpha / sigma); 0 from pure noise or to clean."""
    return (step.now.alpha * step.next.sigma) / (step.next.alpha * step.now.sigma)


def checked(eta: float) -> None:
    """eta scales fresh noise between none (0) and all that the posterior has (1)."""
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta {eta:g} is not inside 0..1: 0 is deterministic, 1 draws the posterior's whole noise")


def transition(estimate: Estimate, step: Step, eta: float, rng: Rng, widen: float | Tensor = 1.0) -> Tensor:
    """x' = alpha' clean + sqrt(sigma'^2 - d^2) noise + d z (Song 2021, eq. 12) with d = eta sigma' sqrt(1 - r^2).

    At eta 1, d^2 is the variance of q(x' | x, clean): DDPM's beta~ (Ho 2020, eq. 7), DDIM's sigma^2 (eq. 16) and Euler
    ancestral's sigma_up^2. `widen` multiplies z alone.
    """
    next, r = step.next, kept_ratio(step)
    d = eta * next.sigma * math.sqrt(max(0.0, 1.0 - r * r))
    mean = next.alpha * estimate.clean
    if d == 0.0:
        return mean.add_(estimate.noise, alpha=next.sigma)
    mean.add_(estimate.noise, alpha=math.sqrt(max(0.0, next.sigma**2 - d * d)))
    if isinstance(widen, Tensor):
        return mean.add_(rng(mean) * widen, alpha=d)
    return mean.add_(rng(mean), alpha=d * widen)
