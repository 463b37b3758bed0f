"""Cached latents and text states against fresh ones, as numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Computed twice in float32 by other batch sizes or another machine's kernels they differ by 1e-6 to 1e-5 of their
# deviation, computed in bfloat16 by 0.004 to 0.02, and a network is trained to see noise of 0.01 and more.
ROUNDED, WRONG = 1e-3, 0.05
SAME = 0.98  # correlation from which cached and fresh values are the same but for slope and offset


@dataclass(frozen=True, slots=True)
class Comparison:
    """Cached values y against fresh ones x by channel: y = slope x + offset, and how much is left unexplained."""

    error: float  # root mean square of y - x over the deviation of x
    slope: Tensor  # (C,)
    offset: Tensor  # (C,) in units of the fresh channel's deviation
    correlation: Tensor  # (C,)
    order: tuple[int, ...]  # which fresh channel each cached one follows best
    rows: tuple[int, ...]  # which fresh row each cached one is nearest to, up to slope and offset


def compare(cached: Tensor, fresh: Tensor) -> Comparison:
    """Least squares by channel over (N, C, ...)."""
    y, x = (part.double().transpose(0, 1).flatten(1) for part in (cached, fresh))  # (C, N ...)
    dx, dy = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    deviation = dx.square().mean(1).sqrt().clamp(min=1e-12)
    cross = dy @ dx.T / dx.shape[1]  # (C, C)
    correlations = cross / (dy.square().mean(1).sqrt().clamp(min=1e-12)[:, None] * deviation[None])
    slope = cross.diagonal() / deviation.square()
    offset = (y.mean(1) - slope * x.mean(1)) / deviation
    error = ((y - x) / deviation[:, None]).square().mean().sqrt()
    a, b = (part.double().flatten(1) for part in (cached, fresh))
    a, b = a - a.mean(0), b - b.mean(0)
    alike = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    return Comparison(float(error), slope, offset, correlations.diagonal(),
                      tuple(correlations.abs().argmax(1).tolist()), tuple(alike.argmax(1).tolist()))  # fmt: skip


def difference(found: Comparison, cached: Tensor, dtype: str) -> str:
    """What distinguishes cached from fresh latents, in words."""
    channels = len(found.slope)
    if channels > 1 and found.order != tuple(range(channels)) and len(set(found.order)) == channels:
        return f"channels are in another order ({', '.join(map(str, found.order))})"
    if found.rows != tuple(range(len(found.rows))) and float(found.correlation.min()) < SAME:
        other = sum(i != row for i, row in enumerate(found.rows))
        if len(set(found.rows)) == len(found.rows):
            return f"{other} of {len(found.rows)} rows are other images'"
    if float(found.correlation.min()) < SAME:
        by = f"{float(found.correlation.mean()):.2f} with fresh ones, by channel {float(found.correlation.min()):.2f}"
        return f"they correlate by {by} and more: another codec's, or other pictures under these names"
    slope, offset = float(found.slope.mean()), float(found.offset.abs().max())
    told: list[str] = []
    if float((found.slope - 1).abs().max()) > WRONG / 2:
        told.append(f"scaled by {slope:.4g}" + _spread(found.slope))
    if offset > WRONG / 2:
        told.append(f"shifted by up to {offset:.2g} deviations")
    if not told:
        told.append(f"rounded as {precision(cached)} numbers are" if precision(cached) != dtype else "less precise")
    return " and ".join(told)


def _spread(slope: Tensor) -> str:
    low, high = float(slope.min()), float(slope.max())
    return f" ({low:.3g} to {high:.3g} by channel)" if high - low > 0.02 * abs(high) else ""


def precision(values: Tensor) -> str:
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        if bool((values.to(dtype).float() == values).all()):
            return name
    return "float32"


def states(cached: Tensor, fresh: Tensor) -> tuple[float, str]:
    """Error over the deviation of the fresh states, and what distinguishes them."""
    a, b = cached.double(), fresh.double()
    error = float((a - b).square().mean().sqrt() / b.std().clamp(min=1e-12)) if bool(a.isfinite().all()) else 1e3
    distance = torch.cdist(a.flatten(1), b.flatten(1))  # (N, N)
    nearest = distance.argmin(1)
    tolerance = WRONG * float(b.std()) * b[0].numel() ** 0.5
    if bool((distance.amin(1) < tolerance).all()) and bool((nearest != torch.arange(len(a))).any()):
        return error, f"{int((nearest != torch.arange(len(a))).sum())} rows are other captions'"
    slope = float((a * b).sum() / b.square().sum())
    cosine = float(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).mean())
    return error, f"cosine {cosine:.3f}, slope {slope:.3g}: another encoder, layer or length made them"
