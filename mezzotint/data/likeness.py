"""Pictures that show the same thing: a perceptual hash finds candidates, the correlation of small copies confirms.

Both look at what a picture does not share with its folder. Parts of a regular product (busbars, frames, shading) look
alike without being copies, so what is common to the folder is taken out first: the mean and the leading principal
components of its small copies, as far as many pictures carry them. A component of few pictures is no common look but a
cluster of copies, and stays.

Measured on the 2,624 cells of elpv-dataset at 128 pixels. Copies in JPEG of quality 50, at half or 2.3 times the size,
with other contrast or gamma: 91 to 100 % found. Of 281 polycrystalline images with a sister (solar_cells.sisters) 277
are found; all 418 pairs called there share their crystal grains (aligned correlation of details of 1 to 5 in 256 pixels
0.75 and more, of unrelated pairs 0.34 and less). Of 576,000 pairs of monocrystalline cells, which look alike, 37 are
called, most of them with the same broken fingers. A shift or crop by over one percent of the side is not found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # of the small copies
FREQUENCIES = 16  # of each axis in the hash: 16 x 16 less the mean
BITS = FREQUENCIES**2 - 1
DISTANCE = 80  # bits in which copies may differ: unrelated pictures differ in 127.5, with a standard deviation of 8
CORRELATION = 0.92
COMPONENTS = 16  # of the common look, in a large folder
PICTURES = 32  # for each component: fewer pictures than that do not say what is common
SPREAD = 0.1  # share of the pictures that must carry a component
FEW = 8  # from so many pictures on their mean is a common look
FAINT = 1.0  # grey levels: pictures with less detail than that have nothing to compare
BLOCK = 1024
TURNS = {
    "mirrored": (0, True),
    "turned by 90 degrees": (1, False),
    "turned by 180 degrees": (2, False),
    "turned by 270 degrees": (3, False),
    "mirrored and turned by 90 degrees": (1, True),
    "mirrored upside down": (2, True),
    "mirrored and turned by 270 degrees": (3, True),
}


@dataclass(frozen=True, slots=True)
class CommonLook:
    """What the pictures of a folder share."""

    mean: Tensor  # (SIDE^2,)
    components: Tensor  # (SIDE^2, K) orthonormal

    @classmethod
    def of(cls, small: Tensor) -> CommonLook:
        """From small copies (N, SIDE, SIDE): components of participation (sum s^2)^2 / sum s^4 at least N/10."""
        details = _details(small)
        count = len(details)
        mean = details.mean(0) if count >= FEW else torch.zeros(SIDE**2)
        centred = details - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        leading = vectors.flip(1)[:, : min(COMPONENTS, count // PICTURES)]
        energy = (centred @ leading).square()
        participation = energy.sum(0).square() / energy.square().sum(0).clamp(min=1e-30)
        return cls(mean, leading[:, participation >= SPREAD * count])

    def without(self, small: Tensor) -> Tensor:
        """What is a picture's own: (N, SIDE^2) of unit length, zeros where it has no detail."""
        own = _details(small) - self.mean
        own = F.normalize(own - (own @ self.components) @ self.components.T, dim=1)
        return torch.where(small.float().flatten(1).std(1, keepdim=True) < FAINT, torch.zeros_like(own), own)


def turned(small: Tensor, name: str) -> Tensor:
    """Small copies (N, SIDE, SIDE) as one of the TURNS leaves them."""
    quarters, mirror = TURNS[name]
    return torch.rot90(small.flip(2) if mirror else small, quarters, (1, 2))


def hashes(own: Tensor) -> Tensor:
    """(N, BITS) of -1 and 1: low frequencies of the cosine transform above their median (pHash; Zauner 2010)."""
    k, x = torch.arange(FREQUENCIES)[:, None], torch.arange(SIDE)[None]
    transform = torch.cos(math.pi * k * (2 * x + 1) / (2 * SIDE))
    found = (transform @ own.view(-1, SIDE, SIDE) @ transform.T).flatten(1)[:, 1:]
    return (found > found.median(1, keepdim=True).values).float() * 2 - 1


def nearest(queries: Tensor, among: Tensor, earlier: bool = False) -> tuple[Tensor, Tensor]:
    """For each query the most similar of `among` that counts as the same picture: index (Q,) or -1, correlation (Q,).

    Both are what `CommonLook.without` gives. With `earlier`, query i is only compared with `among` 0 to i - 1. The work
    is quadratic, in blocks of matrix products: 20,000 by 20,000 take about two seconds on one core.
    """
    best, which = torch.zeros(len(queries)), torch.full((len(queries),), -1)
    signs = hashes(among)
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        reach = min(start + len(block), len(among)) if earlier else len(among)
        candidates = hashes(block) @ signs[:reach].T >= BITS - 2 * DISTANCE
        if earlier:
            candidates = candidates.tril(start - 1)
        i, j = candidates.nonzero(as_tuple=True)
        for a, b in zip(i.split(65536), j.split(65536), strict=True):
            likeness = (block[a] * among[b]).sum(1)
            same = likeness > CORRELATION
            a, b, likeness = a[same] + start, b[same], likeness[same]
            best = best.scatter_reduce(0, a, likeness, "amax")
            winner = likeness >= best[a]
            which[a[winner]] = b[winner]
    return which, best


def _details(small: Tensor) -> Tensor:
    """(N, SIDE^2) of unit length: without slow shading (a Gaussian of 4 pixels) and beyond three deviations cut."""
    frequency = torch.fft.fftfreq(SIDE)
    blur = torch.exp(-2 * (4 * math.pi) ** 2 * (frequency[:, None] ** 2 + frequency[None] ** 2))
    fine = torch.fft.ifft2(torch.fft.fft2(small.float()) * (1 - blur)).real
    deviation = fine.std((1, 2), keepdim=True)
    fine = fine.clamp(-3 * deviation, 3 * deviation).flatten(1)
    return F.normalize(fine - fine.mean(1, keepdim=True), dim=1)
