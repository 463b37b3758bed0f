"""The convolutional autoencoder with a codebook (van den Oord et al. 2017; Esser et al. 2021): LDM's f4 and f8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.codec.kl_vae import Decoder, Encoder, KLVAEConfig
from mezzotint.digests import SILENT
from mezzotint.layers.config import read_config

ROWS = 4096  # vectors looked up at a time: with 8192 codes their distances fill 128 MiB


@dataclass(frozen=True, slots=True)
class VQConfig:
    """The fields of a VQModel's config.json; the scale belongs to the latent space, not to the network."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int | tuple[int, int] = field(default=32, metadata=SILENT)
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None  # channels of a code; None: latent_channels
    scaling_factor: float = 1.0  # as LDMs over codes were trained; their files are silent
    mid_block_add_attention: bool = True
    force_upcast: bool = False

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> VQConfig:
        """Read a VQModel's config.json; InputError names any option that cannot be built."""
        config = read_config(cls, data, {"norm_type": "group", "lookup_from_codebook": False})
        return replace(config, vq_embed_dim=config.vq_embed_dim or config.latent_channels)

    @property
    def convolutions(self) -> KLVAEConfig:
        """The KL autoencoder of the same shape, whose encoder and decoder this one has."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(KLVAEConfig)}
        options: dict[str, Any] = {name: getattr(self, name) for name in shared}
        return KLVAEConfig(**options)


class Codebook(nn.Module):
    """z_q = e_k with k = argmin_j |z - e_j| at each position (van den Oord et al. 2017, eq. 1)."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)  # so near each other that all are in use

    def forward(self, z: Tensor) -> Tensor:
        codes = self.embedding.weight
        vectors = z.detach().movedim(1, -1).reshape(-1, z.shape[1]).float()  # (B h w, C); in half another code may win
        table = codes.detach().float()
        nearest = torch.cat([torch.cdist(rows, table).argmin(1) for rows in vectors.split(ROWS)])
        found = F.embedding(nearest, codes).unflatten(0, (len(z), *z.shape[2:]))  # (B, h, w, C)
        return found.movedim(-1, 1)

    def learn(self, z: Tensor, commitment: float) -> tuple[Tensor, Tensor]:
        """z_q whose gradient goes straight through to z, and what brings codes to latents and latents to codes.

        mean (sg(z) - z_q)^2 + commitment * mean (z - sg(z_q))^2 (van den Oord et al. 2017, eq. 3, as means).
        """
        found, exact = self(z), z.to(self.embedding.weight.dtype)  # a network in half precision has whole codes
        loss = (exact.detach() - found).square().mean() + commitment * (exact - found.detach()).square().mean()
        return z + (found - z).detach(), loss


class VQ(nn.Module):
    """Pixels (B, C, H, W) to latents (B, C_z, H / f, W / f) before the codebook, and through the codebook back.

    Latent diffusion works on the continuous latents and lets the codebook be the decoder's first layer (Rombach et al.
    2022, section 3.1): `encode` does not quantise, `decode` does.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        shape = config.convolutions
        shape.check()
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # how many pixels a latent pixel spans
        self.latent_channels = config.vq_embed_dim or config.latent_channels
        self.pixel_channels = config.in_channels
        self.encoder = Encoder(shape, out_channels=config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, self.latent_channels, 1)
        self.quantize = Codebook(config.num_vq_embeddings, self.latent_channels)
        self.post_quant_conv = nn.Conv2d(self.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(shape)

    def encode(self, pixels: Tensor) -> Tensor:
        """Continuous latents, (B, C_z, h, w)."""
        return self.quant_conv(self.encoder(pixels))

    def decode(self, z: Tensor) -> Tensor:
        """Pixels in about [-1, 1], (B, C, f h, f w), of the codes nearest to z."""
        return self.decode_codes(self.quantize(z))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pixels in about [-1, 1], (B, C, f h, f w), of latents that went through the codebook."""
        return self.decoder(self.post_quant_conv(codes))
