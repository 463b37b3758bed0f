"""The units a backbone works in, against the units an autoencoder writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """backbone = (z - shift) * scale, one number for all channels or one per channel (C,).

    Stable Diffusion scales by one number (Rombach et al. 2022, appendix G), SD 3.5 also shifts; per-channel numbers
    whiten a linear codec.
    """

    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):  # as read from JSON: integers and lists mean the same and must compare equal
            value = getattr(self, name)
            plain = tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)
            object.__setattr__(self, name, plain)
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if any(value == 0 for value in scales):
            raise InputError("a latent space with scale 0 loses every image; give one that makes latents unit variance")

    def to_backbone(self, z: Tensor) -> Tensor:
        """(B, C, h, w) from the autoencoder's units."""
        return (z - _per_channel(self.shift, z)) * _per_channel(self.scale, z)

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) back to the autoencoder's units."""
        return latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> Tensor | float:
    if not isinstance(value, tuple):
        return value
    if len(value) != like.shape[1]:
        raise InputError(f"the latent space has numbers for {len(value)} channels, the latents have {like.shape[1]}")
    return like.new_tensor(value).view(1, -1, 1, 1)
