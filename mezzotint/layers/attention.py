"""Attention over tokens and over the pixels of a feature map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in `heads` heads (Vaswani et al. 2017, eq. 1); (B, N, D), (B, M, D) -> (B, N, D).

    `mask` (B, M) is True where a key counts; where none does, the result is zero.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))  # (B, heads, N | M, d)
    allowed = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)  # (B, N, D)


class Attention(nn.Module):
    """Attention from tokens to themselves, or to a context of another width."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        source = channels if context_channels is None else context_channels
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(source, channels, bias=bias)
        self.to_v = nn.Linear(source, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if context is None else context  # (B, M, D_source)
        return self.to_out[0](attend(self.to_q(x), self.to_k(source), self.to_v(source), self.heads, mask))  # (B, N, D)


class ImageAttention(nn.Module):
    """Normalised self-attention over the pixels of a feature map: (x + W attend(norm x)) / output_scale."""

    def __init__(self, channels: int, heads: int, groups: int | None, eps: float, output_scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.output_scale = heads, output_scale
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, H W, C), copied once here and not by each projection
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), self.heads))
        h = x + h.transpose(1, 2).unflatten(-1, x.shape[-2:])
        return h if self.output_scale == 1.0 else h / self.output_scale  # (B, C, H, W)
