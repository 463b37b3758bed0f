"""Which part of each training image is repainted, and which part of it the loss looks at: masks drawn or from files."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.data import masks
from mezzotint.data.folder import NO_LABEL, ImageFolder
from mezzotint.errors import InputError
from mezzotint.training.draws import generator, number
from mezzotint.training.recipe import Inpaint

TURNS = ((), (-1,), (-2,), (-1, -2))  # a mask of the bank also serves mirrored


def bank(plan: Inpaint, seed: int, width: int, height: int) -> Tensor:
    """(M, 1, H, W) bool procedural masks, drawn once: they cost more than a training step can spare."""
    if plan.source == "file":
        return torch.zeros((0, 1, height, width), dtype=torch.bool)
    drawn = [
        masks.free_form(np.random.default_rng(number(seed, i, "mask bank")), width, height) for i in range(plan.bank)
    ]
    return torch.from_numpy(np.stack(drawn))[:, None]


def check(plan: Inpaint, *buckets: ImageFolder) -> None:
    """InputError where masks from files are asked for and images, in all the buckets of a folder, have none."""
    total = sum(len(images) for images in buckets)
    bare = [images.names[i] for images in buckets for i in (images.mask_of == NO_LABEL).nonzero().flatten().tolist()]
    if plan.source == "file" and bare:
        raise InputError(
            f'inpaint.source is "file", and {len(bare)} of {total} images of {buckets[0].folder} have no mask,'
            f' {bare[0]} first. Add masks, remove the lines, or use "both".'
        )
    if plan.source == "both" and len(bare) == total:
        raise InputError(f'inpaint.source is "both", and no image of {buckets[0].folder} has a mask. Use "procedural".')
    if plan.dilation[0] > plan.dilation[1]:
        raise InputError(f"inpaint.dilation must be two rising numbers of pixels, not {list(plan.dilation)}")


def draw(
    plan: Inpaint, images: ImageFolder, bank: Tensor, index: Tensor, flips: list[tuple[int, ...]], seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Masks (B, 1, H, W) float of zeros and ones for one batch, and whether each image keeps its label (B,) bool.

    An image whose own mask says where its defect lies keeps its label only where enough of that is repainted: else the
    network would learn that healthy surroundings are what a defect looks like.
    """
    rng = generator(seed, step, "mask")
    count = len(index)
    chosen = torch.empty((count, 1, *images.bytes.shape[-2:]), dtype=torch.bool)
    from_file, whole = torch.rand(2, count, generator=rng)
    pick = torch.randint(max(len(bank), 1), (count,), generator=rng).tolist()
    turn = torch.randint(len(TURNS), (count,), generator=rng).tolist()
    radius = torch.randint(plan.dilation[0], plan.dilation[1] + 1, (count,), generator=rng).tolist()
    keeps = torch.ones(count, dtype=torch.bool)
    shares = {"procedural": 0.0, "file": 1.0, "both": plan.file_share}
    for i, place in enumerate(images.mask_of[index].tolist()):
        own = None if place == NO_LABEL else images.masks[place].flip(flips[i])  # (1, H, W)
        if float(whole[i]) < plan.full_share:
            chosen[i] = True
        elif own is not None and float(from_file[i]) < shares[plan.source]:
            chosen[i] = dilate(own, radius[i])
        else:
            chosen[i] = bank[pick[i]].flip(TURNS[turn[i]])
        if own is not None and own.any():
            covered = (chosen[i] & own).sum() / own.sum()
            keeps[i] = float(covered) >= plan.label_overlap
    return chosen.float(), keeps


def inside(images: ImageFolder, index: Tensor, flips: list[tuple[int, ...]], factor: int) -> Tensor:
    """Share (B, 1, H / factor, W / factor) of each latent cell that the image's own mask covers, mirrored as the image.

    An image without a mask is inside everywhere. `factor`: how many pixels a latent cell spans.
    """
    whole = torch.ones((len(index), 1, *images.bytes.shape[-2:]))
    for i, place in enumerate(images.mask_of[index].tolist()):
        if place != NO_LABEL:
            whole[i] = images.masks[place].flip(flips[i])
    return F.avg_pool2d(whole, factor)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """(1, H, W) bool grown by a square of `radius` pixels, rows first and columns after."""
    if radius == 0:
        return mask
    side = 2 * radius + 1
    wide = F.max_pool2d(mask.float(), (1, side), 1, (0, radius))
    return F.max_pool2d(wide, (side, 1), 1, (radius, 0)).bool()
