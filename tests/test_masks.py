"""Mask shapes are reproducible, of the sizes promised, and the operations on masks agree with their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.data import masks

SHAPES = {**masks.MASKS, "free_form": masks.free_form}
AREA = {"crack": (0.0005, 0.12), "inactive": (0.012, 0.3), "finger": (0.0005, 0.06), "free_form": (0.001, 0.6)}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [(128, 128), (96, 160), (300, 200)])
def test_shapes_are_pure_functions_of_the_seed(name: str, size: tuple[int, int]) -> None:
    width, height = size
    for seed in range(8):
        first = SHAPES[name](np.random.default_rng(seed), width, height)
        again = SHAPES[name](np.random.default_rng(seed), width, height)
        assert first.dtype == bool and first.shape == (height, width)
        assert np.array_equal(first, again)
    assert not np.array_equal(first, SHAPES[name](np.random.default_rng(99), width, height))


@pytest.mark.parametrize("name", SHAPES)
def test_no_mask_is_empty_and_areas_hold_the_promised_range(name: str) -> None:
    areas = [SHAPES[name](np.random.default_rng(seed), 128, 128).mean() for seed in range(200)]
    low, high = AREA[name]
    assert low <= min(areas) and max(areas) <= high


def test_cracks_are_thin_and_fingers_are_vertical() -> None:
    for seed in range(60):
        crack = masks.crack(np.random.default_rng(seed), 128, 128)
        assert not masks.erode(crack, 5).any() or crack.sum() > 300  # only where branches meet may it be thick
        finger = masks.finger(np.random.default_rng(seed), 128, 128)
        labels, count = masks.components(finger)
        for k in range(1, count + 1):
            rows, columns = np.nonzero(labels == k)
            strip = np.zeros_like(finger)
            strip[rows, columns] = True
            # every column of a strip is one unbroken vertical run
            for column in np.unique(columns):
                assert np.abs(np.diff(strip[:, column].astype(int))).sum() <= 2


def test_areas_and_fingers_end_at_the_busbars_given() -> None:
    bars = (0.3, 0.6)
    for shape in (masks.inactive, masks.finger):
        ends = {top: 0 for top in (38, 39, 76, 77)}
        for seed in range(80):
            rows = np.flatnonzero(shape(np.random.default_rng(seed), 128, 128, bars).any(1))
            for row in (rows[0], rows[-1]):
                ends[row] = ends.get(row, 0) + 1
        inner = {row: count for row, count in ends.items() if 8 < row < 119}
        at_bars = sum(inner.get(row, 0) for row in (38, 39, 76, 77))
        assert at_bars > 0.3 * sum(inner.values())  # anywhere else is as likely as any other row


def test_polyline_equals_the_distance_to_a_segment() -> None:
    mask = masks.polyline(np.array([[4.5, 8.5], [20.5, 8.5]]), 3.0, 32, 24)
    y, x = np.mgrid[0:24, 0:32] + 0.5
    expected = np.hypot(np.maximum(np.maximum(4.5 - x, x - 20.5), 0), y - 8.5) <= 3.0
    assert np.array_equal(mask, expected)
    diagonal = masks.polyline(np.array([[0.0, 0.0], [64.0, 51.0]]), 0.1, 64, 64)  # never broken
    assert masks.components(diagonal)[1] == 1


def test_dilate_and_erode_follow_the_disc() -> None:
    point = np.zeros((15, 17), dtype=bool)
    point[7, 8] = True
    y, x = np.mgrid[0:15, 0:17]
    for radius in (0, 1, 2, 5):
        disc = (y - 7) ** 2 + (x - 8) ** 2 <= radius**2
        assert np.array_equal(masks.dilate(point, radius), disc)
        assert np.array_equal(masks.erode(masks.dilate(point, radius), radius), point)
    assert masks.dilate(point, 100).all()
    assert masks.erode(np.ones((5, 5), dtype=bool), 2).all()


def test_components_agree_with_flood_fill() -> None:
    rng = np.random.default_rng(5)
    for density in (0.1, 0.3, 0.5, 0.9):
        mask = rng.random((40, 33)) < density
        labels, count = masks.components(mask)
        expected = np.zeros(mask.shape, dtype=int)
        number = 0
        for y, x in np.argwhere(mask):
            if expected[y, x]:
                continue
            number += 1
            stack = [(int(y), int(x))]
            while stack:
                i, j = stack.pop()
                if 0 <= i < 40 and 0 <= j < 33 and mask[i, j] and not expected[i, j]:
                    expected[i, j] = number
                    stack += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        assert count == number
        assert np.array_equal(labels, expected)
    assert masks.components(np.zeros((4, 4), dtype=bool))[1] == 0
