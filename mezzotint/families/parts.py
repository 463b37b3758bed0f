"""Every network that a model folder may hold, by its published class name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mezzotint.backbones.class_tokens import ClassTokens, ClassTokensConfig
from mezzotint.backbones.controlnet import ControlNet, ControlNetConfig, UNetControlNetConfig
from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.backbones.flux2 import Flux2, Flux2Config
from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig
from mezzotint.backbones.mmdit_controlnet import MMDiTControlNet, MMDiTControlNetConfig
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.checkpoints import configure
from mezzotint.codec.flux2_vae import Flux2VAE, Flux2VAEConfig
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.codec.patch_pca import PatchPCA, PatchPCAConfig
from mezzotint.codec.pixels import Pixels, PixelsConfig
from mezzotint.codec.vq import VQ, VQConfig
from mezzotint.errors import InputError


@dataclass(frozen=True, slots=True)
class Part:
    """A kind of network: the folder it lives in, its configuration, its module."""

    folder: str
    config: Any  # a dataclass with from_config
    network: Callable[[Any], nn.Module]
    facts: Callable[[Any], dict[str, int | None]] = lambda config: {}  # what a contract checks about a backbone


def _unet_facts(config: UNetConfig | ConditionalUNetConfig) -> dict[str, int | None]:
    tokens = config.cross_attention_dim if isinstance(config, ConditionalUNetConfig) else None
    return {
        "in_channels": config.in_channels, "out_channels": config.out_channels,
        "classes": config.num_class_embeds, "tokens": tokens,
    }  # fmt: skip


def _dit_facts(config: DiTConfig) -> dict[str, int | None]:
    return {
        "in_channels": config.in_channels, "out_channels": config.out_channels or config.in_channels,
        "classes": config.num_embeds_ada_norm + 1,
    }  # fmt: skip


def _joint_facts(config: MMDiTConfig) -> dict[str, int | None]:
    channels = {"in_channels": config.in_channels, "out_channels": config.out_channels or config.in_channels}
    return {**channels, "tokens": config.joint_attention_dim, "pooled": config.pooled_projection_dim}


def _flux2_facts(config: Flux2Config) -> dict[str, int | None]:
    channels = {"in_channels": config.in_channels, "out_channels": config.out_channels or config.in_channels}
    return {**channels, "tokens": config.joint_attention_dim}


def _class_tokens_facts(config: ClassTokensConfig) -> dict[str, int | None]:
    unet = config.unet
    return {"in_channels": unet.in_channels, "out_channels": unet.out_channels, "classes": config.classes}


BACKBONES = {
    "UNet2DModel": Part("unet", UNetConfig, UNet, _unet_facts),
    "UNet2DConditionModel": Part("unet", ConditionalUNetConfig, UNet, _unet_facts),
    "ClassTokens": Part("unet", ClassTokensConfig, ClassTokens, _class_tokens_facts),
    "DiTTransformer2DModel": Part("transformer", DiTConfig, DiT, _dit_facts),
    "SD3Transformer2DModel": Part("transformer", MMDiTConfig, MMDiT, _joint_facts),
    "Flux2Transformer2DModel": Part("transformer", Flux2Config, Flux2, _flux2_facts),
}
AUTOENCODERS = {
    "AutoencoderKL": Part("vae", KLVAEConfig, KLVAE),
    "AutoencoderKLFlux2": Part("vae", Flux2VAEConfig, Flux2VAE),
    "VQModel": Part("vae", VQConfig, VQ),
    "PatchPCA": Part("vae", PatchPCAConfig, PatchPCA),
    "Pixels": Part("vae", PixelsConfig, Pixels),
}
CONTROLS = {
    "ControlNetModel": Part("controlnet", ControlNetConfig, ControlNet),
    "UNetControlNet": Part("controlnet", UNetControlNetConfig, ControlNet),
    "SD3ControlNetModel": Part("controlnet", MMDiTControlNetConfig, MMDiTControlNet),
}


def kind_of(parts: Mapping[str, Part], network: nn.Module) -> tuple[str, Part]:
    """The published class name of a network, and its part."""
    for name, part in parts.items():
        if isinstance(network, part.network) and isinstance(network.config, part.config):  # pyright: ignore
            return name, part
    raise ValueError(f"no part for {type(network).__name__} with {type(network.config).__name__}: add one in parts.py")


def configured(parts: Mapping[str, Part], data: Mapping[str, Any], at: Path) -> tuple[Part, Any]:
    """The part that a config.json names and its configuration; InputError for an unknown class or option."""
    name = data.get("_class_name")
    if name == "Transformer2DModel" and data.get("norm_type") == "ada_norm_zero":  # before DiT had a class of its own
        name = "DiTTransformer2DModel"
    if not isinstance(name, str) or name not in parts:
        raise InputError(f"{at}: _class_name is {name!r}; known here: {', '.join(parts)}")
    return parts[name], configure(parts[name].config, data, at)
