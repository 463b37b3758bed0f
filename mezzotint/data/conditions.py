"""What a control network is shown of a training image: its mask, its edges, or a picture of the folder's own."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.data.folder import NO_LABEL, ImageFolder
from mezzotint.errors import InputError
from mezzotint.images import grey

Condition = Literal["mask", "edges", "file"]

GRID = 2.0**-26  # gradients are rounded to it, so that pixels which tie do so whatever the order of additions
SECTOR = math.tan(math.pi / 8)  # directions are told apart by eighths of a turn
AT_ONCE = 32  # images whose edges are found together


def pictures(images: ImageFolder, condition: Condition, thresholds: tuple[float, float] = (0.1, 0.2)) -> Tensor:
    """(N, 1 | 3, H, W) uint8 of all images: masks and edges white on black, an image without a mask all black.

    `thresholds` are those of `edges`. InputError where a folder has no masks, or an image no condition picture.
    """
    match condition:
        case "mask":
            if not len(images.masks):
                raise InputError(f'{images.folder} has no masks to follow: add "mask" to its lines, or use "edges".')
            there = images.mask_of != NO_LABEL
            found = torch.zeros((len(images), 1, *images.bytes.shape[-2:]), dtype=torch.uint8)
            found[there] = images.masks[images.mask_of[there]].byte() * 255
            return found
        case "edges":
            rows = torch.arange(len(images)).split(AT_ONCE)
            return torch.cat([edges(images.pixels(row), *thresholds).byte() * 255 for row in rows])
        case "file":
            without = images.control_of == NO_LABEL
            if without.any():
                name = images.names[int(without.nonzero()[0])]
                raise InputError(f'{images.folder / name} has no condition picture: add "control" to its line.')
            return images.controls[images.control_of]


def shown(pictures: Tensor, index: Tensor, flips: list[tuple[int, ...]]) -> Tensor:
    """Condition pictures (B, 3, H, W) float32 in [-1, 1] of the images `index` (B,), each mirrored as its image is."""
    chosen = [pictures[i].flip(dims) if dims else pictures[i] for i, dims in zip(index.tolist(), flips, strict=True)]
    return (torch.stack(chosen).float() / 127.5 - 1).expand(-1, 3, -1, -1)


def edges(pixels: Tensor, low: float = 0.1, high: float = 0.2, sigma: float = 1.0) -> Tensor:
    """(B, 1, H, W) bool: the edges of pictures (B, 1 | 3, H, W) in [-1, 1] (Canny 1986).

    A Gaussian of deviation `sigma` pixels, Sobel's gradient, its largest values along its direction; of those above
    `low` the connected ones that somewhere reach `high`. Thresholds are contrasts: a straight step between two greys
    answers with their difference, 1 for black to white. The line lies on the brighter side of a step. Mirrored
    pictures have mirrored edges, to the bit. InputError where the thresholds fall or reach zero.
    """
    if not 0 < low <= high:
        raise InputError(f"the thresholds of edges must be rising contrasts above 0, not {low:g} and {high:g}")
    across, down = gradient(pixels, sigma)  # (B, 1, H, W) int64 each, in units of GRID
    strength = across**2 + down**2
    thin = (strength > _beside(strength, across, down, 1)) & (strength >= _beside(strength, across, down, -1))
    weak = thin & (strength >= (low / GRID) ** 2)
    found, before = thin & (strength >= (high / GRID) ** 2), torch.zeros_like(thin)
    while not torch.equal(found, before):
        found, before = weak & (F.max_pool2d(found.float(), 3, 1, 1) > 0), found
    return found


def gradient(pixels: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Contrast to the right and downwards, (B, 1, H, W) int64 each in units of GRID.

    Behind a Gaussian g a straight step of contrast c changes by c (g(0) + g(1)) / 2 a pixel where it is steepest;
    divided by that it is c.
    """
    radius = math.ceil(4 * sigma)
    place = torch.arange(-radius, radius + 1, dtype=torch.float64)
    bell = (-(place**2) / (2 * sigma**2)).exp()
    bell = bell / bell.sum()
    steepest = (bell[radius] + bell[radius + 1]) / 2
    rise, soft = torch.tensor([-0.5, 0.0, 0.5]).double() / steepest, torch.tensor([0.25, 0.5, 0.25]).double()
    light = (grey(pixels).double() + 1) / 2  # (B, 1, H, W)
    smooth = _along(_along(light, bell, -1), bell, -2)
    across, down = _along(_along(smooth, soft, -2), rise, -1), _along(_along(smooth, soft, -1), rise, -2)
    return (across / GRID).round().long(), (down / GRID).round().long()


def _along(x: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Correlate (B, 1, H, W) with a kernel along the last dimension or the one before, repeating the border."""
    reach = len(kernel) // 2
    wide = F.pad(x, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach), mode="replicate")
    return F.conv2d(wide, kernel.view((1, 1, 1, -1) if dim == -1 else (1, 1, -1, 1)))


def _beside(strength: Tensor, across: Tensor, down: Tensor, way: int) -> Tensor:
    """The strength of the neighbour that the gradient points to (way 1), or of the one behind (-1); 0 outside."""
    height, width = strength.shape[-2:]
    x = torch.where(across.abs() > SECTOR * down.abs(), across.sign(), 0) * way
    y = torch.where(down.abs() > SECTOR * across.abs(), down.sign(), 0) * way
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = (rows + 1 + y) * (width + 2) + columns + 1 + x  # in the picture with a border of one pixel
    return F.pad(strength, (1, 1, 1, 1)).flatten(2).gather(2, place.flatten(2)).view_as(strength)
