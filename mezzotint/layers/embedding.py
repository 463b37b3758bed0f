"""From numbers (the clock, a guidance scale, a picture size) to vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(values: Tensor, channels: int, cosine_first: bool = False, shift: float = 1.0) -> Tensor:
    """Sines and cosines of a number at geometrically spaced frequencies, in float32.

    omega_i = 10000^(-i / (channels/2 - shift)), i = 0 .. channels/2 - 1; the vector is (sin omega v, cos omega v), or
    cosines first (Vaswani et al. 2017, section 3.5; Ho et al. 2020 use shift 1 and sines first). values (B,) -> (B,
    channels).
    """
    half = channels // 2
    # in this order: at t = 999 another one moves the angle by 2e-5, and trained weights have seen this rounding
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / (half - shift)
    angle = values.float()[:, None] * exponent.exp()  # (B, channels / 2)
    parts = (angle.cos(), angle.sin()) if cosine_first else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, channels % 2))


class TimestepEmbedding(nn.Module):
    """A two-layer perceptron from a sinusoid (or any vector) to the embedding that every residual block reads.

    e = W2 silu(W1 (s + Wc c) + b1) + b2, where c is the optional guidance vector of a distilled network (Meng et al.
    2023).
    """

    def __init__(
        self, in_channels: int, out_channels: int, condition_channels: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels, bias)
        self.linear_2 = nn.Linear(out_channels, out_channels, bias)
        self.cond_proj = None if condition_channels is None else nn.Linear(condition_channels, in_channels, bias=False)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            sample = sample + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(sample)))  # (B, out_channels)
