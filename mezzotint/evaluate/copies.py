"""Did the model paint, or did it recite? Nearest training images, by features and by the pixels inside the mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mezzotint.backbones.features import Features
from mezzotint.backbones.thumbprints import nearest

Pixels = NDArray[np.uint8]  # (N, H, W) grey
ALIKE = 0.98  # correlation above which two patterns count as the same
FLAT = 2.0  # grey levels of deviation below which an area has no pattern to compare
FEW = 48  # pixels below which a pattern fits some training image by chance
MANY = 400  # pixels, evenly taken, that are enough to compare a large area
SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
FLIPS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # what training may have turned images by


@dataclass(frozen=True, slots=True)
class Likeness:
    """How well a training image explains the pixels under a mask."""

    correlation: float  # of the best fitting training image, over flips and shifts of a pixel
    index: int


def likeness(image: NDArray[np.uint8], mask: NDArray[np.bool_], training: Pixels) -> Likeness | None:
    """The training image (T, H, W) most correlated with `image` (H, W) under the mask; None where nothing can be said.

    Brightness and contrast are taken out, so a faded copy is a copy. None for masks of fewer than 48 pixels and for
    areas without a pattern (deviation below 2 grey levels), which fit many images by chance.
    """
    values = image[mask].astype(np.float32)
    if values.size < FEW or values.std() < FLAT:
        return None
    rows, columns = np.nonzero(mask)
    if values.size > MANY:
        some = np.linspace(0, values.size - 1, MANY).round().astype(int)
        values, rows, columns = values[some], rows[some], columns[some]
    values = values - values.mean()
    values /= max(float(np.linalg.norm(values)), 1e-6)
    height, width = image.shape
    best = Likeness(-1.0, 0)
    for vertical, horizontal in FLIPS:
        turned = training[:, ::vertical, ::horizontal]
        for dy, dx in SHIFTS:
            y, x = np.clip(rows + dy, 0, height - 1), np.clip(columns + dx, 0, width - 1)
            found = turned[:, y, x].astype(np.float32)  # (T, pixels)
            found -= found.mean(1, keepdims=True)
            length = np.linalg.norm(found, axis=1)
            flat = length < FLAT * values.size**0.5
            fit = np.where(flat, -1.0, found @ values / np.maximum(length, 1e-6))
            if fit.max() > best.correlation:
                best = Likeness(float(fit.max()), int(fit.argmax()))
    return best


@dataclass(frozen=True, slots=True)
class CopyCheck:
    """What the look for copies found, with what real images that were never trained on show in the same look."""

    images: int
    training: int
    painted_distance: tuple[float, float, float]  # smallest, 5 percent, median distance to the nearest training image
    real_distance: tuple[float, float, float]  # the same of the held-out real images
    closer_than_real: int  # painted images nearer to a training image than 99 percent of the held-out ones
    compared: int  # masks large and patterned enough for the look at pixels
    alike: tuple[str, ...]  # painted images whose painted pixels a training image explains, and their sources did not


def check(
    names: list[str], painted: Pixels, sources: Pixels, masks: NDArray[np.bool_], training: Pixels,
    prints: Features, real_prints: Features, training_prints: Features,
) -> CopyCheck:  # fmt: skip
    """Look for copies among painted images (N, H, W) whose masks (N, H, W) say what was painted over `sources`.

    A painted image counts as alike where its pixels under the mask correlate by 0.98 or more with a training image
    while those of its source, the untouched cell, do not: busbars and cell edges alone are no copies.
    """
    ours, real = nearest(prints, training_prints), nearest(real_prints, training_prints)
    alike: list[str] = []
    compared = 0
    for i, name in enumerate(names):
        found = likeness(painted[i], masks[i], training)
        if found is None:
            continue
        compared += 1
        if found.correlation >= ALIKE:
            before = likeness(sources[i], masks[i], training)
            if before is None or before.correlation < ALIKE:
                alike.append(name)
    return CopyCheck(
        images=len(names),
        training=len(training),
        painted_distance=_summary(ours.distance),
        real_distance=_summary(real.distance),
        closer_than_real=int((ours.distance < np.quantile(real.distance, 0.01)).sum()),
        compared=compared,
        alike=tuple(alike),
    )


def _summary(values: NDArray[np.float64]) -> tuple[float, float, float]:
    low, five, middle = np.quantile(values, (0, 0.05, 0.5))
    return float(low), float(five), float(middle)
