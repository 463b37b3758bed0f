"""Joint attention over picture and text, each with weights of its own (Esser et al. 2024, figure 2b)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.layers.attention import attend
from mezzotint.layers.embedding import TimestepEmbedding, sinusoid
from mezzotint.layers.transformer import FeedForward, GeluLinear

CLOCK_CHANNELS = 256
EPS = 1e-6
Affine = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate, (B, 1, D) each


class Text(StrEnum):
    """What a block does with the text."""

    NONE = "none"  # pictures only
    READ = "read"  # looked at and then dropped: the last block
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class BlockModulation:
    """All that the level and the pooled prompt do to one block."""

    image: tuple[Affine, ...]  # around attention, around feed-forward, around the second attention where there is one
    text: tuple[Affine, ...]  # the same two; none where the text is not changed
    read: tuple[Tensor, Tensor] | None  # scale and shift of a text that is only read


class AdaptiveNorm(nn.Module):
    """norm(x) and, from a vector, the numbers that act on it: `parts` of them a channel."""

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(channels, parts * channels)
        self.norm = nn.LayerNorm(channels, EPS, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def numbers(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """From silu(e) (B, D) to `parts` tensors (B, 1, D)."""
        return self.linear(embedding)[:, None].chunk(self.parts, dim=-1)

    def affines(self, embedding: Tensor) -> tuple[Affine, ...]:
        """The numbers as (shift, scale, gate), three by three."""
        found = self.numbers(embedding)
        return tuple(zip(found[0::3], found[1::3], found[2::3], strict=True))


class JointAttention(nn.Module):
    """Attention of picture tokens, and of text tokens where there are any, to all of them.

    With `normalise`, queries and keys are divided by their root mean square, head by head, before they meet (Esser et
    al. 2024, section 5.3.2).
    """

    def __init__(self, channels: int, heads: int, text: Text, normalise: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.norm_q, self.norm_k = self._norms(channels, normalise)
        if text is not Text.NONE:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(channels, channels) for _ in range(3))
            self.norm_added_q, self.norm_added_k = self._norms(channels, normalise)
        self.to_add_out = nn.Linear(channels, channels) if text is Text.CHANGED else None

    def _norms(self, channels: int, normalise: bool) -> tuple[nn.Module, nn.Module]:
        if not normalise:
            return nn.Identity(), nn.Identity()
        return nn.RMSNorm(channels // self.heads, EPS), nn.RMSNorm(channels // self.heads, EPS)

    def forward(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._by_head(self.to_q(x), self.norm_q), self._by_head(self.to_k(x), self.norm_k), self.to_v(x)
        if text is None:
            return self.to_out[0](attend(q, k, v, self.heads)), None  # (B, N, D)
        q = torch.cat([q, self._by_head(self.add_q_proj(text), self.norm_added_q)], dim=1)  # (B, N + M, D)
        k = torch.cat([k, self._by_head(self.add_k_proj(text), self.norm_added_k)], dim=1)
        v = torch.cat([v, self.add_v_proj(text)], dim=1)
        x, text = attend(q, k, v, self.heads).split([x.shape[1], text.shape[1]], dim=1)  # (B, N, D), (B, M, D)
        return self.to_out[0](x), None if self.to_add_out is None else self.to_add_out(text)

    def _by_head(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x.unflatten(-1, (self.heads, -1))).flatten(-2)


class JointBlock(nn.Module):
    """x += gate attention(m(norm x)); x += gate perceptron(m(norm x)); the same for the text, with its own weights.

    m(h) = h (1 + scale) + shift. With `dual`, pictures attend to themselves a second time, from the same norm (SD 3.5
    Medium).
    """

    def __init__(self, channels: int, heads: int, text: Text, normalise: bool = False, dual: bool = False) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(channels, 9 if dual else 6)
        self.norm1_context = None if text is Text.NONE else AdaptiveNorm(channels, 2 if text is Text.READ else 6)
        self.attn = JointAttention(channels, heads, text, normalise)
        self.attn2 = JointAttention(channels, heads, Text.NONE, normalise) if dual else None
        self.norm2 = nn.LayerNorm(channels, EPS, elementwise_affine=False)
        self.ff = FeedForward(GeluLinear(channels, 4 * channels, "tanh"), channels)
        self.ff_context = None
        if text is Text.CHANGED:
            self.norm2_context = nn.LayerNorm(channels, EPS, elementwise_affine=False)
            self.ff_context = FeedForward(GeluLinear(channels, 4 * channels, "tanh"), channels)

    def modulation(self, embedding: Tensor) -> BlockModulation:
        """What silu(e) (B, D) does to this block."""
        image = self.norm1.affines(embedding)
        if self.norm1_context is None:
            return BlockModulation(image, (), None)
        if self.ff_context is not None:
            return BlockModulation(image, self.norm1_context.affines(embedding), None)
        scale, shift = self.norm1_context.numbers(embedding)  # in this order here alone
        return BlockModulation(image, (), (scale, shift))

    def forward(self, x: Tensor, text: Tensor | None, modulation: BlockModulation) -> tuple[Tensor, Tensor | None]:
        (shift, scale, gate), feed = modulation.image[:2]
        normal = self.norm1(x)
        own, other = self.attn(modulated(normal, shift, scale), self._offered(text, modulation))
        x = torch.addcmul(x, gate, own)  # (B, N, D)
        if self.attn2 is not None:
            shift, scale, gate = modulation.image[2]
            x = torch.addcmul(x, gate, self.attn2(modulated(normal, shift, scale))[0])
        shift, scale, gate = feed
        x = torch.addcmul(x, gate, self.ff(modulated(self.norm2(x), shift, scale)))
        if text is None or self.ff_context is None:
            return x, None
        (_, _, gate), feed = modulation.text
        text = torch.addcmul(text, gate, other)  # (B, M, D)
        shift, scale, gate = feed
        return x, torch.addcmul(text, gate, self.ff_context(modulated(self.norm2_context(text), shift, scale)))

    def _offered(self, text: Tensor | None, modulation: BlockModulation) -> Tensor | None:
        """The text as attention sees it."""
        if text is None or self.norm1_context is None:
            return None
        scale, shift = modulation.read or (modulation.text[0][1], modulation.text[0][0])
        return modulated(self.norm1_context(text), shift, scale)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class ClockTextEmbedding(nn.Module):
    """e = perceptron(sinusoid t) + perceptron(pooled)."""

    def __init__(self, pooled_channels: int, channels: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(CLOCK_CHANNELS, channels)
        self.text_embedder = TimestepEmbedding(pooled_channels, channels)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        clock = sinusoid(t, CLOCK_CHANNELS, cosine_first=True, shift=0.0).to(pooled.dtype)  # (B, 256)
        return self.timestep_embedder(clock) + self.text_embedder(pooled)  # (B, D)


class PatchEmbed(nn.Module):
    """Patches of p x p as tokens, with their places where the weights keep a table: its middle, cut to the picture.

    The table (1, S S, D) covers S x S patches and is stored with the weights; S = None: no places are added.
    """

    pos_embed: Tensor

    def __init__(self, in_channels: int, channels: int, patch: int, size: int | None = None, base: int = 1) -> None:
        super().__init__()
        self.patch, self.size = patch, size
        self.proj = nn.Conv2d(in_channels, channels, patch, stride=patch)
        if size is not None:
            self.register_buffer("pos_embed", place_table(channels, size, base))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        x = self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)
        return (x if self.size is None else x + self._places(rows, columns, self.size).to(x)).contiguous()

    def _places(self, rows: int, columns: int, size: int) -> Tensor:
        if max(rows, columns) > size:
            raise InputError(
                f"a latent of {rows * self.patch} x {columns * self.patch} is too large: this network knows "
                f"the places of {size * self.patch} x {size * self.patch} at most; ask for a smaller picture"
            )
        top, left = (size - rows) // 2, (size - columns) // 2
        table = self.pos_embed.unflatten(1, (size, size))  # (1, S, S, D)
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)  # (1, N, D)


def place_table(channels: int, size: int, base: int) -> Tensor:
    """Sines and cosines of each patch's column and row, (1, size * size, channels) in float32.

    omega_i = 10000^(-4 i / channels); (sin, cos) of the column, then of the row. Places run from 0 to `base`.
    """
    # places are rounded to float32 before they are multiplied, as they were when the published tables were made
    place = (torch.arange(size, dtype=torch.float32) / (size / base)).double()
    omega = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))
    angle = place[:, None] * omega  # (S, D / 4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (S, D / 2)
    column, row = line.expand(size, size, -1), line[:, None].expand(size, size, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)[None]
