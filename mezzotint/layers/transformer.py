"""The transformer between residual blocks: self-attention over pixels, cross-attention to text, feed-forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.layers.attention import Attention


class GatedLinear(nn.Module):
    """GEGLU: (W x) * gelu(V x), W and V stored as one matrix (Shazeer 2020, eq. 6)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class GeluLinear(nn.Module):
    """gelu(W x + b), with the tanh approximation where the weights were trained under it."""

    def __init__(self, in_channels: int, out_channels: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Widen fourfold through `widen` and return."""

    def __init__(self, widen: GatedLinear | GeluLinear, channels: int) -> None:
        super().__init__()
        # the published files number the two layers 0 and 2; the identity keeps those numbers
        self.net = nn.ModuleList([widen, nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """x += self(norm x); x += cross(norm x, text); x += feed-forward(norm x)."""

    def __init__(self, channels: int, heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(GatedLinear(channels, 4 * channels), channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # (B, N, D)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A feature map read as tokens by transformer blocks, added to itself (Rombach et al. 2022, section 3.3).

    The projections in and out are 1x1 convolutions in older files and linear layers in newer ones; the result is the
    same.
    """

    def __init__(
        self, channels: int, heads: int, depth: int, context_channels: int, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_channels) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, H W, C), so that all that follows is contiguous
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(-1, x.shape[-2:])  # (B, C, H, W)
        return x + (h if self.linear_projection else self.proj_out(h))
