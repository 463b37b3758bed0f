"""Configurations of the published U-Nets; `in_channels` of 9 is the inpainting variant (mask and masked latents)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mezzotint.backbones.class_tokens import ClassTokensConfig
from mezzotint.backbones.controlnet import ControlNetConfig
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig

IMAGENET_CLASSES = 1000
GUIDANCE_CHANNELS = 256  # the sinusoid of the guidance scale that consistency models were told


def _levels(attending: str, down: str, up: str, attend: str = "Attn") -> dict[str, Any]:
    """Block types from a line such as "-++": attention at the last two of three levels, finest first."""
    kinds_down = tuple(f"{attend}DownBlock2D" if mark == "+" else down for mark in attending)
    kinds_up = tuple(f"{attend}UpBlock2D" if mark == "+" else up for mark in reversed(attending))
    return {"down_block_types": kinds_down, "up_block_types": kinds_up}


def _ddpm(size: int, widths: tuple[int, ...], attending: str, dropout: float) -> UNetConfig:
    return UNetConfig(
        sample_size=size,
        block_out_channels=widths,
        **_levels(attending, "DownBlock2D", "UpBlock2D"),
        dropout=dropout,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        attention_head_dim=None,
        norm_eps=1e-6,
    )


def ddpm_cifar10() -> UNetConfig:
    """DDPM on CIFAR-10, 32x32 (Ho et al. 2020, appendix B): 35.7 M."""
    return _ddpm(32, (128, 256, 256, 256), "-+--", 0.1)


def ddpm_256() -> UNetConfig:
    """DDPM on CelebA-HQ and LSUN, 256x256 (Ho et al. 2020, appendix B): 114 M."""
    return _ddpm(256, (128, 128, 256, 256, 512, 512), "----+-", 0.0)


def _iddpm(
    size: int, width: int, multiples: tuple[int, ...], attending: str, layers: int, heads: int, scale_shift: bool
) -> UNetConfig:
    return UNetConfig(
        sample_size=size,
        out_channels=6,  # noise, and where the variance lies between its bounds (Nichol & Dhariwal 2021, eq. 15)
        block_out_channels=tuple(width * multiple for multiple in multiples),
        **_levels(attending, "DownBlock2D", "UpBlock2D"),
        layers_per_block=layers,
        attention_head_dim=None,
        num_attention_heads=heads,
        attn_norm_num_groups=32 if scale_shift else None,  # None: as the other norms; but with scale-shift, none
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    )


def iddpm_cifar10() -> UNetConfig:
    """Improved DDPM on CIFAR-10, 32x32: 52.5 M."""
    return replace(_iddpm(32, 128, (1, 2, 2, 2), "-++-", 3, 4, True), dropout=0.3)


def iddpm_imagenet64(classes: int | None = None) -> UNetConfig:
    """Improved DDPM on ImageNet, 64x64: 121 M without classes, 273 M (a wider network) with them."""
    config = _iddpm(64, 128 if classes is None else 192, (1, 2, 3, 4), "--++", 3, 4, True)
    return replace(config, num_class_embeds=classes)


def iddpm_lsun256() -> UNetConfig:
    """Improved DDPM on LSUN, 256x256: 114 M."""
    return _iddpm(256, 128, (1, 1, 2, 2, 4, 4), "----+-", 2, 1, False)


def _adm(
    size: int, widths: tuple[int, ...], attending: str, layers: int, classes: int | None, heads: int | None = None
) -> UNetConfig:
    return UNetConfig(
        sample_size=size,
        out_channels=6,
        block_out_channels=widths,
        **_levels(attending, "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=layers,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=64 if heads is None else None,
        num_attention_heads=heads,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=classes,
    )


def adm_64(classes: int | None = IMAGENET_CLASSES) -> UNetConfig:
    """ADM on ImageNet, 64x64 (Dhariwal & Nichol 2021, table 11): 296 M."""
    return replace(_adm(64, (192, 384, 576, 768), "-+++", 3, classes), dropout=0.1)


def adm_128(classes: int | None = IMAGENET_CLASSES) -> UNetConfig:
    """ADM on ImageNet, 128x128: 422 M; four heads at every level."""
    return _adm(128, (256, 256, 512, 768, 1024), "--+++", 2, classes, heads=4)


def adm_256(classes: int | None = IMAGENET_CLASSES) -> UNetConfig:
    """ADM on ImageNet and LSUN, 256x256: 554 M, with None for classes 553 M."""
    return _adm(256, (256, 256, 512, 512, 1024, 1024), "---+++", 2, classes)


def adm_512(classes: int | None = IMAGENET_CLASSES) -> UNetConfig:
    """ADM on ImageNet, 512x512: 559 M; the finest level has half the width that the clock is told in."""
    config = _adm(512, (128, 256, 256, 512, 512, 1024, 1024), "----+++", 2, classes)
    return replace(config, clock_channels=256, time_embedding_dim=1024)


def ldm4_uncond() -> UNetConfig:
    """LDM-4 on CelebA-HQ, FFHQ and LSUN bedrooms (Rombach et al. 2022, table 12): 274 M."""
    return UNetConfig(sample_size=64, attention_head_dim=32)  # this is the published class's default shape


def ldm4_cin256() -> ClassTokensConfig:
    """LDM-4 on ImageNet by class: 401 M with the table of 1001 rows, the last one "no class"."""
    unet = ConditionalUNetConfig(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        **_levels("-+++", "DownBlock2D", "UpBlock2D", "CrossAttn"),
        attention_head_dim=1,
        cross_attention_dim=512,
    )
    return ClassTokensConfig(unet, IMAGENET_CLASSES + 1)


def ldm8_churches() -> UNetConfig:
    """LDM-8 on LSUN churches: 295 M; eight heads at every level."""
    config = _adm(32, (192, 384, 384, 768, 768), "++++-", 2, None, heads=8)
    return replace(config, in_channels=4, out_channels=4)


def ldm8_text2img() -> ConditionalUNetConfig:
    """LDM-8 on text (LAION-400M): 872 M."""
    return ConditionalUNetConfig(sample_size=32, cross_attention_dim=1280)


def sd1(in_channels: int = 4) -> ConditionalUNetConfig:
    """Stable Diffusion 1.x: 860 M."""
    return ConditionalUNetConfig(sample_size=64, in_channels=in_channels, cross_attention_dim=768)


def sd2(in_channels: int = 4, sample_size: int = 96) -> ConditionalUNetConfig:
    """Stable Diffusion 2.x: 866 M; `sample_size` 64 for the base model of 512 pixels."""
    return ConditionalUNetConfig(
        sample_size=sample_size,
        in_channels=in_channels,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )


def _xl(in_channels: int, widths: tuple[int, ...], attending: str) -> ConditionalUNetConfig:
    return ConditionalUNetConfig(
        sample_size=128,
        in_channels=in_channels,
        block_out_channels=widths,
        **_levels(attending, "DownBlock2D", "UpBlock2D", "CrossAttn"),
        attention_head_dim=tuple(width // 64 for width in widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
    )


def sdxl(in_channels: int = 4) -> ConditionalUNetConfig:
    """Stable Diffusion XL base (Podell et al. 2023): 2.57 G; six numbers about the picture."""
    config = _xl(in_channels, (320, 640, 1280), "-++")
    depths, vector = (1, 2, 10), 1280 + 6 * 256
    return replace(
        config,
        transformer_layers_per_block=depths,
        cross_attention_dim=2048,
        projection_class_embeddings_input_dim=vector,
    )


def sdxl_refiner(in_channels: int = 4) -> ConditionalUNetConfig:
    """Stable Diffusion XL refiner: 2.26 G; five numbers about the picture."""
    config = _xl(in_channels, (384, 768, 1536, 1536), "-++-")
    vector = 1280 + 5 * 256
    return replace(
        config,
        transformer_layers_per_block=4,
        cross_attention_dim=1280,
        projection_class_embeddings_input_dim=vector,
    )


def lcm_sd1() -> ConditionalUNetConfig:
    """A latent consistency model distilled from Stable Diffusion 1.x, told its guidance scale."""
    return replace(sd1(), time_cond_proj_dim=GUIDANCE_CHANNELS)


def lcm_sdxl() -> ConditionalUNetConfig:
    """A latent consistency model distilled from Stable Diffusion XL, told its guidance scale."""
    return replace(sdxl(), time_cond_proj_dim=GUIDANCE_CHANNELS)


def controlnet_sd1() -> ControlNetConfig:
    """ControlNet for Stable Diffusion 1.x (Zhang et al. 2023): 361 M."""
    return ControlNetConfig.of(sd1())


def controlnet_sdxl() -> ControlNetConfig:
    """ControlNet of full depth for Stable Diffusion XL: 1.25 G."""
    return ControlNetConfig.of(sdxl())
