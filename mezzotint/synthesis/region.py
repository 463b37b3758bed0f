"""Where on an image a defect may lie: inside the thing, not on the frame around it nor on its chamfered corners."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mezzotint.data import masks
from mezzotint.data.masks import Busbars, Mask

DARK = 0.62  # of the image's bright level: what lies around a cell is darker
WHOLE = 0.5  # share of the image below which the bright part is no outline of a thing, and all of the image serves


def inside(grey: NDArray[np.uint8]) -> Mask:
    """The convex hull of the bright pixels (H, W); everything where that is less than half of the image.

    Cells are convex, octagons where the corners are chamfered, and lie on a darker ground: busbars and dark defects
    within do not dent the hull. Specks are dropped before it is spanned.
    """
    bright = masks.erode(grey >= DARK * np.quantile(grey, 0.9), 2)
    bright[[0, -1]] = bright[:, [0, -1]] = False  # eroding spares the border
    if bright.mean() < WHOLE / 2:
        return np.ones(grey.shape, dtype=bool)
    found = masks.dilate(hull(bright), 2)  # back to where the bright part ends: dark areas reach the very edge
    return found if found.mean() >= WHOLE else np.ones(grey.shape, dtype=bool)


def busbars(grey: NDArray[np.uint8]) -> Busbars | None:
    """Heights of the dark horizontal lines across the image (H, W), in parts of it; None unless there are 2 to 5.

    A busbar is a run of rows, at most a fifteenth of the height, whose median over the middle columns lies below the
    median of the rows around by 4 percent of the bright level and by four times the usual unevenness of rows.
    """
    height, width = grey.shape
    rows = np.median(grey[:, width // 5 : -width // 5], axis=1).astype(float)
    reach = height // 10
    padded = np.pad(rows, reach, mode="reflect")
    around = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)
    below = around - rows
    uneven = 1.4826 * float(np.median(np.abs(below - np.median(below))))
    dark = np.zeros((1, height), dtype=bool)
    edge = height // 12  # the frame around a cell is dark too
    dark[0, edge:-edge] = (below > max(0.04 * np.quantile(grey, 0.9), 4 * uneven))[edge:-edge]
    labels, count = masks.components(dark)
    runs = [np.flatnonzero(labels[0] == k) for k in range(1, count + 1)]
    found = tuple(float(run.mean() + 0.5) / height for run in runs if len(run) <= height // 15)
    return found if 2 <= len(found) <= 5 and min(np.diff(found)) > 0.1 else None


def hull(mask: Mask) -> Mask:
    """All pixels whose centre lies in the convex hull of the True ones (Andrew's monotone chain, 1979)."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.zeros_like(mask)
    # the hull of a row's pixels is spanned by its ends
    ends = [(int(c), int(r)) for r in np.unique(rows) for c in (columns[rows == r].min(), columns[rows == r].max())]
    points = sorted(set(ends))
    y, x = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    filled = np.ones_like(mask)
    outline = _half(points)[:-1] + _half(points[::-1])[:-1]
    for (x0, y0), (x1, y1) in zip(outline, outline[1:] + outline[:1], strict=True):
        filled &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    if len(outline) < 3:  # a point or a line has no inside but itself
        (low_x, low_y), (high_x, high_y) = points[0], points[-1]
        filled &= (x >= low_x) & (x <= high_x) & (y >= min(low_y, high_y)) & (y <= max(low_y, high_y))
    return filled


def _half(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    chain: list[tuple[int, int]] = []
    for point in points:
        while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
            chain.pop()
        chain.append(point)
    return chain


def _turn(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
