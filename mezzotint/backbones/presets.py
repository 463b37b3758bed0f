"""Sizes for networks of our own: heads are 64 wide, since CPU attention is slow below 40."""

from __future__ import annotations

from mezzotint.backbones.dit import DiTConfig
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.errors import InputError

DIT_SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}  # layers, heads, head width


def dit(name: str, in_channels: int, out_channels: int, classes: int, sample_size: int) -> DiTConfig:
    """A DiT of a published size and patch, 'S/2' to 'XL/8' (Peebles & Xie 2023, table 1); `classes` but the null."""
    size, _, patch = name.partition("/")
    if size not in DIT_SIZES or patch not in ("2", "4", "8"):
        raise InputError(f"there is no DiT '{name}': sizes are {', '.join(DIT_SIZES)}, patches 2, 4, 8, as in 'S/2'")
    layers, heads, head = DIT_SIZES[size]
    return DiTConfig(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=in_channels,
        out_channels=out_channels,
        sample_size=sample_size,
        patch_size=int(patch),
        num_embeds_ada_norm=classes,
    )


def small_latent_unet(
    in_channels: int, out_channels: int, classes: int | None = None, width: int = 64, sample_size: int = 16
) -> UNetConfig:
    """A U-Net for 16x16 latents, attention at 8x8 and 4x4; `classes` counts the "no class" entry.

    Widths (w, 2w, 2w), two blocks a level, heads of 64, scale-shift norm: 7.3 M parameters and 0.8 GFLOP an image at
    width 64, 16.4 M and 1.7 at 96, 29.1 M and 3.1 at 128.
    """
    return UNetConfig(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width, 2 * width),
        attention_head_dim=64,
        attn_norm_num_groups=16,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=classes,
    )


def small_text_unet(
    in_channels: int, out_channels: int, text_channels: int, width: int = 64, sample_size: int = 16
) -> ConditionalUNetConfig:
    """The same shape with cross-attention to text of `text_channels` at the two lower resolutions, heads of 64.

    10.8 M parameters and 1.0 GFLOP an image at width 64.
    """
    return ConditionalUNetConfig(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width, 2 * width),
        attention_head_dim=(1, width // 32, width // 32),
        norm_num_groups=16,
        cross_attention_dim=text_channels,
        use_linear_projection=True,
    )
