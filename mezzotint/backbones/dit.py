"""The diffusion transformer (Peebles & Xie 2023): patches as tokens, steered by adaptive layer norms alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.unet import needed
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.attention import Attention
from mezzotint.layers.config import OURS, one_of, read_config
from mezzotint.layers.embedding import TimestepEmbedding, sinusoid
from mezzotint.layers.transformer import FeedForward, GeluLinear

CLOCK_CHANNELS = 256
APPROXIMATION = {"gelu-approximate": "tanh", "gelu": "none"}
FIXED: dict[str, object] = {
    "dropout": 0.0,
    "norm_type": "ada_norm_zero",
    # written by the older class that the released weights were saved from
    "cross_attention_dim": None,
    "double_self_attention": False,
    "only_cross_attention": False,
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "attention_type": "default",
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """The fields of a DiTTransformer2DModel's config.json; `num_embeds_ada_norm` counts classes without "no class".

    The last is ours: that class spaces the clock's frequencies with shift 1, the original code with 0, and both read
    the same weights.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    freq_shift: float = field(default=1, metadata=OURS)

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> DiTConfig:
        """Read a DiTTransformer2DModel's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, FIXED)

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class Embedder(nn.Module):
    """e = perceptron(sinusoid t) + table[label]; the last row of the table is "no class"."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(CLOCK_CHANNELS, channels)
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, channels)})

    def forward(self, clock: Tensor, label: Tensor) -> Tensor:
        return self.timestep_embedder(clock) + self.class_embedder["embedding_table"](label)  # (B, D)


class Modulation(nn.Module):
    """adaLN: from an embedding to shift, scale and gate for attention and for the perceptron.

    Every block stores an embedder of its own, as the published files do (copies of one another in the released
    weights).
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.emb = Embedder(classes, channels)
        self.linear = nn.Linear(channels, 6 * channels)
        self.norm = nn.LayerNorm(channels, 1e-6, elementwise_affine=False)

    def forward(self, clock: Tensor, label: Tensor) -> Tensor:
        return self.linear(F.silu(self.emb(clock, label)))[:, None]  # (B, 1, 6 D)


class Block(nn.Module):
    """x += gate attention(m(norm x)); x += gate perceptron(m(norm x)), where m(h) = h (1 + scale) + shift."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        channels = config.channels
        self.norm1 = Modulation(config.num_embeds_ada_norm, channels)
        self.attn1 = Attention(channels, config.num_attention_heads, bias=config.attention_bias)
        self.norm3 = nn.LayerNorm(channels, config.norm_eps, elementwise_affine=config.norm_elementwise_affine)
        widen = GeluLinear(channels, 4 * channels, APPROXIMATION[config.activation_fn])
        self.ff = FeedForward(widen, channels)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)  # (B, 1, D) each
        x = torch.addcmul(x, gate, self.attn1(torch.addcmul(shift, self.norm1.norm(x), 1 + scale)))  # (B, N, D)
        return torch.addcmul(x, gate_ff, self.ff(torch.addcmul(shift_ff, self.norm3(x), 1 + scale_ff)))


@dataclass(frozen=True, slots=True)
class Modulations:
    """All that a level and a label do to the network: one tensor a block, and one for the output."""

    blocks: tuple[Tensor, ...]  # (B, 1, 6 D) each
    output: Tensor  # (B, 1, 2 D)


class DiT(nn.Module):
    """Patches of p x p pixels are tokens; the clock and the class label act through adaptive layer norms only.

    x (B, C_in, h, w) with h and w divisible by p, t (B,), conditioning.label (B,) -> (B, C_out, h, w). C_out may be 2
    C_in where a variance was learned; the family splits it. What depends on (t, label) alone is `modulations`: a
    caller who keeps them computes them once for each level and calls `apply_modulations`, with the same result to the
    last bit.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        one_of("activation_fn", config.activation_fn, tuple(APPROXIMATION))
        if config.channels % 4:
            raise InputError(f"a DiT needs a width divisible by 4; heads x head_dim = {config.channels}")
        self.config = config
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        patch, channels = config.patch_size, config.channels
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, channels, patch, stride=patch)})
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(channels, 1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(channels, 2 * channels)
        self.proj_out_2 = nn.Linear(channels, patch * patch * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.concat is not None:
            x = torch.cat([x, conditioning.concat], dim=1)  # (B, C_in, h, w)
        return self.apply_modulations(x, self.modulations(t, needed(conditioning, "label")))

    def modulations(self, t: Tensor, label: Tensor) -> Modulations:
        """What the level t (B,) and the label (B,) do to every block."""
        clock = sinusoid(t, CLOCK_CHANNELS, cosine_first=True, shift=self.config.freq_shift)  # (B, 256)
        clock = clock.to(self.proj_out_1.weight.dtype)
        norms = [cast(Block, block).norm1 for block in self.transformer_blocks]
        output = self.proj_out_1(F.silu(norms[0].emb(clock, label)))[:, None]  # reads the first block's embedder
        return Modulations(tuple(norm(clock, label) for norm in norms), output)

    def apply_modulations(self, x: Tensor, modulations: Modulations) -> Tensor:
        """The network at a level and label prepared by `modulations`; (B, C_in, h, w) -> (B, C_out, h, w)."""
        patch = self.config.patch_size
        rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
        table = position_table(self.config.channels, rows, columns, self.config.sample_size // patch)
        x = self.pos_embed["proj"](x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + table.to(x)
        for block, modulation in zip(self.transformer_blocks, modulations.blocks, strict=True):
            x = block(x, modulation)
        shift, scale = modulations.output.chunk(2, dim=-1)
        x = self.proj_out_2(torch.addcmul(shift, self.norm_out(x), 1 + scale))  # (B, N, p p C_out)
        x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, p, p, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C_out, h, w)


@lru_cache(maxsize=32)
def position_table(channels: int, rows: int, columns: int, base: int) -> Tensor:
    """Sines and cosines of each patch's column and row, (rows * columns, channels) in float32.

    omega_i = 10000^(-4 i / channels); (sin, cos) of the column, then of the row. Positions run from 0 to `base`
    whatever the grid, so that a network meets the range it was trained on at any resolution.
    """
    # the table outlives the call: made under inference mode it could not be used in training later
    with torch.inference_mode(False), torch.device("cpu"):
        omega = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))
        y = torch.arange(rows, dtype=torch.float64) * base / rows
        x = torch.arange(columns, dtype=torch.float64) * base / columns
        row, column = (grid.reshape(-1, 1) * omega for grid in torch.meshgrid(y, x, indexing="ij"))
        return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()
