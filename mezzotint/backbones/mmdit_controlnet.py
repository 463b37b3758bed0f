"""Control networks for Stable Diffusion 3 and 3.5: they see the noisy latents, the clock and a hint in latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.mmdit import MMDiT, check_streams
from mezzotint.backbones.unet import needed
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.config import one_of, read_config
from mezzotint.layers.joint import ClockTextEmbedding, JointBlock, PatchEmbed, Text


@dataclass(frozen=True, slots=True)
class MMDiTControlNetConfig:
    """The fields of an SD3ControlNetModel's config.json; `joint_attention_dim` None: it does not read the text."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int | None = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int | None = 96
    extra_conditioning_channels: int = 0
    dual_attention_layers: tuple[int, ...] | tuple[()] = ()
    qk_norm: str | None = None
    pos_embed_type: str | None = "sincos"
    use_pos_embed: bool = True
    force_zeros_for_pooled_projection: bool = True

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> MMDiTControlNetConfig:
        """Read an SD3ControlNetModel's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, {})

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def reads_tokens(self) -> bool:
        """Whether the text is read, or the pooled prompt alone."""
        return self.joint_attention_dim is not None

    @property
    def reads_pooled(self) -> bool:
        """Whether the pooled prompt is read; a network trained on zeros in its place puts them there itself."""
        return not self.force_zeros_for_pooled_projection

    @property
    def hint_shift(self) -> bool:
        """Whether the hint's latents are (z - shift) * scale, as the backbone's are, or z * scale.

        Published networks for pictures that were trained on zeros for the pooled prompt were trained without the shift;
        those that repaint (they see a mask in an extra channel, 1 where the picture is kept) with it.
        """
        return self.reads_pooled or self.extra_conditioning_channels > 0


class MMDiTControlNet(nn.Module):
    """What to add behind each of an MMDiT's blocks, so that the picture follows a hint.

    x (B, C, h, w), t (B,), conditioning (.pooled, and .tokens where they are read), hint (B, C + extra, h, w) latents
    -> one residual (B, N, D) for each of the network's own blocks, to be scaled by the strength. Where the weights
    hold no patch embedding (Stability's networks for SD 3.5 Large) the backbone's is used: `attach` it once.
    """

    hint = "latents"

    def __init__(self, config: MMDiTControlNetConfig) -> None:
        super().__init__()
        channels, patch = config.channels, config.patch_size
        one_of("pos_embed_type", config.pos_embed_type, (None, "sincos"))
        if config.use_pos_embed and config.pos_embed_type == "sincos" and config.pos_embed_max_size is None:
            raise InputError("'pos_embed_max_size' must be given where places are added to the patches")
        self.config = config
        size = config.pos_embed_max_size if config.pos_embed_type == "sincos" else None
        self.pos_embed = self.context_embedder = None
        if config.use_pos_embed:
            self.pos_embed = PatchEmbed(config.in_channels, channels, patch, size, config.sample_size // patch)
        self.time_text_embed = ClockTextEmbedding(config.pooled_projection_dim, channels)
        if config.joint_attention_dim is not None:
            check_streams(channels, config.caption_projection_dim, config.qk_norm)
            self.context_embedder = nn.Linear(config.joint_attention_dim, channels)
        self.transformer_blocks = nn.ModuleList(self._block(config, index) for index in range(config.num_layers))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(channels, channels) for _ in range(config.num_layers))
        self.pos_embed_input = PatchEmbed(config.in_channels + config.extra_conditioning_channels, channels, patch)
        self._backbone: tuple[PatchEmbed, ...] = ()  # in a tuple, so that its weights are not taken for ours

    @staticmethod
    def _block(config: MMDiTControlNetConfig, index: int) -> JointBlock:
        heads = config.num_attention_heads
        if not config.reads_tokens:
            return JointBlock(config.channels, heads, Text.NONE)  # the published class builds these plain
        dual = index in config.dual_attention_layers
        return JointBlock(config.channels, heads, Text.CHANGED, normalise=config.qk_norm is not None, dual=dual)

    @property
    def unread(self) -> tuple[nn.Module, ...]:
        """Layers that change the text of the last block, which nobody reads: no gradient reaches them."""
        last = cast(JointBlock, self.transformer_blocks[-1])
        return tuple(layer for layer in (last.attn.to_add_out, last.ff_context) if layer is not None)

    def attach(self, backbone: MMDiT) -> None:
        """Follow this backbone: InputError where the widths differ; its patch embedding is used if we hold none."""
        ours, theirs = self.config, backbone.config
        for name in ("channels", "patch_size", "in_channels"):
            if getattr(ours, name) != getattr(theirs, name):
                raise InputError(
                    f"this control network was made for another model: its {name} is {getattr(ours, name)}, "
                    f"the model's {getattr(theirs, name)}"
                )
        self._backbone = (backbone.pos_embed,)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, hint: Tensor) -> tuple[Tensor, ...]:
        pooled = needed(conditioning, "pooled")
        if not self.config.reads_pooled:
            pooled = torch.zeros_like(pooled)
        embedding = F.silu(self.time_text_embed(t, pooled))  # (B, D)
        text = None
        if self.context_embedder is not None:
            text = self.context_embedder(needed(conditioning, "tokens"))  # (B, M, D)
        x = self._embed(x) + self.pos_embed_input(hint)  # (B, N, D)
        residuals: list[Tensor] = []
        for block, project in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x, text = block(x, text, cast(JointBlock, block).modulation(embedding))
            residuals.append(project(x))
        return tuple(residuals)

    def _embed(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            return self.pos_embed(x)
        if not self._backbone:
            raise ValueError("this control network reads patches through its backbone: call attach(backbone) first")
        return self._backbone[0](x)
