"""What a set of pictures looks like as a whole: patch features, and their distance from another set's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from mezzotint import images
from mezzotint.backbones import efficientnet, features
from mezzotint.backbones.features import Features
from mezzotint.errors import InputError
from mezzotint.evaluate.comparison import FEWEST
from mezzotint.evaluate.judge import distances

LARGEST = 256  # pixels of the longer side at which pictures are compared: a vector every 8 of them


def size_of(width: int, height: int) -> tuple[int, int]:
    """The size at which pictures of this size are compared: their own, or smaller in the same shape."""
    scale = min(1.0, LARGEST / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def able() -> bool:
    """Whether the network that gives features is installed."""
    try:
        efficientnet.weights_file()
    except InputError:
        return False
    return True


def of_pictures(pictures: Sequence[Image]) -> Features:
    """Patch features (B, P, 40) of pictures of one size."""
    size = size_of(*pictures[0].size)
    found = features.maps(torch.cat([images.to_tensor(picture, *size) for picture in pictures]))
    return found.flatten(2).transpose(1, 2).contiguous().numpy()


def of_folder(
    folder: Path, size: tuple[int, int], count: int, watch: Callable[[int, int], None] | None = None
) -> Features:
    """Patch features of all real images of a folder at the size of pictures.

    InputError where there are too few of them, or too few pictures to compare.
    """
    paths = images.find(folder)
    if len(paths) < 2 * FEWEST or count < FEWEST:
        raise InputError(
            f"a distance needs at least {2 * FEWEST} images in --data and {FEWEST} pictures of each setting: "
            f"there are {len(paths)} and {count} (--count)"
        )
    return features.of_images(paths, *size_of(*size), watch)[0]


def distance(real: Features, other: Features) -> dict[str, Any] | None:
    """Frechet distance and kernel MMD with floor and interval, as `judge.distances`; None for too few images."""
    found = distances(real, {"drawn": other})
    return found["drawn"] if found else None


def joined(parts: Sequence[Features | None]) -> Features | None:
    """The features of all batches, None where one lacks them."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present and len(present) == len(parts) else None


def by_batches(pictures: Sequence[Image], batch: int = features.BATCH) -> Features:
    """Patch features of many pictures of one size."""
    return np.concatenate([of_pictures(pictures[i : i + batch]) for i in range(0, len(pictures), batch)])
