"""The convolutional autoencoder with a Gaussian bottleneck (Kingma & Welling 2014; Rombach et al. 2022, 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from mezzotint.digests import SILENT
from mezzotint.errors import InputError
from mezzotint.layers.attention import ImageAttention
from mezzotint.layers.config import divides, one_of, read_config
from mezzotint.layers.resnet import Downsample, Upsample, silu_owned
from mezzotint.layers.stages import Attend, Common, MidStage, Stage

ATTENDING_DOWN, ATTENDING_UP = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"


@dataclass(frozen=True, slots=True)
class KLVAEConfig:
    """The fields of an AutoencoderKL's config.json; scale and shift belong to the latent space, not to the network."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = field(default=32, metadata=SILENT)
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = field(default=True, metadata=SILENT)
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> KLVAEConfig:
        """Read an AutoencoderKL's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, {})

    @property
    def common(self) -> Common:
        return Common(time_channels=None, groups=self.norm_num_groups, eps=1e-6, downsample_padding=0)

    def check(self) -> None:
        """InputError where the blocks, groups or activation are of a kind that cannot be built."""
        for name, types, built in (
            ("down_block_types", self.down_block_types, ("DownEncoderBlock2D", ATTENDING_DOWN)),
            ("up_block_types", self.up_block_types, ("UpDecoderBlock2D", ATTENDING_UP)),
        ):
            if any(kind not in built for kind in types) or len(types) != len(self.block_out_channels):
                raise InputError(f"'{name}' = {types} cannot be built: {' or '.join(built)} for every level can")
        for width in self.block_out_channels:
            divides("norm_num_groups", width, self.norm_num_groups)
        one_of("act_fn", self.act_fn, ("silu", "swish"))

    def mid(self) -> MidStage:
        attend = Attend.PIXELS if self.mid_block_add_attention else Attend.NONE
        return MidStage(
            Stage(self.block_out_channels[-1], 1, attend, attention_groups=self.norm_num_groups), self.common
        )


class Level(nn.Module):
    """Residual blocks at one resolution, with attention behind each where `attend`, then the change to the next."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        common: Common,
        resampler: nn.Module | None,
        attend: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (layers - 1)
        self.resnets = nn.ModuleList(common.resnet(width, channels) for width in widths)
        self.attentions = nn.ModuleList(
            ImageAttention(channels, 1, common.groups, common.eps) for _ in widths if attend
        )
        self.downsamplers = nn.ModuleList([resampler] if isinstance(resampler, Downsample) else [])
        self.upsamplers = nn.ModuleList([resampler] if isinstance(resampler, Upsample) else [])

    def forward(self, x: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        for resampler in (*self.downsamplers, *self.upsamplers):
            x = resampler(x)
        return x


class Encoder(nn.Module):
    """Pixels to the mean and log-variance of the latents, or to `out_channels`, before the optional 1x1 convolution."""

    def __init__(self, config: KLVAEConfig, out_channels: int | None = None) -> None:
        super().__init__()
        widths, common = config.block_out_channels, config.common
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            attend = config.down_block_types[index] == ATTENDING_DOWN
            shrink = Downsample(width, common.downsample_padding) if index < len(widths) - 1 else None
            self.down_blocks.append(Level(before, width, config.layers_per_block, common, shrink, attend))
        self.mid_block = config.mid()
        self.conv_norm_out = nn.GroupNorm(common.groups, widths[-1], common.eps)
        self.conv_out = nn.Conv2d(widths[-1], out_channels or 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, C, H, W)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x, None)  # (B, C', H / f, W / f)
        return self.conv_out(silu_owned(self.conv_norm_out(x)))  # (B, 2 C_z, H / f, W / f)


class Decoder(nn.Module):
    """Latents to pixels, after the optional 1x1 convolution."""

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        widths, common = config.block_out_channels[::-1], config.common
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = config.mid()
        self.up_blocks = nn.ModuleList()
        for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            attend = config.up_block_types[index] == ATTENDING_UP
            grow = Upsample(width) if index < len(widths) - 1 else None
            self.up_blocks.append(Level(before, width, config.layers_per_block + 1, common, grow, attend))
        self.conv_norm_out = nn.GroupNorm(common.groups, widths[-1], common.eps)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z), None)  # (B, C', h, w)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu_owned(self.conv_norm_out(x)))  # (B, C_out, f h, f w)


class KLVAE(nn.Module):
    """Pixels (B, C, H, W) to Gaussian moments (B, 2 C_z, H / f, W / f) and latents (B, C_z, h, w) back to pixels.

    The first half of the moments is the mean, the second the log-variance; clamping and sampling are the trainer's
    business.
    """

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # how many pixels a latent pixel spans
        self.latent_channels, self.pixel_channels = config.latent_channels, config.in_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latent = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, pixels: Tensor) -> Tensor:
        """Moments of the latents, (B, 2 C_z, h, w)."""
        moments = self.encoder(pixels)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels in about [-1, 1], (B, C, f h, f w)."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
