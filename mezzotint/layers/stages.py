"""A U-Net's levels: residual blocks, attention behind each, and a change of resolution at the end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from mezzotint.layers.attention import ImageAttention
from mezzotint.layers.resnet import Downsample, Resample, ResnetBlock, Upsample
from mezzotint.layers.transformer import SpatialTransformer


class Attend(StrEnum):
    """What stands behind each residual block of a level."""

    NONE = "none"
    PIXELS = "pixels"  # self-attention over the feature map
    TEXT = "text"  # a transformer with cross-attention


@dataclass(frozen=True, slots=True)
class Common:
    """What all blocks of one network share."""

    time_channels: int | None
    groups: int
    eps: float
    scale_shift: bool = False
    dropout: float = 0.0
    context_channels: int = 0
    linear_projection: bool = False
    downsample_padding: int = 1
    output_scale: float = 1.0

    def resnet(self, in_channels: int, out_channels: int, resample: Resample = Resample.NONE) -> ResnetBlock:
        return ResnetBlock(
            in_channels,
            out_channels,
            time_channels=self.time_channels,
            groups=self.groups,
            eps=self.eps,
            scale_shift=self.scale_shift,
            dropout=self.dropout,
            output_scale=self.output_scale,
            resample=resample,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """One level of a U-Net."""

    channels: int
    layers: int  # residual blocks
    attend: Attend = Attend.NONE
    heads: int = 1
    depth: int = 1  # transformer blocks in each attention
    attention_groups: int | None = None  # normalisation groups before pixel attention; None: no normalisation there
    residual_resample: bool = False  # change resolution in a residual block, not in a bare convolution

    def attention(self, common: Common) -> nn.Module:
        if self.attend is Attend.PIXELS:
            return ImageAttention(self.channels, self.heads, self.attention_groups, common.eps, common.output_scale)
        return SpatialTransformer(
            self.channels, self.heads, self.depth, common.context_channels, common.groups, common.linear_projection
        )


class DownStage(nn.Module):
    """Residual blocks with attention, then half the resolution unless this is the deepest level."""

    def __init__(self, in_channels: int, stage: Stage, common: Common, shrink: bool) -> None:
        super().__init__()
        widths = [in_channels] + [stage.channels] * (stage.layers - 1)
        self.resnets = nn.ModuleList(common.resnet(width, stage.channels) for width in widths)
        attending = stage.attend is not Attend.NONE
        self.attentions = nn.ModuleList(stage.attention(common) for _ in widths if attending)
        self.downsamplers = nn.ModuleList()
        if shrink and stage.residual_resample:
            self.downsamplers.append(common.resnet(stage.channels, stage.channels, Resample.DOWN))
        elif shrink:
            self.downsamplers.append(Downsample(stage.channels, common.downsample_padding))

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> list[Tensor]:
        """Every intermediate feature map, the last of which goes on: they are the skip connections."""
        outputs: list[Tensor] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)  # (B, C, H, W)
            if self.attentions:
                x = self.attentions[index](x, context, mask)
            outputs.append(x)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(x, embedding))  # (B, C, H / 2, W / 2)
        return outputs


class MidStage(nn.Module):
    """A residual block, then attention and another residual block for each layer."""

    def __init__(self, stage: Stage, common: Common) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(common.resnet(stage.channels, stage.channels) for _ in range(1 + stage.layers))
        attending = stage.attend is not Attend.NONE
        self.attentions = nn.ModuleList(stage.attention(common) for _ in range(stage.layers) if attending)

    def forward(
        self, x: Tensor, embedding: Tensor | None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = self.resnets[0](x, embedding)  # (B, C, H, W)
        for index, resnet in enumerate(list(self.resnets)[1:]):
            if self.attentions:
                x = self.attentions[index](x, context, mask)
            x = resnet(x, embedding)
        return x


class UpStage(nn.Module):
    """Residual blocks that each read one skip connection, with attention, then twice the resolution."""

    def __init__(self, in_channels: int, skip_channels: list[int], stage: Stage, common: Common, grow: bool) -> None:
        super().__init__()
        widths = [in_channels] + [stage.channels] * (stage.layers - 1)
        self.resnets = nn.ModuleList(
            common.resnet(width + skip, stage.channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        attending = stage.attend is not Attend.NONE
        self.attentions = nn.ModuleList(stage.attention(common) for _ in widths if attending)
        self.upsamplers = nn.ModuleList()
        if grow and stage.residual_resample:
            self.upsamplers.append(common.resnet(stage.channels, stage.channels, Resample.UP))
        elif grow:
            self.upsamplers.append(Upsample(stage.channels))

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        embedding: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Takes its skip connections off the end of `skips`."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), embedding)  # (B, C, H, W)
            if self.attentions:
                x = self.attentions[index](x, context, mask)
        for upsampler in self.upsamplers:
            height, width = skips[-1].shape[-2:]
            odd = (height, width) != (2 * x.shape[-2], 2 * x.shape[-1])
            x = upsampler(x, embedding, (height, width) if odd else None)  # (B, C, 2 H, 2 W)
        return x
