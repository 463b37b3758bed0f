"""A linear codec: principal components of image patches, and their lapped (overlapping) extension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import InputError


@dataclass(frozen=True, slots=True)
class PatchPCAConfig:
    """Patches of patch x patch pixels become latent_channels numbers; kernels reach `overlap` pixels past the patch."""

    pixel_channels: int = 1
    latent_channels: int = 16
    patch: int = 8
    overlap: int = 0

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> PatchPCAConfig:
        """Read config.json; keys with a leading underscore are the writer's own."""
        options = {key: value for key, value in data.items() if not key.startswith("_")}
        known = {f.name for f in fields(cls)}
        wrong = [k for k, v in options.items() if k not in known or not isinstance(v, int) or v < (k != "overlap")]
        if wrong:
            raise InputError(f"PatchPCA takes positive integers {', '.join(sorted(known))}; wrong: {', '.join(wrong)}")
        config = cls(**{k: int(str(v)) for k, v in options.items()})
        if config.overlap > config.patch // 2:
            raise InputError(f"overlap {config.overlap} must be at most half the patch, {config.patch // 2}")
        if config.latent_channels > config.pixel_channels * config.patch**2:
            raise InputError(f"latent_channels {config.latent_channels} exceeds the numbers in a patch")
        return config


class PatchPCA(nn.Module):
    """z = E (x - m) by a strided convolution, x = m + D z by its transpose; both linear, one matrix each.

    With overlap 0 and orthonormal rows E = D^T this is principal component analysis of the patches (Hotelling 1933):
    the least squared error of any linear codec that treats patches alone. A patch knows nothing of its neighbours then,
    and errors in z show as blocks. With an overlap, basis functions of neighbouring patches run into each other as in
    lapped transforms (Malvar & Staelin 1989), which lowers the error and leaves no block edges.
    """

    def __init__(self, config: PatchPCAConfig | None = None) -> None:
        super().__init__()
        self.config = config or PatchPCAConfig()
        kernel = self.config.patch + 2 * self.config.overlap
        shape = (self.config.latent_channels, self.config.pixel_channels, kernel, kernel)
        self.analysis = nn.Parameter(torch.zeros(shape))
        self.synthesis = nn.Parameter(torch.zeros(shape))
        self.mean = nn.Parameter(torch.zeros(self.config.pixel_channels))
        self.factor = self.config.patch
        self.latent_channels = self.config.latent_channels
        self.pixel_channels = self.config.pixel_channels

    def forward(self, pixels: Tensor) -> Tensor:
        """There and back, (B, P, H, W), as training looks at it."""
        return self.decode(self.encode(pixels))

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, P, H, W) in [-1, 1] -> (B, C, H/patch, W/patch); the image is mirrored past its border."""
        centred = pixels - self.mean.view(1, -1, 1, 1)
        o = self.config.overlap
        if o:
            centred = F.pad(centred, (o, o, o, o), mode="reflect")  # (B, P, H + 2o, W + 2o)
        return F.conv2d(centred, self.analysis, stride=self.config.patch)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, P, h*patch, w*patch)."""
        pixels = F.conv_transpose2d(z, self.synthesis, stride=self.config.patch, padding=self.config.overlap)
        return pixels + self.mean.view(1, -1, 1, 1)


def principal_components(config: PatchPCAConfig, pixels: Tensor) -> PatchPCA:
    """The codec whose kernels are the first principal components of all patches of (N, P, H, W), zero in the overlap.

    Eigenvectors of the covariance of the patches, largest first, each with its largest element positive.
    """
    patch, channels = config.patch, config.pixel_channels
    codec = PatchPCA(config)
    mean = pixels.mean((0, 2, 3))
    size = channels * patch * patch
    covariance, total, count = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0
    for piece in pixels.split(64):
        cut = F.unfold(piece - mean.view(1, -1, 1, 1), patch, stride=patch)  # (B, size, L)
        rows = cut.transpose(1, 2).reshape(-1, size).double()
        covariance += rows.T @ rows
        total += rows.sum(0)
        count += len(rows)
    centre = total / count
    _, vectors = torch.linalg.eigh(covariance / count - torch.outer(centre, centre))
    basis = vectors.flip(1)[:, : config.latent_channels].T  # (C, size)
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis = (basis * largest.sign()).float().view(-1, channels, patch, patch)
    inner = slice(config.overlap, config.overlap + patch)
    with torch.no_grad():
        codec.mean.copy_(mean)
        codec.analysis[:, :, inner, inner] = basis
        codec.synthesis[:, :, inner, inner] = basis
    return codec
