"""Where a defect lies: procedural mask shapes and the few operations on masks that everyone needs.

A mask is a boolean array (height, width), True where a defect is to be painted. Every shape is a pure function of a
numpy generator, a width and a height, so a seed names a mask. Sizes follow the shorter side: "pixels" are those at 128.
The shapes follow electroluminescence images of solar cells with horizontal busbars and vertical contact fingers; where
the busbars of a cell are given, current-less areas and broken fingers end at them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Busbars = tuple[float, ...]  # where the busbars lie, from above, in parts of the height
Shape = Callable[[np.random.Generator, int, int, Busbars | None], Mask]

BUSBARS: tuple[Busbars, ...] = (
    (0.17, 0.50, 0.83),
    (0.26, 0.74),
)  # of cells with three and with two, where none are given
SIDE = 128.0  # the side at which lengths in pixels are given


def crack(rng: np.random.Generator, width: int, height: int, busbars: Busbars | None = None) -> Mask:
    """A thin branching line: straight along the crystal or wandering, often starting at an edge or a busbar."""
    side = min(width, height)
    where = rng.choice(("edge", "busbar", "inside"), p=(0.35, 0.3, 0.35))
    x, y = rng.uniform(0.08, 0.92, 2) * (width, height)
    if where == "edge":
        x, y = _on_edge(rng, width, height)
    elif where == "busbar":
        y = height * rng.choice(_busbars(rng, busbars))
    towards_centre = np.arctan2(height / 2 - y, width / 2 - x) + rng.normal(0, 0.5)
    diagonal = (np.floor(towards_centre / (np.pi / 2)) + 0.5) * np.pi / 2 + rng.normal(0, 0.12)
    angle = diagonal if rng.random() < 0.55 else towards_centre
    wander = rng.choice((0.02, 0.1, 0.22))  # radians a step: single crystals break straight
    length = side * rng.triangular(0.18, 0.4, 1.2)
    radius = rng.uniform(0.7, 1.25) * side / SIDE
    mask = np.zeros((height, width), dtype=bool)
    pending = [(x, y, angle, length, int(rng.choice(4, p=(0.45, 0.3, 0.15, 0.1))))]
    while pending:
        x, y, angle, length, branches = pending.pop()
        points, angles = _walk(rng, x, y, angle, length, wander, side)
        mask |= polyline(points, radius, width, height)
        for _ in range(branches):
            at = int(rng.integers(1, len(points)))
            turn = rng.choice((-1, 1)) * rng.uniform(0.35, 1.4)
            pending.append((*points[at], angles[at - 1] + turn, length * rng.uniform(0.2, 0.6), 0))
    return mask


def inactive(rng: np.random.Generator, width: int, height: int, busbars: Busbars | None = None) -> Mask:
    """A dark region cut off from the current: bounded by edge, busbar and crack, or a blob at the edge."""
    for _ in range(64):  # an unlucky cut leaves nothing or nearly everything: draw again
        mask = _blob_at_edge(rng, width, height) if rng.random() < 0.3 else _cut_off(rng, width, height, busbars)
        if 0.012 < mask.mean() < 0.3:
            return mask
    return _blob_at_edge(rng, width, height)


def finger(rng: np.random.Generator, width: int, height: int, busbars: Busbars | None = None) -> Mask:
    """Interrupted contact fingers: straight vertical strips, alone or a few together, most ending at a busbar."""
    ends = np.array((0.03, *_busbars(rng, busbars), 0.97)) * height
    scale = min(width, height) / SIDE
    centre = rng.uniform(0.1, 0.9) * width
    band = int(rng.integers(len(ends) - 1))
    top, bottom = ends[band], ends[band + 1]
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.choice((1, 2, 3, 4, 6), p=(0.35, 0.25, 0.2, 0.1, 0.1)))):
        x = np.clip(centre + rng.normal(0, 7) * scale, 0.05 * width, 0.95 * width)
        half = max(rng.uniform(0.6, 1.6) * scale, 0.5)
        length = max(rng.uniform(0.3, 1.0) * (bottom - top), min(9 * scale, bottom - top))
        start = rng.choice((top, bottom - length, rng.uniform(top, bottom - length)), p=(0.4, 0.4, 0.2))
        mask |= (np.abs(columns - x) <= half) & (rows >= start) & (rows <= start + length)
    return mask


MASKS: dict[str, Shape] = {"crack": crack, "inactive": inactive, "finger": finger}


def free_form(rng: np.random.Generator, width: int, height: int) -> Mask:
    """Strokes, blobs, boxes and dilated defect shapes: what an inpainting model is asked to fill in while it learns."""
    side = min(width, height)
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.choice((1, 2, 3), p=(0.5, 0.3, 0.2)))):
        kind = rng.choice(("stroke", "blob", "box", "defect"), p=(0.3, 0.15, 0.15, 0.4))
        if kind == "stroke":
            x, y = rng.uniform(0, 1, 2) * (width, height)
            points, _ = _walk(rng, x, y, rng.uniform(0, 2 * np.pi), side * rng.uniform(0.1, 0.9), 0.5, side)
            mask |= polyline(points, rng.uniform(2, 8) * side / SIDE, width, height)
        elif kind == "blob":
            centre = rng.uniform(0.05, 0.95, 2) * (width, height)
            mask |= _blob(rng, centre, side * rng.uniform(0.05, 0.2), width, height)
        elif kind == "box":
            x0, y0 = rng.uniform(0, 0.9, 2) * (width, height)
            w, h = rng.uniform(0.06, 0.45, 2) * (width, height)
            mask[int(y0) : int(y0 + h) + 1, int(x0) : int(x0 + w) + 1] = True
        else:
            shape = MASKS[str(rng.choice(list(MASKS)))]
            mask |= dilate(shape(rng, width, height, None), int(rng.integers(0, 3)))
    return mask


def polyline(points: NDArray[np.float64], radius: float, width: int, height: int) -> Mask:
    """All pixels whose centre lies within `radius` (at least 0.71: unbroken) of the line through (N, 2) points."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    near = np.full((height, width), np.inf)
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
        near = np.minimum(near, (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2)
    return near <= max(radius, 0.71) ** 2


def dilate(mask: Mask, radius: int) -> Mask:
    """The mask grown by a disc of `radius` pixels; nothing enters from outside the image."""
    grown = np.zeros_like(mask)
    height, width = mask.shape
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = min(int((radius * radius - dy * dy) ** 0.5), width - 1)
        for dx in range(-reach, reach + 1):
            grown[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] |= mask[
                max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
            ]
    return grown


def erode(mask: Mask, radius: int) -> Mask:
    """The mask shrunk by a disc of `radius` pixels; the image's border does not eat into it."""
    return ~dilate(~mask, radius)


def components(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Number the 8-connected parts 1..count in reading order: (labels (height, width), count); the background is 0.

    Runs of each row are joined to the runs they touch in the row above (union-find).
    """
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    runs: list[tuple[int, int, int]] = []  # row, first column, one past the last
    above: list[int] = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], line.view(np.int8), [0]))))
        here: list[int] = []
        for first, last in edges.reshape(-1, 2).tolist():
            index = len(runs)
            runs.append((row, first, last))
            parent.append(index)
            for other in above:
                if runs[other][1] <= last and runs[other][2] >= first:
                    a, b = root(index), root(other)
                    parent[max(a, b)] = min(a, b)
            here.append(index)
        above = here
    labels = np.zeros(mask.shape, dtype=np.int32)
    numbers: dict[int, int] = {}
    for index, (row, first, last) in enumerate(runs):
        labels[row, first:last] = numbers.setdefault(root(index), len(numbers) + 1)
    return labels, len(numbers)


def _busbars(rng: np.random.Generator, given: Busbars | None) -> Busbars:
    """The busbars given, or those of one of the usual cells."""
    return BUSBARS[rng.integers(len(BUSBARS))] if given is None else given


def _walk(
    rng: np.random.Generator, x: float, y: float, angle: float, length: float, wander: float, side: float
) -> tuple[NDArray[np.float64], list[float]]:
    """Steps of a sixteenth of the side whose direction drifts by `wander`: points (N + 1, 2), N directions."""
    points, angles = [(x, y)], []
    step = side / 16
    for _ in range(max(1, round(length / step))):
        angle += rng.normal(0, wander)
        x, y = x + step * np.cos(angle), y + step * np.sin(angle)
        points.append((x, y))
        angles.append(angle)
    return np.array(points, dtype=np.float64), angles


def _on_edge(rng: np.random.Generator, width: int, height: int) -> tuple[float, float]:
    """A point near one of the four edges of the cell."""
    along, edge = rng.uniform(0.1, 0.9), int(rng.integers(4))
    return ((0.02 * width, along * height), (0.98 * width, along * height), (along * width, 0.02 * height),
            (along * width, 0.98 * height))[edge]  # fmt: skip


def _cut_off(rng: np.random.Generator, width: int, height: int, busbars: Busbars | None) -> Mask:
    """What lies beyond one or two rough lines, most often between two busbars only."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    side = min(width, height)
    apex = rng.uniform(0.1, 0.9, 2) * (width, height)
    angle = rng.uniform(0, 2 * np.pi)
    mask = np.ones((height, width), dtype=bool)
    for turn in (0.0, rng.uniform(0.6, 2.2))[: 1 + int(rng.random() < 0.65)]:
        along = (x - apex[0]) * np.cos(angle + turn) + (y - apex[1]) * np.sin(angle + turn)
        across = -(x - apex[0]) * np.sin(angle + turn) + (y - apex[1]) * np.cos(angle + turn)
        knots = np.linspace(-1.5, 1.5, 25) * max(width, height)
        rough = np.cumsum(rng.normal(0, rng.choice((0.004, 0.02)), knots.size)) * side
        mask &= across * (1 if turn == 0 else -1) > np.interp(along, knots, rough)
    if rng.random() < 0.75:
        heights = (0.0, *_busbars(rng, busbars), 1.0)
        band = int(rng.integers(len(heights) - 1))
        rows = y / height
        mask &= (rows >= heights[band]) & (rows < heights[band + 1])
    labels, count = components(mask)
    if count > 1:
        mask = labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1
    return mask


def _blob(rng: np.random.Generator, centre: NDArray[np.float64], radius: float, width: int, height: int) -> Mask:
    """A closed shape whose radius varies with the direction by a few random harmonics."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    stretch = rng.uniform(0.6, 1.6)
    dx, dy = (x - centre[0]) / stretch, (y - centre[1]) * stretch
    direction, limit = np.arctan2(dy, dx), np.ones((height, width))
    for k in range(2, 7):
        limit += rng.normal(0, 0.16 / k) * np.cos(k * direction + rng.uniform(0, 2 * np.pi))
    return np.hypot(dx, dy) <= radius * np.clip(limit, 0.3, 2.0)


def _blob_at_edge(rng: np.random.Generator, width: int, height: int) -> Mask:
    """A blob whose centre lies on an edge of the cell, as where a contact or a corner is lost."""
    centre = np.array(_on_edge(rng, width, height))
    return _blob(rng, centre, min(width, height) * rng.uniform(0.07, 0.22), width, height)
