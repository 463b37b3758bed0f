"""The U-Net: one module for DDPM, ADM and LDM weights, Stable Diffusion 1, 2 and XL, and our own models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.embedding import TimestepEmbedding, sinusoid
from mezzotint.layers.resnet import silu_owned
from mezzotint.layers.stages import DownStage, MidStage, UpStage


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the first half of a U-Net hands on, and what the blocks behind it read again."""

    skips: list[Tensor]  # a feature map for each skip connection, in order; the last is also the middle block's input
    middle: Tensor  # (B, C, h', w') out of the middle block
    told: tuple[Tensor, Tensor | None, Tensor | None]  # silu of the embedding (B, E), text (B, N, D), its mask (B, N)


class UNetEncoder(nn.Module):
    """The half of a U-Net down to its middle block, with all that it is told: a ControlNet is a copy of it.

    What `settings` asks for is read from the conditioning, ValueError where it is missing: `label` (num_class_embeds,
    timestep), `pooled` (identity and projection classes, text_time), `time_ids` (text_time), `tokens` and `mask`
    (cross-attention), `guidance` (time_cond_proj_dim).
    """

    def __init__(self, settings: UNetConfig | ConditionalUNetConfig) -> None:
        super().__init__()
        self.settings = settings
        plan = settings.plan()
        widths = [stage.channels for stage in plan.down]
        self.conv_in = nn.Conv2d(settings.in_channels, widths[0], 3, padding=1)
        self._add_embeddings(settings, plan.clock_channels, plan.time_channels)
        self.down_blocks = nn.ModuleList()
        channels, last = widths[0], len(widths) - 1
        for level, stage in enumerate(plan.down):
            self.down_blocks.append(DownStage(channels, stage, plan.common, shrink=level < last))
            channels = stage.channels
        self.mid_block = None if plan.mid is None else MidStage(plan.mid, plan.mid_common)

    def _add_embeddings(self, config: UNetConfig | ConditionalUNetConfig, width: int, channels: int) -> None:
        """Build what turns the clock, class, guidance scale and picture sizes into the one time embedding."""
        conditional = config if isinstance(config, ConditionalUNetConfig) else None
        guidance = conditional.time_cond_proj_dim if conditional else None
        vector = conditional.projection_class_embeddings_input_dim if conditional else None
        self.time_embedding = TimestepEmbedding(width, channels, guidance)
        self.class_embedding = self.add_embedding = None
        match config.class_embed_type:
            case None if config.num_class_embeds is not None:
                self.class_embedding = nn.Embedding(config.num_class_embeds, channels)
            case "timestep":
                self.class_embedding = TimestepEmbedding(width, channels)
            case "projection" if vector is not None:
                self.class_embedding = TimestepEmbedding(vector, channels)
        if conditional and conditional.addition_embed_type == "text_time" and vector is not None:
            self.add_embedding = TimestepEmbedding(vector, channels)

    def encode(self, x: Tensor, t: Tensor, conditioning: Conditioning, hint: Tensor | float = 0.0) -> Encoded:
        """Down to the middle block; `hint` (B, C, h, w), where there is one, is added behind the first convolution."""
        # every residual block reads silu(e): computed once here, exactly as each would
        embedding = F.silu(self.embed(t, conditioning, x.dtype))  # (B, E)
        context, mask = self._text(conditioning)
        x = self.conv_in(x)  # (B, C, h, w)
        skips = [x if isinstance(hint, float) else x + hint]
        for block in self.down_blocks:
            skips += block(skips[-1], embedding, context, mask)
        x = skips[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, embedding, context, mask)
        return Encoded(skips, x, (embedding, context, mask))

    def embed(self, t: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
        """The clock and everything that is one vector per image, summed: (B, E)."""
        config = self.settings
        guidance = None
        if self.time_embedding.cond_proj is not None:
            # the distilled network was told (g - 1) * 1000 as a sinusoid (Luo et al. 2023, section 4.2)
            scale = (needed(conditioning, "guidance") - 1) * 1000.0
            guidance = sinusoid(scale, self.time_embedding.cond_proj.in_features).to(dtype)
        embedding = self.time_embedding(self._clock(t).to(dtype), guidance)  # (B, E)
        if isinstance(self.class_embedding, nn.Embedding):
            embedding = embedding + self.class_embedding(needed(conditioning, "label"))
        elif config.class_embed_type == "timestep" and self.class_embedding is not None:
            embedding = embedding + self.class_embedding(self._clock(needed(conditioning, "label")).to(dtype))
        elif config.class_embed_type == "identity":
            embedding = embedding + needed(conditioning, "pooled")
        elif self.class_embedding is not None:
            embedding = embedding + self.class_embedding(needed(conditioning, "pooled"))
        if self.add_embedding is not None and isinstance(config, ConditionalUNetConfig):
            embedding = embedding + self.add_embedding(self._picture(config, conditioning).to(dtype))
        return embedding

    def _clock(self, t: Tensor) -> Tensor:
        width = self.time_embedding.linear_1.in_features
        return sinusoid(t, width, self.settings.flip_sin_to_cos, self.settings.freq_shift)

    def _picture(self, config: ConditionalUNetConfig, conditioning: Conditioning) -> Tensor:
        """SDXL's pooled prompt beside its original size, crop and target size (Podell et al. 2023, section 2.2)."""
        pooled, ids = needed(conditioning, "pooled"), needed(conditioning, "time_ids")
        sizes = sinusoid(ids.flatten(), config.addition_time_embed_dim or 0, config.flip_sin_to_cos, config.freq_shift)
        return torch.cat([pooled, sizes.reshape(len(pooled), -1).to(pooled.dtype)], dim=-1)  # (B, P + 6 * 256)

    def _text(self, conditioning: Conditioning) -> tuple[Tensor | None, Tensor | None]:
        if isinstance(self.settings, UNetConfig):
            return None, None
        return needed(conditioning, "tokens"), conditioning.mask


class UNet(UNetEncoder):
    """A convolutional network with skip connections between equal resolutions (Ho et al. 2020; Rombach et al. 2022).

    x (B, C_in, h, w), t (B,) in the network's own clock, conditioning -> raw output (B, C_out, h, w). Beside what its
    first half reads: `concat` is joined behind x on channels, `control` is added to the skip connections, in their
    order, and its last map to the middle block's output (Zhang et al. 2023, eq. 4).
    """

    def __init__(self, config: UNetConfig | ConditionalUNetConfig) -> None:
        super().__init__(config)
        self.config = config
        plan = config.plan()
        skips = plan.skip_channels()
        self.up_blocks = nn.ModuleList()
        channels, last = plan.down[-1].channels, len(plan.up) - 1
        for level, stage in enumerate(plan.up):
            taken = [skips.pop() for _ in range(stage.layers)]
            self.up_blocks.append(UpStage(channels, taken, stage, plan.common, grow=level < last))
            channels = stage.channels
        self.conv_norm_out = nn.GroupNorm(plan.common.groups, channels, plan.common.eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.concat is not None:
            x = torch.cat([x, conditioning.concat], dim=1)  # (B, C_in, h, w)
        encoded = self.encode(x, t, conditioning)
        x, skips = encoded.middle, encoded.skips
        if conditioning.control is not None:
            x = _add_control(skips, x, conditioning.control)
        for block in self.up_blocks:
            x = block(x, skips, *encoded.told)
        return self.conv_out(silu_owned(self.conv_norm_out(x)))  # (B, C_out, h, w)


def _add_control(skips: list[Tensor], middle: Tensor, control: tuple[Tensor, ...]) -> Tensor:
    """Add a map to each skip connection, in place of the old list entries, and return the middle with the last one."""
    if len(control) != len(skips) + 1:
        raise InputError(f"a control network of {len(control)} maps cannot steer a U-Net that takes {len(skips) + 1}")
    for index, extra in enumerate(control[:-1]):
        skips[index] = skips[index] + extra
    return middle + control[-1]


def needed(conditioning: Conditioning, name: str) -> Tensor:
    """The named part of a conditioning; ValueError when the caller did not supply it."""
    value = getattr(conditioning, name)
    if value is None:
        raise ValueError(f"this network was built to read conditioning.{name}, which is missing")
    return value
