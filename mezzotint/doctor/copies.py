"""Whether drawn pictures are images of the data: the nearest one of each, and how near that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.doctor import pictures
from mezzotint.doctor.case import Case, Drawn
from mezzotint.doctor.pictures import Pictures

COPY = 0.5  # of the distance between images from which a picture is a copy; healthy models: medians of 1.7 to 2.4
SIDE = 32  # pixels of the small copies that pictures are compared by
MOST = 1500  # images of the folder that drawn pictures are compared with
OTHERS = 3  # nearest others of an image, whose mean distance says how far apart pictures are there
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


@dataclass(frozen=True, slots=True)
class Nearest:
    """For M drawn pictures the nearest of N images: how near it is against that image's own neighbours, and which."""

    ratio: Tensor  # (M,)
    index: Tensor  # (M,)

    @property
    def copies(self) -> int:
        return int((self.ratio < COPY).sum())

    @property
    def originals(self) -> int:
        """How many images they are copies of."""
        return len(self.index[self.ratio < COPY].unique())


def nearest(drawn: Tensor, every: Tensor) -> Nearest:
    """Of small copies (M, P, h, w) and (N, P, h, w), also mirrored: |drawn - image| / mean |image - its next others|.

    About 1 for a new picture of the same kind, near 0 for a copy (Alaa et al. 2022, section 3.3, with the mean of three
    neighbours, so that two photographs of one object do not hide a copy).
    """
    flat = every.flatten(1)
    among = torch.stack([torch.cdist(every.flip(flip).flatten(1), flat) for flip in FLIPS]).amin(0)
    among = among.fill_diagonal_(float("inf")).topk(min(OTHERS, len(every) - 1), largest=False).values.mean(1)
    distance, index = torch.stack([torch.cdist(drawn.flip(flip).flatten(1), flat) for flip in FLIPS]).amin(0).min(1)
    return Nearest(distance / among[index].clamp(min=1e-6), index)


def small(drawn: Drawn, like: Tensor) -> Tensor:
    """(M, P, h, w) of what was drawn."""
    return F.interpolate(drawn.pixels.clamp(-1, 1), like.shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)


def whole(case: Case) -> Pictures:
    """Small copies of the whole folder, or of MOST images spread over it."""
    width, height = case.bare.contract.size
    across, down = (max(1, round(SIDE * side / max(width, height))) for side in (width, height))
    folder = case.folder or case.images.folder
    return pictures.read(folder, (across, down), case.bare.codec.pixel_channels, MOST)
