"""A codec: pixels to backbone units and back, whatever the autoencoder."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, cast

from mezzotint.codec.latent_space import LatentSpace
from mezzotint.digests import module_digest, settings_of, tensors_digest
from mezzotint.errors import InputError
from mezzotint.files import sha256_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


DECODING = ("decoder.", "post_quant_conv.", "quantize.", "synthesis")  # parameters that only `decode` uses


class Autoencoder(Protocol):
    """What a codec asks of a network; sizes are plain integers of the autoencoder.

    encode: (B, pixel_channels, H, W) in [-1, 1] -> (B, latent_channels or more, H/factor, W/factor); what a variational
    encoder adds after the mean (the log-variance) is ignored here.
    decode: (B, latent_channels, h, w) -> (B, pixel_channels, h*factor, w*factor).
    """

    config: Any  # a frozen dataclass
    factor: int
    latent_channels: int
    pixel_channels: int

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...


class Codec:
    """An autoencoder together with the latent space that its backbone was trained in.

    It computes in the autoencoder's dtype and answers in that of its argument. `decodes` names the codecs that it came
    from by training the decoder alone: what they encoded, it decodes.
    """

    def __init__(self, autoencoder: nn.Module, space: LatentSpace | None = None, decodes: Iterable[str] = ()) -> None:
        self.autoencoder = autoencoder
        self.space = space or LatentSpace()
        self.decodes = tuple(decodes)
        self._network = cast(Autoencoder, autoencoder)  # the same object, typed as what is asked of it
        self.factor = self._network.factor
        self.channels = self._network.latent_channels
        self.pixel_channels = self._network.pixel_channels

    def digest(self) -> str:
        """Names what a latent means: autoencoder (settings and weights), scale and shift."""
        network = module_digest(self.autoencoder, self._network.config)
        return sha256_json({"autoencoder": network, "scale": self.space.scale, "shift": self.space.shift})

    def encoder_digest(self) -> str:
        """Names what the autoencoder encodes to: its settings, and its tensors but for those that only decode."""
        stored = self.autoencoder.state_dict()
        tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(DECODING)}
        settings = {"class": type(self.autoencoder).__name__, "config": settings_of(self._network.config)}
        return sha256_json({**settings, "tensors": tensors_digest(tensors)})

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean latents (B, channels, H/factor, W/factor) in backbone units of (B, pixel_channels, H, W) in [-1, 1]."""
        _, channels, height, width = pixels.shape
        if channels != self.pixel_channels:
            raise InputError(f"this codec reads {self.pixel_channels} colour channels, the image has {channels}")
        if height % self.factor or width % self.factor:
            raise InputError(f"image size {width}x{height} is not a multiple of {self.factor}, the codec's factor")
        z = self._network.encode(pixels.to(self._dtype(pixels)))[:, : self.channels]  # (B, C, h, w)
        return self.space.to_backbone(z.to(pixels.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, pixel_channels, h*factor, w*factor), about [-1, 1], of latents in backbone units."""
        z = self.space.to_autoencoder(latents)
        return self._network.decode(z.to(self._dtype(z))).to(latents.dtype)

    def _dtype(self, default: Tensor) -> torch.dtype:
        return next(chain(self.autoencoder.parameters(), self.autoencoder.buffers(), (default,))).dtype
