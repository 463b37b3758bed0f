"""Run lengths, boxes and polygons against pycocotools and against filling the polygon again."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco

from mezzotint.data import masks
from mezzotint.synthesis import outlines, region

SEEDS = range(12)


def inside_polygon(points: list[tuple[int, int]], width: int, height: int) -> np.ndarray:
    """Pixel centres with an odd number of vertical edges to their left."""
    filled = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if x0 == x1:
            filled[min(y0, y1) : max(y0, y1), x0:] ^= True
        else:
            assert y0 == y1
    return filled


def without_holes(mask: np.ndarray) -> np.ndarray:
    """The mask and everything that cannot be reached from outside by steps along rows and columns."""
    outside = np.pad(~mask, 1, constant_values=True)
    reached = np.zeros_like(outside)
    reached[0, 0] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= outside
        if np.array_equal(grown, reached):
            return ~reached[1:-1, 1:-1]
        reached = grown


@pytest.mark.parametrize("kind", masks.MASKS)
def test_every_part_of_every_shape(kind: str) -> None:
    for seed in SEEDS:
        mask = masks.MASKS[kind](np.random.default_rng(seed), 96, 64)
        union = np.zeros_like(mask)
        for part in outlines.parts(mask):
            encoded = coco.frPyObjects({"size": [64, 96], "counts": outlines.run_lengths(part)}, 64, 96)
            assert np.array_equal(coco.decode(encoded), part)
            assert coco.area(encoded) == part.sum()
            assert coco.toBbox(encoded).tolist() == list(outlines.box(part))
            assert np.array_equal(inside_polygon(outlines.polygon(part), 96, 64), without_holes(part))
            union |= part
        assert np.array_equal(union, mask)


def test_polygons_of_noise_and_of_diagonals() -> None:
    for seed in SEEDS:
        mask = np.random.default_rng(seed).random((20, 24)) < 0.55
        for part in outlines.parts(mask):
            assert np.array_equal(inside_polygon(outlines.polygon(part), 24, 20), without_holes(part))
    diagonal = np.eye(5, dtype=bool)
    assert len(outlines.parts(diagonal)) == 1
    assert np.array_equal(inside_polygon(outlines.polygon(diagonal), 5, 5), diagonal)
    one = np.ones((1, 1), dtype=bool)
    assert sorted(outlines.polygon(one)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_run_lengths_of_full_and_empty() -> None:
    assert outlines.run_lengths(np.ones((3, 2), dtype=bool)) == [0, 6]
    assert outlines.run_lengths(np.zeros((3, 2), dtype=bool)) == [6]


def test_hull_holds_its_points_and_is_convex() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((30, 40), dtype=bool)
        mask[rng.integers(30, size=12), rng.integers(40, size=12)] = True
        filled = region.hull(mask)
        assert not (mask & ~filled).any()
        rows, columns = np.nonzero(filled)
        a, b = rng.integers(len(rows), size=(2, 200))
        even = ((rows[a] + rows[b]) % 2 == 0) & ((columns[a] + columns[b]) % 2 == 0)
        assert filled[(rows[a] + rows[b])[even] // 2, (columns[a] + columns[b])[even] // 2].all()
    line = np.zeros((5, 5), dtype=bool)
    line[2, 1:4] = True
    assert np.array_equal(region.hull(line), line)
    assert not region.hull(np.zeros((4, 4), dtype=bool)).any()


def test_the_inside_of_a_chamfered_cell() -> None:
    y, x = np.mgrid[0:128, 0:128]
    octagon = (np.abs(x - 64) < 58) & (np.abs(y - 64) < 58) & (np.abs(x - 64) + np.abs(y - 64) < 100)
    grey = np.where(octagon, 180, 60).astype(np.uint8)
    grey[40:44, 6:122] = 30  # a busbar
    grey[60:90, 6:40] = 5  # and a dark corner of the cell, which still is the cell
    found = region.inside(grey)
    assert not (found & ~octagon).any()
    assert found.sum() > 0.93 * octagon.sum() and found[42, 64] and found[75, 20]
    assert region.inside(np.full((32, 32), 7, dtype=np.uint8)).mean() > 0.7


def test_busbars_are_found_where_they_are_and_nowhere_else() -> None:
    rng = np.random.default_rng(0)
    plain = 150 + rng.normal(0, 6, (128, 128))
    assert region.busbars(plain.astype(np.uint8)) is None
    barred = plain.copy()
    barred[[21, 22, 63, 64, 65, 106], 4:124] -= 40
    barred[40:60, 70] = 5  # a finger is no busbar
    assert region.busbars(barred.astype(np.uint8)) == pytest.approx((22 / 128, 64.5 / 128, 106.5 / 128))
