"""What a raw network output means: the one hub of conversions between objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """The two parts of x = alpha clean + sigma noise as the network sees them, each shaped like x.

    `variance` is the network's own word on the posterior's variance, where it was trained to give one: -1 says beta~,
    1 says beta, and between them the logarithm is linear (Nichol 2021, eq. 15, with v from 0 to 1).
    """

    clean: Tensor
    noise: Tensor
    variance: Tensor | None = None


def split(raw: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction (B, C, h, w) and, where the network gives 2 C channels, the variance v, else None.

    Guidance mixes predictions alone; the variance that reaches the sampler is the conditional branch's.
    """
    return (raw, None) if raw.shape[1] == channels else (raw[:, :channels], raw[:, channels:])


def clipped(
    parts: Estimate, bound: float, x: Tensor, level: Level[float] | Level[Tensor], noise_follows: bool
) -> Estimate:
    """The clean part kept within +-bound; the noise stays as predicted, or follows as (x - alpha clean) / sigma."""
    clean = parts.clean.clamp(-bound, bound)
    return replace(parts, clean=clean, noise=(x - level.alpha * clean) / level.sigma if noise_follows else parts.noise)


def estimate(
    prediction: Prediction, raw: Tensor, x: Tensor, level: Level[float] | Level[Tensor], variance: Tensor | None = None
) -> Estimate:
    """Both parts of x from the raw output, and `variance` beside them; float32 whatever the backbone's dtype.

    epsilon: clean = (x - sigma raw) / alpha, so alpha must not be 0. clean: noise = (x - alpha raw) / sigma.
    velocity: clean = alpha x - sigma raw, noise = sigma x + alpha raw (Salimans 2022, appendix D).
    flow: clean = x - sigma raw, noise = x + alpha raw.
    """
    raw, x = raw.float() if raw.dtype.itemsize < 4 else raw, x.float() if x.dtype.itemsize < 4 else x
    variance = None if variance is None else variance.to(x.dtype)
    alpha, sigma = level.alpha, level.sigma
    match prediction:
        case Prediction.EPSILON:
            return Estimate((x - sigma * raw) / alpha, raw, variance)
        case Prediction.CLEAN:
            return Estimate(raw, (x - alpha * raw) / sigma, variance)
        case Prediction.VELOCITY:
            return Estimate(alpha * x - sigma * raw, sigma * x + alpha * raw, variance)
        case Prediction.FLOW:
            return Estimate(x - sigma * raw, x + alpha * raw, variance)


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
