"""The codec of networks that work on pixels: nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class PixelsConfig:
    """Colour channels in and out."""

    in_channels: int = 3


class Pixels(nn.Module):
    """The identity, so that a pixel-space model (DDPM, ADM) is an ordinary one with factor 1."""

    def __init__(self, config: PixelsConfig | None = None) -> None:
        super().__init__()
        self.config = config or PixelsConfig()
        self.factor = 1
        self.latent_channels = self.pixel_channels = self.config.in_channels

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) as it is."""
        return pixels

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, H, W) as it is."""
        return z
