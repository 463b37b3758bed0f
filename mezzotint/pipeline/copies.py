"""Whether a drawn picture is one of the training images: the nearest thumbprint, against what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image as pil
from PIL.Image import Image
from safetensors import safe_open
from torch.nn import functional as F

from mezzotint import images
from mezzotint.backbones import features, thumbprints
from mezzotint.backbones.features import Features
from mezzotint.errors import InputError

FLIPS = (None, pil.Transpose.FLIP_LEFT_RIGHT, pil.Transpose.FLIP_TOP_BOTTOM, pil.Transpose.ROTATE_180)
MOST = 2000  # training images between which the usual distance is measured


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """The thumbprints of the training images, and the usual distance from one to the nearest other."""

    prints: Features  # (T, F)
    usual: float
    size: tuple[int, int]  # width and height at which they were taken

    def ratios(self, pictures: Sequence[Image]) -> list[float]:
        """Of each picture, as it is or mirrored: the distance to the nearest training image over the usual one.

        0 for a training image itself, about 1 for another picture of the kind.
        """
        turned = [picture if flip is None else picture.transpose(flip) for picture in pictures for flip in FLIPS]
        distance = thumbprints.nearest(prints_of(turned, self.size), self.prints).distance
        return (distance.reshape(len(pictures), len(FLIPS)).min(1) / self.usual).tolist()


def prints_of(pictures: Sequence[Image], size: tuple[int, int]) -> Features:
    """(N, F) of pictures at a width and height."""
    found: list[Features] = []
    for start in range(0, len(pictures), features.BATCH):
        group = torch.cat([images.to_tensor(each, *size) for each in pictures[start : start + features.BATCH]])
        found.append(F.adaptive_avg_pool2d(features.maps(group), features.GRID).flatten(1).numpy())
    return np.concatenate(found)


@lru_cache(maxsize=4)
def check(model: Path) -> Check | None:
    """The check of a model folder; None where no thumbprints of its training images are beside it."""
    path = model / thumbprints.FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as content:
        facts = content.metadata() or {}
        prints = content.get_tensor("prints").float().numpy()
    if facts.get("kind") != thumbprints.KIND or facts.get("weights") != thumbprints.weights():
        raise InputError(
            f"{path} was made with another feature network, so copies cannot be looked for. Write it anew with "
            f"`python -m mezzotint.evaluate.reference {model} TRAINING_FOLDER`, or set copies = false in the policy."
        )
    width, height = (int(side) for side in facts["size"].split("x"))
    some = prints[np.linspace(0, len(prints) - 1, min(MOST, len(prints))).astype(int)]
    return Check(prints, between(some), (width, height))


def between(prints: Features) -> float:
    """The median distance of thumbprints (T, F) to the nearest other one, in deviations as `thumbprints.nearest`."""
    scaled = torch.from_numpy(prints / np.maximum(prints.std(0, dtype=np.float64), 1e-6))
    apart = torch.cdist(scaled, scaled).fill_diagonal_(float("inf"))
    return float(apart.min(1).values.median()) / prints.shape[1] ** 0.5
