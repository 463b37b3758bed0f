"""Classifier-free guidance on raw network outputs, with rescale and interval.

Raw outputs and not clean estimates are mixed: rescale's ratio of deviations is not affine, so elsewhere it gives
another result.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mezzotint.errors import InputError


@dataclass(frozen=True, slots=True)
class Guidance:
    """`scale` 1 is no guidance; `rescale` 0..1 brings back the conditional deviation; `interval` says where it acts."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise InputError(
                f"guidance interval {low:g}..{high:g} is not inside 0..1: give fractions of the path, low first"
            )
        if not 0.0 <= self.rescale <= 1.0:
            raise InputError(f"guidance rescale {self.rescale:g} is not inside 0..1")

    def active(self, progress: float) -> bool:
        """Whether the baseline must be evaluated at this fraction of the path, 0 its first step and 1 its last
        (Kynkaanniemi 2024): outside the interval, and at scale 1, the conditional output stands alone."""
        low, high = self.interval
        return self.scale != 1.0 and low <= progress <= high

    def combine(self, conditional: Tensor, baseline: Tensor) -> Tensor:
        """The guided raw output; the baseline is the unconditional or a negative prompt's output: one formula."""
        guided = mixed(conditional, baseline, self.scale)
        return rescaled(guided, conditional, self.rescale) if self.rescale > 0.0 else guided


def mixed(conditional: Tensor, baseline: Tensor, scale: float) -> Tensor:
    """baseline + scale (conditional - baseline) (Ho & Salimans 2022, eq. 6 with scale = 1 + w)."""
    return baseline + scale * (conditional - baseline)


def rescaled(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """guided (amount std(conditional) / std(guided) + 1 - amount), deviations per image (Lin 2023, eq. 15, 16)."""
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)  # (B, 1, 1, 1)
    return guided * (amount * ratio + (1.0 - amount))
