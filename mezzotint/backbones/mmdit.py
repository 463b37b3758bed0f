"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.unet import needed
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.config import one_of, read_config
from mezzotint.layers.joint import (
    AdaptiveNorm,
    BlockModulation,
    ClockTextEmbedding,
    JointBlock,
    PatchEmbed,
    Text,
    modulated,
)

QK_NORMS = (None, "rms_norm")


@dataclass(frozen=True, slots=True)
class MMDiTConfig:
    """The fields of an SD3Transformer2DModel's config.json; sizes are in latent pixels, the table's in patches."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] | tuple[()] = ()
    qk_norm: str | None = None

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> MMDiTConfig:
        """Read an SD3Transformer2DModel's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, {})

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def check_streams(channels: int, caption_channels: int, qk_norm: str | None) -> None:
    """Refuse widths and options that two joined streams cannot have."""
    one_of("qk_norm", qk_norm, QK_NORMS)
    if channels % 4:
        raise InputError(f"a width divisible by 4 is needed; heads x head_dim = {channels}")
    if caption_channels != channels:
        raise InputError(f"'caption_projection_dim' = {caption_channels} must be heads x head_dim = {channels}")


@dataclass(frozen=True, slots=True)
class Modulations:
    """All that a level and a pooled prompt do to the network."""

    blocks: tuple[BlockModulation, ...]
    output: tuple[Tensor, Tensor]  # scale and shift, (B, 1, D) each


class MMDiT(nn.Module):
    """Picture patches and text tokens in two streams that meet in every attention.

    x (B, C_in, h, w) with h and w divisible by p, t (B,) from 0 to 1000, conditioning.tokens (B, M, D_text) and
    .pooled (B, P) -> (B, C_out, h, w). conditioning.skip leaves blocks out; conditioning.control (each (B, N, D)) is
    added to the picture behind the blocks, n residuals spread evenly over L blocks, the last block excepted. What
    depends on (t, pooled) alone is `modulations`: a caller who keeps them computes them once for each level and calls
    `apply_modulations`, with the same result to the last bit.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        channels, last = config.channels, config.num_layers - 1
        check_streams(channels, config.caption_projection_dim, config.qk_norm)
        self.config = config
        self.skippable = config.num_layers  # blocks that conditioning.skip may leave out
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        patch = config.patch_size
        self.pos_embed = PatchEmbed(
            config.in_channels, channels, patch, config.pos_embed_max_size, config.sample_size // patch
        )
        self.time_text_embed = ClockTextEmbedding(config.pooled_projection_dim, channels)
        self.context_embedder = nn.Linear(config.joint_attention_dim, channels)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                channels,
                config.num_attention_heads,
                Text.READ if index == last else Text.CHANGED,
                normalise=config.qk_norm is not None,
                dual=index in config.dual_attention_layers,
            )
            for index in range(config.num_layers)
        )
        self.norm_out = AdaptiveNorm(channels, 2)
        self.proj_out = nn.Linear(channels, patch * patch * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.apply_modulations(x, self.modulations(t, needed(conditioning, "pooled")), conditioning)

    def modulations(self, t: Tensor, pooled: Tensor) -> Modulations:
        """What the level t (B,) and the pooled prompt (B, P) do to every block."""
        embedding = F.silu(self.time_text_embed(t, pooled))  # (B, D), the same for all
        blocks = (cast(JointBlock, block).modulation(embedding) for block in self.transformer_blocks)
        scale, shift = self.norm_out.numbers(embedding)
        return Modulations(tuple(blocks), (scale, shift))

    def apply_modulations(self, x: Tensor, modulations: Modulations, conditioning: Conditioning) -> Tensor:
        """The network at a level and prompt prepared by `modulations`; (B, C_in, h, w) -> (B, C_out, h, w)."""
        if conditioning.concat is not None:
            x = torch.cat([x, conditioning.concat], dim=1)  # (B, C_in, h, w)
        patch, last = self.config.patch_size, self.config.num_layers - 1
        rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
        control = conditioning.control or ()
        x = self.pos_embed(x)  # (B, N, D)
        text: Tensor | None = self.context_embedder(needed(conditioning, "tokens"))  # (B, M, D)
        for index, block in enumerate(self.transformer_blocks):
            if index not in conditioning.skip:
                x, text = block(x, text, modulations.blocks[index])
            if control and index < last:
                # as a quotient of floats: exact whole numbers would choose another residual for some L and n
                x = x + control[int(index / (self.config.num_layers / len(control)))]
        scale, shift = modulations.output
        x = self.proj_out(modulated(self.norm_out(x), shift, scale))  # (B, N, p p C_out)
        x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, p, p, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C_out, h, w)


def sd3_medium() -> MMDiTConfig:
    """Stable Diffusion 3 Medium: 2.0 B parameters."""
    return MMDiTConfig(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )  # fmt: skip


def sd35_medium() -> MMDiTConfig:
    """Stable Diffusion 3.5 Medium, whose first thirteen blocks attend twice: 2.2 B parameters."""
    return MMDiTConfig(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip


def sd35_large() -> MMDiTConfig:
    """Stable Diffusion 3.5 Large: 8.1 B parameters."""
    return MMDiTConfig(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
    )  # fmt: skip
