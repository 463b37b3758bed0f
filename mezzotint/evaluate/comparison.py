"""A distance that can be read: with its floor (real against real at the same sizes) and an interval over images."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from mezzotint.errors import InputError
from mezzotint.evaluate.distances import Statistic

FEWEST = 8  # below this a half of the real images has no covariance worth the name


@dataclass(frozen=True, slots=True)
class Comparison:
    """The distance of other images from real ones, beside what two groups of real images show at the same sizes."""

    distance: float  # mean over random halves of the real images
    low: float  # distance -+ 1.96 bootstrap standard errors, whole images resampled
    high: float
    floor: float  # real against real: the distance that perfect images would show
    floor_low: float  # 2.5 and 97.5 percent of the floor over the splits
    floor_high: float
    group: int  # images on each painted or real side
    held: int  # real images that both were compared with

    def to_dict(self) -> dict[str, float]:
        """Plain data for reports."""
        return asdict(self)


def compare(
    statistic: Statistic, real: int, other: int, seed: int = 0, splits: int = 24, resamples: int = 100
) -> Comparison:
    """Compare pool images [real, real + other) with pool images [0, real).

    The real images are split at random into a group of m = min(other, real // 2) and the rest; the floor is the
    distance of that group from the rest, the distance that of m of the other images from the same rest. Both carry the
    same bias of a finite sample, so they may be read against each other. InputError for fewer than 8 images on a side.
    """
    if other < FEWEST or real < 2 * FEWEST:
        raise InputError(
            f"a distance needs at least {2 * FEWEST} real and {FEWEST} other images; got {real} and {other}"
        )
    rng = np.random.default_rng(seed)
    m = min(other, real // 2)
    distances, floors = [], []
    for _ in range(splits):
        order = rng.permutation(real)
        rest = order[m:]
        floors.append(statistic(order[:m], rest))
        distances.append(statistic(real + rng.permutation(other)[:m], rest))
    again = [statistic(real + rng.integers(other, size=m), rng.integers(real, size=real - m)) for _ in range(resamples)]
    distance, error = float(np.mean(distances)), 1.96 * float(np.std(again, ddof=1))
    low, high = np.quantile(floors, (0.025, 0.975))
    return Comparison(
        distance, distance - error, distance + error, float(np.mean(floors)), float(low), float(high), m, real - m
    )
