"""Distances against closed forms: Gaussians whose Frechet distance and kernel mean discrepancy are known."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.errors import InputError
from mezzotint.evaluate.comparison import compare
from mezzotint.evaluate.distances import frechet, gaussian_distance, mmd, shrunk_moments, standardised


def gaussians(rng: np.random.Generator, images: int, patches: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    return (mean + rng.standard_normal((images, patches, len(mean))) @ root.T).astype(np.float32)


def test_gaussian_distance_equals_the_closed_forms() -> None:
    one, zero = np.eye(3), np.zeros(3)
    assert gaussian_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-12)
    assert gaussian_distance(zero, one, np.array([3.0, 4.0, 0.0]), one) == pytest.approx(25)
    # commuting covariances: sum (sqrt a - sqrt b)^2
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    assert gaussian_distance(zero, a, zero, b) == pytest.approx((1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    # rotations do not matter, and the order does not either, for covariances that do not commute
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    c = rng.standard_normal((3, 3))
    c = c @ c.T
    assert gaussian_distance(zero, q @ a @ q.T, zero, q @ c @ q.T) == pytest.approx(gaussian_distance(zero, a, zero, c))
    assert gaussian_distance(zero, a, zero, c) == pytest.approx(gaussian_distance(zero, c, zero, a))
    # tr((A^1/2 C A^1/2)^1/2) = sum of the square roots of the eigenvalues of A C
    eigenvalues = np.linalg.eigvals(a @ c).real
    assert gaussian_distance(zero, a, zero, c) == pytest.approx(np.trace(a + c) - 2 * np.sqrt(eigenvalues).sum())


def test_moments_of_many_images_are_the_plain_ones_and_of_few_are_shrunk() -> None:
    rng = np.random.default_rng(1)
    root = np.array([[1.0, 0.0], [0.8, 0.6]])
    x = gaussians(rng, 4000, 5, np.array([1.0, -2.0]), root).astype(np.float64)
    mean, covariance = shrunk_moments(x.mean(1), np.einsum("npd,npe->nde", x, x) / 5)
    flat = x.reshape(-1, 2)
    assert mean == pytest.approx(flat.mean(0))
    assert np.diag(covariance) == pytest.approx(flat.var(0))
    assert covariance[0, 1] == pytest.approx(np.cov(flat.T, ddof=0)[0, 1], rel=1e-3)
    few = rng.standard_normal((4, 3, 30))  # independent channels: what four images show off the diagonal is noise
    _, covariance = shrunk_moments(few.mean(1), np.einsum("npd,npe->nde", few, few) / 3)
    plain = np.cov(few.reshape(-1, 30).T, ddof=0)
    off = ~np.eye(30, dtype=bool)
    assert np.abs(covariance[off]).sum() < 0.4 * np.abs(plain[off]).sum()


def test_frechet_comparison_finds_the_known_distance_and_its_floor() -> None:
    rng = np.random.default_rng(2)
    d = 6
    root = np.diag(np.linspace(0.5, 2, d))
    shift = np.full(d, 0.3)
    real = gaussians(rng, 200, 16, np.zeros(d), root)
    other = gaussians(rng, 120, 16, shift, 1.2 * root)
    result = compare(frechet(np.concatenate((real, other))), 200, 120)
    expected = 0.09 * d + 0.04 * (np.linspace(0.5, 2, d) ** 2).sum()
    assert result.distance - result.floor == pytest.approx(expected, rel=0.1)
    assert result.low < expected + result.floor < result.high
    assert 0 < result.floor < 0.05 * result.distance
    assert (result.group, result.held) == (100, 100)
    same = compare(frechet(np.concatenate((real, gaussians(rng, 120, 16, np.zeros(d), root)))), 200, 120)
    assert same.distance < 2 * same.floor_high  # drawn from the same source: at its floor


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(40):
        # images differ in their means: patches of an image are not independent, and whole images must be resampled
        real = rng.standard_normal((40, 1, 2)) + rng.standard_normal((40, 8, 2))
        other = rng.standard_normal((20, 1, 2)) + rng.standard_normal((20, 8, 2)) + (1.0, 0.0)
        pool = np.concatenate((real, other)).astype(np.float32)
        result = compare(frechet(pool), 40, 20, seed=trial, splits=8, resamples=60)
        hits += result.low <= 1.0 + result.floor <= result.high
    assert hits >= 33


def test_mmd_is_unbiased_and_equals_the_kernel_expectation() -> None:
    # one channel: E k(x, y) for independent Gaussians is a polynomial of their moments
    def expectation(m: float, n: float) -> float:  # E (x y + 1)^3 with x ~ N(m, 1), y ~ N(n, 1)
        third_m, third_n = m**3 + 3 * m, n**3 + 3 * n
        return third_m * third_n + 3 * (m * m + 1) * (n * n + 1) + 3 * m * n + 1

    truth = expectation(0, 0) + expectation(1, 1) - 2 * expectation(0, 1)
    values, zeros = [], []
    for trial in range(60):
        rng = np.random.default_rng(trial)
        pool = rng.standard_normal((60, 8, 1)).astype(np.float32)
        zeros.append(mmd(pool)(np.arange(30), np.arange(30, 60)))
        pool[30:] += 1
        values.append(mmd(pool)(np.arange(30), np.arange(30, 60)))
    assert np.mean(zeros) == pytest.approx(0, abs=3 * np.std(zeros) / 60**0.5)
    assert min(zeros) < 0 < max(zeros)
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / 60**0.5)


def test_doubles_in_a_resample_are_not_paired() -> None:
    pool = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    statistic = mmd(pool)
    once = statistic(np.array([0, 1, 2]), np.array([3, 4, 5]))
    twice = statistic(np.array([0, 0, 1, 1, 2, 2]), np.array([3, 4, 5]))
    assert twice == pytest.approx(once)


def test_standardised_and_too_few_images() -> None:
    pool = (5 + 3 * np.random.default_rng(0).standard_normal((20, 9, 4))).astype(np.float32)
    scaled = standardised(pool, np.arange(12))
    assert scaled[:12].reshape(-1, 4).mean(0) == pytest.approx(np.zeros(4), abs=1e-5)
    assert scaled[:12].reshape(-1, 4).std(0) == pytest.approx(np.ones(4), abs=1e-5)
    with pytest.raises(InputError, match="at least 16 real and 8 other"):
        compare(frechet(pool), 12, 8)
