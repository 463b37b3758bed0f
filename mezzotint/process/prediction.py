"""What a raw network output means: the one hub of conversions between objectives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from mezzotint.process.level import Level


class Prediction(StrEnum):
    """The quantity a network was trained to give back."""

    EPSILON = "epsilon"  # the noise (Ho 2020)
    CLEAN = "clean"  # the image, x0
    VELOCITY = "velocity"  # v = alpha noise - sigma clean (Salimans 2022), needs alpha^2 + sigma^2 = 1
    FLOW = "flow"  # u = noise - clean (Lipman 2022), needs alpha + sigma = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """The two parts of x = alpha clean + sigma noise as the network sees them, each shaped like x."""

    clean: Tensor
    noise: Tensor


def estimate(prediction: Prediction, raw: Tensor, x: Tensor, level: Level[float] | Level[Tensor]) -> Estimate:
    """Both parts of x from the raw output; float32 whatever the backbone's dtype.

    epsilon: clean = (x - sigma raw) / alpha, so alpha must not be 0. clean: noise = (x - alpha raw) / sigma.
    velocity: clean = alpha x - sigma raw, noise = sigma x + alpha raw (Salimans 2022, appendix D).
    flow: clean = x - sigma raw, noise = x + alpha raw.
    """
    raw, x = raw.float() if raw.dtype.itemsize < 4 else raw, x.float() if x.dtype.itemsize < 4 else x
    alpha, sigma = level.alpha, level.sigma
    match prediction:
        case Prediction.EPSILON:
            return Estimate(clean=(x - sigma * raw) / alpha, noise=raw)
        case Prediction.CLEAN:
            return Estimate(clean=raw, noise=(x - alpha * raw) / sigma)
        case Prediction.VELOCITY:
            return Estimate(clean=alpha * x - sigma * raw, noise=sigma * x + alpha * raw)
        case Prediction.FLOW:
            return Estimate(clean=x - sigma * raw, noise=x + alpha * raw)


def target(prediction: Prediction, clean: Tensor, noise: Tensor, level: Level[float] | Level[Tensor]) -> Tensor:
    """What the network should have said for these two parts: the inverse of `estimate`."""
    match prediction:
        case Prediction.EPSILON:
            return noise
        case Prediction.CLEAN:
            return clean
        case Prediction.VELOCITY:
            return level.alpha * noise - level.sigma * clean
        case Prediction.FLOW:
            return noise - clean
