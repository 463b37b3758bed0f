"""ControlNet: a trained copy of a U-Net's first half that reads a picture and steers the U-Net (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.unet import UNetEncoder
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.config import OURS, one_of, read_config

ORDERS = ("rgb", "bgr")
STEM = (16, 32, 96, 256)  # widths of the hint's convolutions where eight pixels are one latent

FOREIGN = "this control network was made for another model"

FIXED: dict[str, object] = {
    "only_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "global_pool_conditions": False,
    "addition_embed_type_num_heads": 64,
}


@dataclass(frozen=True, slots=True)
class ControlNetConfig:
    """The fields of a ControlNetModel's config.json; `attention_head_dim` is the number of heads, as in the U-Net's.

    The last two are ours: what a distilled U-Net says of itself and that class cannot.
    """

    in_channels: int = 4
    conditioning_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = STEM
    time_embedding_dim: int | None = field(default=None, metadata=OURS)
    time_cond_proj_dim: int | None = field(default=None, metadata=OURS)

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> ControlNetConfig:
        """Read a ControlNetModel's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, FIXED)

    @classmethod
    def of(cls, unet: ConditionalUNetConfig) -> ControlNetConfig:
        """A ControlNet that can take the weights of the U-Net's first half."""
        if not isinstance(unet.layers_per_block, int):
            raise InputError(f"a ControlNet has as many layers at every level, not {unet.layers_per_block}")
        own = {f.name for f in fields(cls)}
        return cls(**{f.name: getattr(unet, f.name) for f in fields(unet) if f.name in own})

    @property
    def encoder(self) -> ConditionalUNetConfig:
        """The U-Net whose first half this is; nothing is said of its second half, which is never built."""
        known = {f.name for f in fields(ConditionalUNetConfig)}
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name in known}
        return ConditionalUNetConfig(up_block_types=("UpBlock2D",) * len(self.block_out_channels), **shared)


@dataclass(frozen=True, slots=True)
class UNetControlNetConfig:
    """A ControlNet for a U-Net without text: that U-Net's fields, and those of the hint; ours alone."""

    unet: UNetConfig
    conditioning_channels: int = 3
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = STEM

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> UNetControlNetConfig:
        """Read config.json: `unet` with the fields of a UNet2DModel's, and the hint's; InputError names any other."""
        unet = data.get("unet")
        if not isinstance(unet, Mapping):
            raise InputError("UNetControlNet needs 'unet', the options of the U-Net that it was copied from")
        stated = UNetConfig.from_config(cast("Mapping[str, object]", unet))
        return read_config(cls, {**data, "unet": stated}, {})

    @classmethod
    def of(cls, unet: UNetConfig) -> UNetControlNetConfig:
        """A ControlNet that can take the weights of the U-Net's first half."""
        return cls(unet)

    @property
    def encoder(self) -> UNetConfig:
        """The U-Net whose first half this is."""
        return self.unet


class HintStem(nn.Module):
    """A picture to the U-Net's first feature map: convolutions, every second of which halves the resolution."""

    def __init__(self, in_channels: int, widths: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        h = F.silu(self.conv_in(picture))  # (B, 16, H, W)
        for block in self.blocks:
            h = F.silu(block(h))
        return self.conv_out(h)  # (B, C, H / f, W / f), f = 8 with the published four widths


SHARED = ("block_out_channels", "cross_attention_dim", "addition_embed_type")  # a U-Net without text has but the first
TOLD = ("num_class_embeds", "time_cond_proj_dim")  # a control network may be told less than its U-Net, never more


class ControlNet(UNetEncoder):
    """c_k = Z_k(E_k(x, t, text, hint)): the U-Net's encoder with the hint, and a 1x1 convolution Z for each map.

    x (B, C, h, w), t (B,), conditioning, hint (B, 3, f h, f w) in [0, 1] -> the maps that `conditioning.control` of a
    U-Net takes: one for each skip connection in order, and last the middle block's (Zhang et al. 2023, eq. 2 to 4).
    What an inpainting U-Net is joined with (`concat`) is read where this network was made from such a one; published
    networks see the noisy latents alone.
    """

    hint = "pixels"  # what is shown to it: a picture, not latents

    def __init__(self, config: ControlNetConfig | UNetControlNetConfig) -> None:
        one_of("controlnet_conditioning_channel_order", config.controlnet_conditioning_channel_order, ORDERS)
        super().__init__(config.encoder)
        self.config = config
        widths = config.encoder.plan().skip_channels()
        self.controlnet_cond_embedding = HintStem(
            config.conditioning_channels, config.conditioning_embedding_out_channels, widths[0]
        )
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    def attach(self, backbone: nn.Module) -> None:
        """Check that this network was made for the backbone's shape; InputError names what differs."""
        their: Any = backbone.config
        for name in (*SHARED, *TOLD):
            ours, theirs = getattr(self.settings, name, None), getattr(their, name, None)
            if ours != theirs and not (name in TOLD and ours is None):
                raise InputError(f"{FOREIGN}: its {name} is {ours}, the model's {theirs}")
        if self.settings.in_channels not in (their.in_channels, their.out_channels):
            ours, theirs = self.settings.in_channels, their.in_channels
            raise InputError(f"{FOREIGN}: it reads {ours} channels, the model {theirs}")

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, hint: Tensor) -> tuple[Tensor, ...]:
        if self.config.controlnet_conditioning_channel_order == "bgr":
            hint = hint.flip(1)
        hint = self.controlnet_cond_embedding(hint.to(x.dtype))  # (B, C_0, h, w)
        if hint.shape[-2:] != x.shape[-2:]:
            raise InputError(
                f"the control picture gives a map of {hint.shape[-1]}x{hint.shape[-2]} where the latents are "
                f"{x.shape[-1]}x{x.shape[-2]}: give it the size of the image that is made"
            )
        if conditioning.concat is not None and self.settings.in_channels > x.shape[1]:
            x = torch.cat([x, conditioning.concat], dim=1)  # (B, C_in, h, w)
        encoded = self.encode(x, t, conditioning, hint)
        maps = [layer(skip) for layer, skip in zip(self.controlnet_down_blocks, encoded.skips, strict=True)]
        return (*maps, self.controlnet_mid_block(encoded.middle))


class Controlled(nn.Module):
    """A backbone with control networks on it, itself a backbone: control = sum over k of scale_k network_k(x, hint_k).

    Each network is called with (x, t, conditioning, conditioning.hints[k]) and answers with a tuple of maps; the
    backbone takes their weighted sums as `conditioning.control`.
    """

    def __init__(self, backbone: nn.Module, networks: Sequence[nn.Module], scales: Sequence[float]) -> None:
        super().__init__()
        if not networks or len(networks) != len(scales):
            raise ValueError(f"{len(networks)} control networks and {len(scales)} scales")
        self.config: Any = backbone.config
        self.skippable: int = getattr(backbone, "skippable", 0)
        self.backbone, self.networks, self.scales = backbone, nn.ModuleList(networks), tuple(scales)
        for network in networks:
            cast(Any, network).attach(backbone)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return steered(self.backbone, list(self.networks), self.scales, x, t, conditioning)  # (B, C_out, h, w)


def steered(
    backbone: nn.Module, networks: Sequence[nn.Module], scales: Sequence[float], x: Tensor, t: Tensor,
    conditioning: Conditioning,
) -> Tensor:  # fmt: skip
    """The backbone's output (B, C_out, h, w) under control networks, one hint for each in `conditioning.hints`."""
    hints = conditioning.hints or ()
    if len(hints) != len(networks):
        raise ValueError(f"{len(networks)} control networks were given {len(hints)} hints")
    told, dtype = replace(conditioning, hints=None, control=None), next(backbone.parameters()).dtype
    control: list[Tensor] = []
    for network, hint, scale in zip(networks, hints, scales, strict=True):
        maps = [scale * part for part in network(x, t, told, hint)]
        if control and len(maps) != len(control):
            raise InputError(f"control networks of {len(control)} and {len(maps)} maps cannot steer together")
        control = [a + b for a, b in zip(control, maps, strict=True)] if control else maps
    # in training the backbone may be narrower than what trains
    told = replace(told, control=tuple(control)).map(lambda part: part.to(dtype) if part.is_floating_point() else part)
    return backbone(x.to(dtype), t, told)
