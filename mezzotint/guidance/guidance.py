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
    """`scale` 1 is no guidance; `rescale` 0..1 brings back the conditional deviation; `interval` says where it acts.

    `skip_scale` above 0 adds skip-layer guidance (SD 3.5) inside `skip_interval`.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    skip_scale: float = 0.0
    skip_interval: tuple[float, float] = (0.01, 0.2)

    def __post_init__(self) -> None:
        for what, (low, high) in {"guidance": self.interval, "skip-layer guidance": self.skip_interval}.items():
            if not 0.0 <= low <= high <= 1.0:
                raise InputError(
                    f"{what} interval {low:g}..{high:g} is not inside 0..1: give fractions of the path, low first"
                )
        if not 0.0 <= self.rescale <= 1.0:
            raise InputError(f"guidance rescale {self.rescale:g} is not inside 0..1")

    def active(self, progress: float) -> bool:
        """Whether the baseline must be evaluated at this fraction of the path, 0 its first step and 1 its last
        (Kynkaanniemi 2024): outside the interval, and at scale 1, the conditional output stands alone."""
        low, high = self.interval
        return self.scale != 1.0 and low <= progress <= high

    def skips(self, index: int, steps: int) -> bool:
        """Whether the skip-layer output must be evaluated at this index, 0-based, of a path of so many steps.

        Both ends are excluded, and the index is held against steps times the fraction: of 28 steps 1..5, not the first.
        """
        low, high = self.skip_interval
        return self.skip_scale != 0.0 and steps * low < index < steps * high

    def combine(self, conditional: Tensor, baseline: Tensor) -> Tensor:
        """The guided raw output; the baseline is the unconditional or a negative prompt's output: one formula."""
        guided = mixed(conditional, baseline, self.scale)
        return rescaled(guided, conditional, self.rescale) if self.rescale > 0.0 else guided


def mixed(conditional: Tensor, baseline: Tensor, scale: float) -> Tensor:
    """baseline + scale (conditional - baseline) (Ho & Salimans 2022, eq. 6 with scale = 1 + w)."""
    return baseline + scale * (conditional - baseline)


def skipped(guided: Tensor, conditional: Tensor, without: Tensor, scale: float) -> Tensor:
    """guided + scale (conditional - without), `without` the conditional output with some layers left out (SD 3.5).

    Applied last, on raw outputs; where the baseline is not evaluated, `guided` is the conditional output.
    """
    return guided + scale * (conditional - without)


def rescaled(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """guided (amount std(conditional) / std(guided) + 1 - amount), deviations per image (Lin 2023, eq. 15, 16)."""
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)  # (B, 1, 1, 1)
    return guided * (amount * ratio + (1.0 - amount))
