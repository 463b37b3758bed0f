"""Residual blocks and the changes of resolution between them."""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resample(StrEnum):
    """What a residual block does to its resolution."""

    NONE = "none"
    DOWN = "down"
    UP = "up"


def silu_owned(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else holds: in place where no gradient will ask for the input again."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Two convolutions around the time embedding, with a shortcut (Ho et al. 2020; Dhariwal & Nichol 2021, eq. 3).

    h = conv1(silu(norm1 x));  plain:  h = conv2(silu(norm2(h + P e)))
    scale-shift:  (s, b) = P e,  h = conv2(silu(norm2(h) (1 + s) + b));  the result is (shortcut(x) + h) / output_scale.
    `e` arrives with its SiLU applied: the network does that once for all blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None,
        groups: int,
        eps: float,
        scale_shift: bool = False,
        dropout: float = 0.0,
        output_scale: float = 1.0,
        resample: Resample = Resample.NONE,
    ) -> None:
        super().__init__()
        self.resample, self.scale_shift, self.output_scale = resample, scale_shift, output_scale
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        h = silu_owned(self.norm1(x))  # (B, C_in, H, W)
        if self.resample is Resample.DOWN:
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample is Resample.UP:
            x, h = enlarge(x, size), enlarge(h, size)
        h = self.conv1(h)  # (B, C_out, H', W')
        if self.time_emb_proj is None or embedding is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self.time_emb_proj(embedding)[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h.add_(self.time_emb_proj(embedding)[:, :, None, None]))  # conv1's output is ours alone
        h = self.conv2(self.dropout(silu_owned(h)))
        h = h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.output_scale == 1.0 else h / self.output_scale  # (B, C_out, H', W')


def enlarge(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Repeat pixels to twice the size, or to `size` where an odd resolution was rounded on the way down."""
    return F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size)


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution; padding 0 puts zeros at the far edges only."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))  # (B, C, H / 2, W / 2)


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(enlarge(x, size))  # (B, C, 2 H, 2 W)
