"""Sizes of about one area and many aspect ratios, so that pictures of other shapes are not cut to a square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]  # width, height


def sizes(size: Size, step: int, ratio: float) -> list[Size]:
    """Every (width, height) of multiples of `step` that fills the area of `size` without exceeding it, by aspect ratio.

    Filling: one step more of either side would be more area. Aspect ratios lie in [1 / ratio, ratio]; `size` itself is
    among the sizes. For 1024x1024, 64 and 4 these are those of SDXL (Podell et al. 2023, appendix I) of largest area.
    InputError where `size` is no multiple of `step`, or longer than `ratio` allows.
    """
    width, height = size
    if step < 1 or width % step or height % step:
        raise InputError(f"data.size {width}x{height} must be multiples of data.bucket_step, which is {step}.")
    if ratio < 1 or max(size) > ratio * min(size):
        raise InputError(f"data.bucket_ratio is {ratio:g}; for data.size {width}x{height} it must be {_least(size)}.")
    area = width * height // step**2  # in squares of `step`
    found = [(across, area // across) for across in range(1, area + 1)]
    filling = [(a, d) for a, d in found if (a + 1) * d > area and max(a, d) <= ratio * min(a, d)]
    return [(a * step, d * step) for a, d in filling]


def assign(original: Tensor, among: Sequence[Size]) -> Tensor:
    """Which of the sizes each of the pictures (N, 2) of width and height goes to: index (N,) of the nearest log aspect.

    A picture halfway between two goes to the earlier one.
    """
    import torch

    pictures = original.double()
    shapes = torch.tensor(among, dtype=torch.double)
    distance = (pictures[:, :1] / pictures[:, 1:]).log() - (shapes[:, 0] / shapes[:, 1]).log()  # (N, K)
    return torch.from_numpy(distance.abs().numpy().argmin(1))  # of equals NumPy takes the first, torch any


def _least(size: Size) -> str:
    return f"at least {max(max(size) / min(size), 1):.4g}"
