"""What an inpainting network sees beside the noisy latents: where to repaint, and what is around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mezzotint.codec.codec import Codec


def inpaint_concat(codec: Codec, pixels: Tensor, mask: Tensor, k: int) -> Tensor:
    """Mask maps and masked latents, joined: (B, k*k + C, h, w).

    From pixels (B, P, H, W) in [-1, 1] and a mask (B, 1, H, W) of zeros and ones, one where the image is repainted.
    k = 1 is Stable Diffusion's nine-channel layout; a larger k keeps the mask's shape at k times the resolution of the
    latents, which thin defects need. What is repainted is hidden behind mid grey before encoding: nothing of it leaks.
    """
    masked = codec.encode(pixels * (1 - mask))  # (B, C, h, w)
    return torch.cat((mask_maps(mask, codec.factor, k), masked), dim=1)


def mask_maps(mask: Tensor, factor: int, k: int) -> Tensor:
    """(B, k*k, H/factor, W/factor) from (B, 1, H, W): a repainted pixel marks its cell, cells fold into channels."""
    if factor % k:
        raise InputError(f"the mask resolution k = {k} must divide the codec's factor {factor}")
    cells = F.max_pool2d(mask, factor // k)  # (B, 1, h*k, w*k)
    return F.pixel_unshuffle(cells, k)  # (B, k*k, h, w)
