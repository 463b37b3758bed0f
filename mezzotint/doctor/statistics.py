"""Means with intervals, and paired comparisons over images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over n images or draws with its standard error."""

    value: float
    error: float
    n: int

    @property
    def low(self) -> float:
        return self.value - quantile(self.n - 1) * self.error

    @property
    def high(self) -> float:
        return self.value + quantile(self.n - 1) * self.error

    @property
    def deviations(self) -> float:
        """How many standard errors the mean is from 0."""
        return self.value / self.error if self.error > 0 else math.inf * self.value if self.value else 0.0


def mean(values: Tensor) -> Mean:
    """Mean and standard error of (N,); of one value the error is infinite."""
    values = values.double().flatten()
    n = len(values)
    return Mean(float(values.mean()), float(values.std() / n**0.5) if n > 1 else math.inf, n)


def ratio(above: Tensor, below: Tensor) -> Mean:
    """sum / sum with the standard error of a ratio of means (delta method)."""
    value = float(above.sum() / below.sum().clamp(min=1e-12))
    residual = (above - value * below) / below.mean().clamp(min=1e-12)
    spread = mean(residual)
    return Mean(value, spread.error, len(above))


def deviations(above: Tensor, below: Tensor) -> Mean:
    """How many times as far (N, ...) lie about their mean as (M, ...) do about theirs, and the error of it."""
    energies = [((part.double() - part.double().mean()) ** 2).flatten(1).mean(1) for part in (above, below)]
    a, b = (mean(each) for each in energies)
    value = math.sqrt(a.value / max(b.value, 1e-12))
    error = value / 2 * math.hypot(a.error / max(a.value, 1e-12), b.error / max(b.value, 1e-12))
    return Mean(value, error, min(a.n, b.n))


def quantile(freedom: int) -> float:
    """Student's t at 97.5 % (Abramowitz & Stegun 26.7.5, good to a percent from 3 degrees of freedom on)."""
    z = 1.959964
    if freedom < 1:
        return math.inf
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


def diversity(drawn: Tensor, data: Tensor) -> Mean:
    """Variance of M drawn latents over that of the data, with the jackknife's error over what is drawn.

    It is the mean squared distance of pairs over that of pairs of the data: sum_i |x_i - x_j|^2 / 2 = variance.
    """
    x, count = drawn.flatten(1).double(), len(drawn)
    reference = data.flatten(1).double().var(0).sum()
    without = torch.stack([torch.cat([x[:i], x[i + 1 :]]).var(0).sum() / reference for i in range(count)])
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return Mean(float(x.var(0).sum() / reference), float(error), count)
