"""Which coarse grid of numbers a weight lies on, whatever number format holds it: what quantisation leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.doctor.layers import sampled

MOST_LEVELS = 300  # of 8 bits, with room for a level that a rounding adds
OFF = 0.05  # mean distance from a grid in steps: 0.25 for numbers that know nothing of it, 0.03 for int8 in float16
CODES = 40  # different values of |w| / max |w| in blocks to two digits; weights that are not quantised fill all 101
GROUPS = (128, 64, 32)  # numbers that share a scale
COARSE = 40  # levels up to which a grid costs quality in any network: 5 bits with room
FLOAT8 = (  # with the largest number of each
    ("float8 (e4m3)", torch.float8_e4m3fn, 448.0), ("float8 (e5m2)", torch.float8_e5m2, 57344.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """A set of numbers that all entries of a tensor come from."""

    name: str
    levels: int  # that are in use for numbers of one scale

    @property
    def coarse(self) -> bool:
        """Whether it costs quality in any network: 5 bits or less, or float8, which has 3 digits of 2 or fewer."""
        return self.levels <= COARSE or self.name.startswith("float8")


def grid_of(tensor: Tensor) -> Grid | None:
    """The coarsest grid of at most 8 bits that a matrix lies on, with one scale for all, a row or a group; or None.

    Uniform grids (integers and a scale, with an offset or none), tables of 16 numbers and their like, and float8 as it
    is or scaled to its range.
    """
    sample = sampled(tensor)  # (m, n)
    if sample.numel() < 1024 or bool((sample == sample[:1, :1]).all()):
        return None
    whole = sample.flatten()[None, :65536]
    rows = tensor.detach().flatten(1)[:64].cpu().double()  # whole rows, as they are stored
    found = [("one scale", _uniform(whole)), ("a scale for each row", _uniform(rows[:, :4096]))]
    for group in GROUPS:
        if rows.shape[1] % group == 0:
            found.append((f"a scale for each {group}", _uniform(rows.reshape(-1, group)[:512])))
    # a group uses fewer levels than its grid has, so the largest group that fits says most about the grid
    fitting = [Grid(f"{math.ceil(math.log2(n))}-bit integers, {how}", n) for how, n in found if n is not None]
    coarse = [grid for grid in fitting if grid.levels <= COARSE]
    for group in GROUPS:
        flat = rows.flatten()
        codes = _codes(flat[: flat.numel() // group * group].view(-1, group)[:512])
        if codes is not None:
            coarse.append(Grid(f"a table of {codes} numbers, a scale for each {group}", codes))
    eighths = [Grid(f"{name}", 256) for name, kind, top in FLOAT8 if not coarse and _cast(whole, kind, top)]
    return next(iter([*coarse, *eighths, *fitting]), None)


def _uniform(groups: Tensor) -> int | None:
    """Levels of evenly spaced grids, one for each row of (g, n), or None where fewer than 9 of 10 rows lie on one."""
    ordered = groups.sort(dim=1).values
    reach = ordered[:, -1:] - ordered[:, :1]
    alive = reach.flatten() > 0
    if groups.shape[1] < 32 or int(alive.sum()) < 0.5 * len(groups):
        return None
    ordered, reach = ordered[alive], reach[alive]
    steps = ordered.diff(dim=1)
    step = steps.masked_fill(steps < 1e-5 * reach, math.inf).amin(1, keepdim=True)
    levels = (reach / step).round()  # steps of the grid within the reach
    place = (ordered - ordered[:, :1]) / reach * levels
    distance = (place - place.round()).abs().mean(1)
    fits = (levels.flatten() <= MOST_LEVELS) & (distance < OFF)
    if float(fits.double().mean()) < 0.9:
        return None
    return int(levels.flatten()[fits].median()) + 1


def _codes(groups: Tensor) -> int | None:
    """How many different numbers there are once each row is divided by its largest, where they are few."""
    top = groups.abs().amax(1, keepdim=True)
    groups, top = groups[top.flatten() > 0], top[top.flatten() > 0]
    if groups.numel() < 4096:
        return None
    signed = (groups / top * 50).round().unique()
    return len(signed) if len(signed) <= CODES else None


def _cast(values: Tensor, kind: torch.dtype, top: float) -> bool:
    """Whether all values are numbers of float8, as they are or scaled so that the largest is the format's."""
    for scale in (1.0, top / float(values.abs().max())):
        scaled = (values * scale).float()
        there = scaled.to(kind).float()
        if (
            bool(there.isfinite().all())
            and float(((there - scaled).abs() <= 1e-3 * scaled.abs()).double().mean()) > 0.99
        ):
            return True
    return False
