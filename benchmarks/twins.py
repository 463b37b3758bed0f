"""Reference networks with plain random weights, and ours loaded strictly from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.conditioning import Conditioning, stack

library: Any = diffusers  # its annotations are narrower than what it takes
IMAGES = 2


@dataclass(frozen=True, slots=True)
class Backbone:
    """A reference network, ours with its weights, and how each is told the condition and its absence."""

    theirs: Any
    ours: nn.Module
    size: int
    told: dict[str, Tensor]  # the reference's arguments, [unconditional, conditional] in one batch
    conditioning: Conditioning  # the same for ours, [conditional, unconditional]


def channels_last(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return twin


def spread_weights(module: nn.Module) -> nn.Module:
    """Plain random weights everywhere, so that no layer is zero and none is skipped by luck."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return module.eval()


def small_unet(tiny: bool) -> Backbone:
    """A text U-Net of Stable Diffusion's shape with heads of 64: 64, 128, 256 channels on 32x32 latents."""
    theirs: Any = spread_weights(
        library.UNet2DConditionModel(
            block_out_channels=(32, 64, 64) if tiny else (64, 128, 256),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(1, 2, 4),  # the number of heads
            cross_attention_dim=384,
        )
    )
    ours = UNet(ConditionalUNetConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    size = 8 if tiny else 32
    empty, text = torch.randn(2, IMAGES, 77, 384, generator=torch.Generator().manual_seed(1))
    told = stack([Conditioning(tokens=text), Conditioning(tokens=empty)])
    return Backbone(theirs, ours, size, {"encoder_hidden_states": torch.cat([empty, text])}, told)


def small_dit(tiny: bool) -> Backbone:
    """DiT-S/2 on 32x32 latents, 256 tokens."""
    theirs: Any = spread_weights(
        library.DiTTransformer2DModel(
            num_layers=2 if tiny else 12,
            num_attention_heads=2 if tiny else 6,
            attention_head_dim=64,
            sample_size=8 if tiny else 32,
        )
    )
    ours = DiT(DiTConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    label, null = torch.tensor([7, 400]), torch.tensor([1000, 1000])
    told = stack([Conditioning(label=label), Conditioning(label=null)])
    return Backbone(theirs, ours, theirs.config.sample_size, {"class_labels": torch.cat([null, label])}, told)


def small_vae(tiny: bool) -> tuple[Any, KLVAE, Tensor]:
    """A small VAE, 32x32 latents to 128x128 pixels."""
    theirs: Any = spread_weights(
        library.AutoencoderKL(
            block_out_channels=(32, 32, 64) if tiny else (32, 64, 128),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
        )
    )
    ours = KLVAE(KLVAEConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    size = 8 if tiny else 32
    return theirs, ours, torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(2))
