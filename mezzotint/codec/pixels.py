"""The codec of networks that work on pixels: nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mezzotint.errors import InputError


@dataclass(frozen=True, slots=True)
class PixelsConfig:
    """Colour channels in and out."""

    in_channels: int = 3

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> PixelsConfig:
        """Read config.json; keys with a leading underscore are the writer's own."""
        options = {key: value for key, value in data.items() if not key.startswith("_")}
        channels = options.pop("in_channels", 3)
        if options or channels not in (1, 3):
            raise InputError(f"Pixels knows one option, 'in_channels', 1 or 3; not {dict(data)}")
        return cls(1 if channels == 1 else 3)


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
