"""The Gaussian transition that DDPM, DDIM, Euler, Euler ancestral and flow Euler share: one rule, five samplers."""

from __future__ import annotations

import math

from torch import Tensor

from mezzotint.process import Estimate
from mezzotint.sampling.path import Rng, Step


def deviation(step: Step) -> float:
    """Standard deviation of q(x_next | x_now, clean): sigma' sqrt(1 - r^2), r = (alpha sigma') / (alpha' sigma).

    On a variance-preserving process this is DDPM's beta~ (Ho 2020, eq. 7), DDIM's sigma at eta 1 (Song 2021, eq. 16) and Euler
    ancestral's sigma_up; r = exp(-h) is how far the log-SNR moves, and is 0 when now is pure noise.
    """
    now, next = step.now, step.next
    ratio = (now.alpha * next.sigma) / (next.alpha * now.sigma)
    return next.sigma * math.sqrt(max(0.0, 1.0 - ratio * ratio))


def transition(estimate: Estimate, step: Step, eta: float, rng: Rng) -> Tensor:
    """x' = alpha' clean + sqrt(sigma'^2 - d^2) noise + d z with d = eta * deviation (Song 2021, eq. 12)."""
    next, fresh = step.next, eta * deviation(step)
    if fresh == 0.0:
        return next.alpha * estimate.clean + next.sigma * estimate.noise
    kept = math.sqrt(max(0.0, next.sigma**2 - fresh**2))
    return (next.alpha * estimate.clean + kept * estimate.noise).add_(rng(estimate.clean), alpha=fresh)
