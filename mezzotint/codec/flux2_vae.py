"""FLUX.2's autoencoder: the convolutional one with its latents cut into patches, whitened by stored statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.codec.kl_vae import Decoder, Encoder, KLVAEConfig
from mezzotint.codec.latent_space import LatentSpace
from mezzotint.digests import SILENT
from mezzotint.layers.config import read_config

PATCH = 2
FIXED: dict[str, object] = {
    "patch_size": (PATCH, PATCH),
    "force_upcast": True,  # written by the class's first release
}


@dataclass(frozen=True, slots=True)
class Flux2VAEConfig:
    """The fields of an AutoencoderKLFlux2's config.json; the defaults are the published autoencoder."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None  # None: as the encoder's
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 32
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = field(default=1024, metadata=SILENT)
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> Flux2VAEConfig:
        """Read an AutoencoderKLFlux2's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, FIXED)

    def half(self, widths: tuple[int, ...]) -> KLVAEConfig:
        """The encoder or the decoder, with levels of these widths, as a part of the plain autoencoder."""
        return KLVAEConfig(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            down_block_types=self.down_block_types,
            up_block_types=self.up_block_types,
            block_out_channels=widths,
            layers_per_block=self.layers_per_block,
            act_fn=self.act_fn,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            mid_block_add_attention=self.mid_block_add_attention,
        )


class Flux2VAE(nn.Module):
    """Pixels (B, 3, H, W) to Gaussian moments (B, 256, H / 16, W / 16), and latents (B, 128, h, w) back to pixels.

    The plain autoencoder has 32 channels at 1/8; 2 x 2 patches of them are the channels here, (c, row, column) with the
    column fastest. The batch norm holds statistics and never runs: see `latent_space`.
    """

    def __init__(self, config: Flux2VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or Flux2VAEConfig()
        encoder = config.half(config.block_out_channels)
        decoder = config.half(config.decoder_block_out_channels or config.block_out_channels)
        encoder.check()
        decoder.check()
        latent = config.latent_channels
        self.factor = PATCH * 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels, self.pixel_channels = latent * PATCH**2, config.in_channels
        self.encoder, self.decoder = Encoder(encoder), Decoder(decoder)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None
        self.bn = nn.BatchNorm2d(self.latent_channels, config.batch_norm_eps, config.batch_norm_momentum, affine=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean, then log-variance, of latents in patches, (B, 8 C_z, H / f, W / f), of pixels in [-1, 1]."""
        moments = self.encoder(pixels)  # (B, 2 C_z, 2 H / f, 2 W / f)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        return F.pixel_unshuffle(moments, PATCH)  # the channels of the mean stay before those of the log-variance

    def decode(self, z: Tensor) -> Tensor:
        """Pixels in about [-1, 1], (B, C, f h, f w)."""
        z = F.pixel_shuffle(z, PATCH)  # (B, C_z, 2 h, 2 w)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


@torch.no_grad()
def keep_statistics(vae: Flux2VAE, mean: Tensor, variance: Tensor) -> None:
    """Make `latent_space` whiten latents of this mean and variance (C,)."""
    assert vae.bn.running_mean is not None and vae.bn.running_var is not None
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_((variance - vae.config.batch_norm_eps).clamp_min(0))


def latent_space(vae: Flux2VAE) -> LatentSpace:
    """The units FLUX.2 works in: backbone = (z - mean) / sqrt(variance + eps), by the stored statistics (C,)."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    assert mean is not None and variance is not None  # a batch norm that tracks statistics has them
    scale = torch.rsqrt(variance.double() + vae.config.batch_norm_eps)
    return LatentSpace(scale=tuple(scale.tolist()), shift=tuple(mean.tolist()))
