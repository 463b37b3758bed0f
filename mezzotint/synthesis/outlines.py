"""A mask as other tools want it: run lengths, boxes and polygons; exact, in pixels with corners at whole numbers."""

from __future__ import annotations

import numpy as np

from mezzotint.data import masks
from mezzotint.data.masks import Mask

Point = tuple[int, int]  # x, y of a pixel's corner
RIGHT, DOWN, LEFT, UP = (1, 0), (0, 1), (-1, 0), (0, -1)


def parts(mask: Mask) -> list[Mask]:
    """The 8-connected parts of a mask in reading order: one defect each."""
    labels, count = masks.components(mask)
    return [labels == k for k in range(1, count + 1)]


def run_lengths(mask: Mask) -> list[int]:
    """COCO's run lengths: column by column, beginning with how many are False."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return [0, *runs] if flat[0] else runs


def box(mask: Mask) -> tuple[int, int, int, int]:
    """x, y, width, height of the smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        int(columns[0]),
        int(rows[0]),
        int(columns[-1] - columns[0] + 1),
        int(rows[-1] - rows[0] + 1),
    )


def polygon(part: Mask) -> list[Point]:
    """The outer outline of one 8-connected part, clockwise along pixel edges; holes are not cut out.

    Edges run with the part on their right. Where two pixels touch at a corner only, the outline turns left, across to
    the other pixel, so that a diagonal line stays one polygon.
    """
    follow: dict[Point, list[Point]] = {}
    padded = np.pad(part, 1)
    for y, x in np.argwhere(part).tolist():
        above, below = padded[y, x + 1], padded[y + 2, x + 1]
        left, right = padded[y + 1, x], padded[y + 1, x + 2]
        for neighbour, corner, step in (
            (above, (x, y), RIGHT), (right, (x + 1, y), DOWN), (below, (x + 1, y + 1), LEFT), (left, (x, y + 1), UP),
        ):  # fmt: skip
            if not neighbour:
                follow.setdefault(corner, []).append(step)
    y, x = np.argwhere(part)[0].tolist()
    start, step = (x, y), RIGHT  # the first pixel in reading order has nothing above it: this edge is on the outside
    corner, outline = start, []
    while True:
        left, straight, right = (step[1], -step[0]), step, (-step[1], step[0])
        corner = (corner[0] + step[0], corner[1] + step[1])
        turn = next(s for s in (left, straight, right) if s in follow[corner])
        if turn != step:
            outline.append(corner)
        if corner == start and turn == RIGHT:
            return outline
        step = turn
