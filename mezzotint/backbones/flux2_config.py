"""The sizes of FLUX.2: the published config.json, and the three models there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mezzotint.layers.config import read_config

FIXED: dict[str, object] = {"patch_size": 1}  # the codec makes the patches


@dataclass(frozen=True, slots=True)
class Flux2Config:
    """The fields of a Flux2Transformer2DModel's config.json; the defaults are FLUX.2 [dev]."""

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> Flux2Config:
        """Read a Flux2Transformer2DModel's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, FIXED)

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Width of a perceptron."""
        return int(self.channels * self.mlp_ratio)


def flux2_dev() -> Flux2Config:
    """FLUX.2 [dev], 32.2 G parameters: it is told the guidance scale and reads Mistral Small's 3 x 5120 channels."""
    return Flux2Config()


def klein_4b() -> Flux2Config:
    """FLUX.2 [klein] 4B, base and distilled, 3.9 G parameters: reads Qwen3-4B's 3 x 2560 channels."""
    return Flux2Config(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


def klein_9b() -> Flux2Config:
    """FLUX.2 [klein] 9B, base and distilled, 9.1 G parameters: reads Qwen3-8B's 3 x 4096 channels."""
    return Flux2Config(
        num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
    )
