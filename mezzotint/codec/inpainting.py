"""What an inpainting network sees beside the noisy latents: where to repaint, and what is around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mezzotint.codec.codec import Codec

Cells = Literal["any", "corner"]


def inpaint_concat(codec: Codec, pixels: Tensor, mask: Tensor, k: int, cells: Cells = "any") -> Tensor:
    """Mask maps and masked latents, joined: (B, k*k + C, h, w).

    From pixels (B, P, H, W) in [-1, 1] and a mask (B, 1, H, W) of zeros and ones, one where the image is repainted.
    k = 1 is Stable Diffusion's nine-channel layout; a larger k keeps the mask's shape at k times the resolution of the
    latents, which thin defects need. What is repainted is hidden behind mid grey before encoding: nothing of it leaks.
    """
    masked = codec.encode(pixels * (1 - mask))  # (B, C, h, w)
    return torch.cat((mask_maps(mask, codec.factor, k, cells), masked), dim=1)


def mask_maps(mask: Tensor, factor: int, k: int, cells: Cells = "any") -> Tensor:
    """(B, k*k, H/factor, W/factor) from (B, 1, H, W): a repainted pixel marks its cell, cells fold into channels.

    Published inpainting models read a cell's first pixel (`corner`), ours every pixel in it (`any`).
    """
    if factor % k:
        raise InputError(f"the mask resolution k = {k} must divide the codec's factor {factor}")
    step = factor // k
    marked = F.max_pool2d(mask, step) if cells == "any" else mask[..., ::step, ::step]  # (B, 1, h*k, w*k)
    return F.pixel_unshuffle(marked, k)  # (B, k*k, h, w)
