"""A level of noise: three numbers, the boundary between training and sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True, slots=True)
class Level(Generic[Number]):
    """x = alpha * clean + sigma * noise, and `t` is what the network is told.

    Python floats while sampling; in training tensors, t (B,) and alpha, sigma (B, 1, 1, 1).
    """

    t: Number
    alpha: Number
    sigma: Number


CLEAN: Level[float] = Level(0.0, 1.0, 0.0)


def from_ratio(t: float, ratio: float) -> Level[float]:
    """The variance-preserving level (alpha^2 + sigma^2 = 1) at sigma / alpha = ratio, EDM's sigma (Karras 2022)."""
    alpha = 1.0 / math.hypot(1.0, ratio)
    return Level(t, alpha, ratio * alpha)


def half_log_snr(level: Level[float]) -> float:
    """lambda = log(alpha / sigma) (DPM-Solver, Lu 2022, section 2.2), infinite at either end."""
    if level.alpha <= 0.0:
        return -math.inf
    if level.sigma <= 0.0:
        return math.inf
    return math.log(level.alpha) - math.log(level.sigma)
