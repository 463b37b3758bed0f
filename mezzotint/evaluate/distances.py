"""Two distances between sets of images, each as a statistic of image indices: Frechet and kernel MMD on patch features.

An image is one draw and its patches belong together: sums are kept per image, and resampling takes whole images.
A statistic is a function of two index arrays into one pool of images, so floors and intervals reuse what was computed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Array = NDArray[np.float64]
Statistic = Callable[[Indices, Indices], float]


def standardised(pool: NDArray[np.float32], reference: Indices) -> NDArray[np.float32]:
    """Features (N, P, D) shifted and scaled so that each channel of the reference images has mean 0 and deviation 1."""
    flat = pool[reference].reshape(-1, pool.shape[-1]).astype(np.float64)
    mean, deviation = flat.mean(0), np.maximum(flat.std(0), 1e-6)
    return ((pool - mean) / deviation).astype(np.float32)


def gaussian_distance(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2))
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    gap = float(((mean_a - mean_b) ** 2).sum())
    return gap + float(np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def shrunk_moments(means: Array, products: Array) -> tuple[Array, Array]:
    """Mean and covariance from per-image means (N, D) and mean outer products (N, D, D), correlations shrunk.

    Off-diagonal entries are multiplied by 1 - min(1, sum var(s_ij) / sum s_ij^2) over i != j (Schaefer & Strimmer 2005,
    target D), with the variance taken over images: with few images this tames noise, with many it vanishes.
    """
    n = len(means)
    mean = means.mean(0)
    # centred products of image k: E[(x - m)(x - m)^T | k]
    centred = products - means[:, :, None] * mean - mean[:, None] * means[:, None, :] + np.outer(mean, mean)
    covariance = centred.mean(0)
    off = ~np.eye(len(mean), dtype=bool)
    noise = (centred.var(0, ddof=1) / n)[off].sum() if n > 1 else np.inf
    signal = (covariance[off] ** 2).sum()
    keep = 1 - min(1.0, noise / signal) if signal > 0 else 1.0
    return mean, np.where(off, keep * covariance, covariance)


def frechet(pool: NDArray[np.float32]) -> Statistic:
    """The Frechet distance between the patches of two groups of images of a pool (N, P, D)."""
    x = pool.astype(np.float64)
    means = x.mean(1)  # (N, D)
    products = np.einsum("npd,npe->nde", x, x, optimize=True) / x.shape[1]  # (N, D, D)

    def statistic(a: Indices, b: Indices) -> float:
        return gaussian_distance(*shrunk_moments(means[a], products[a]), *shrunk_moments(means[b], products[b]))

    return statistic


def mmd(pool: NDArray[np.float32], patches: int = 32, seed: int = 0) -> Statistic:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4), images as draws.

    The kernel of two images is the mean over pairs of `patches` randomly placed patches of each; an image is never
    paired with itself, nor with its double in a resample, so the estimate is unbiased and may be below zero.
    """
    rng = np.random.default_rng(seed)
    n, count, channels = pool.shape
    take = min(patches, count)
    chosen = np.stack([image[rng.choice(count, take, replace=False)] for image in pool])  # (N, K, D)
    flat = chosen.reshape(n * take, channels)
    kernel = np.empty((n, n))
    for i in range(n):
        cubes = (chosen[i] @ flat.T / channels + 1) ** 3  # (K, N * K)
        kernel[i] = cubes.reshape(take, n, take).mean((0, 2), dtype=np.float64)

    def within(a: Indices) -> float:
        apart = a[:, None] != a[None]
        return float((kernel[np.ix_(a, a)] * apart).sum() / apart.sum())

    def statistic(a: Indices, b: Indices) -> float:
        return within(a) + within(b) - 2 * float(kernel[np.ix_(a, b)].mean())

    return statistic
