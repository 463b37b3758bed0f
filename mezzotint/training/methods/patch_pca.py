"""Fit the linear codec: principal components in closed form, then, with an overlap, least squares from there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mezzotint import images
from mezzotint.codec import Codec, LatentSpace
from mezzotint.codec.patch_pca import PatchPCA, PatchPCAConfig, principal_components
from mezzotint.data import folder
from mezzotint.training import audit, draws, finish
from mezzotint.training.codecs import write_codec
from mezzotint.training.methods import Batch, Place
from mezzotint.training.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


class PatchPCAFit:
    """loss = mean squared error of decode(encode(x)); the latent space whitens every component."""

    averaged = "autoencoder"

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self.recipe, self.place = recipe, place
        data = recipe.data
        audit.before(recipe, place)
        self.images = folder.read(Path(data.folder), data.size, data.channels)
        self.held_out = folder.read(Path(data.validation), data.size, data.channels) if data.validation else None
        self.licensed = finish.licensed(recipe, None)
        self.digests = {"data": self.images.manifest.digest}
        plan = recipe.patch_pca
        config = PatchPCAConfig.from_config({"pixel_channels": data.channels, **(plan.model_dump() if plan else {})})
        start = principal_components(config, self.images.pixels(torch.arange(len(self.images))))
        self.trained: dict[str, nn.Module] = {"autoencoder": start.to(place.device)}
        self.rates = {"autoencoder": 1.0}

    def draw(self, step: int) -> Batch:
        """Images in shuffled order."""
        index = draws.shuffled(self.recipe.seed, step, self.recipe.batch, len(self.images))
        return {"index": index, "pixels": self.images.pixels(index)}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error in pixel units of [-1, 1]."""
        return (self.trained["autoencoder"](batch["pixels"]) - batch["pixels"]).square().mean(), {}

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return [self.images.names[i] for i in batch["index"].tolist()]

    @torch.no_grad()
    def validate(self, network: nn.Module) -> dict[str, float]:
        """PSNR in decibels of all held-out images: the mean over images, and of their pooled squared error."""
        if self.held_out is None:
            return {}
        pixels = self.held_out.pixels(torch.arange(len(self.held_out))).to(self.place.device)
        errors = (network(pixels).clamp(-1, 1) - pixels).square().mean((1, 2, 3)).double()
        return {
            "validation/psnr": float((10 * torch.log10(4 / errors)).mean()),
            "validation/psnr_pooled": float(10 * torch.log10(4 / errors.mean())),
        }

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Held-out images, each followed by its reconstruction."""
        source = self.held_out or self.images
        pixels = source.pixels(torch.arange(min(self.recipe.previews.count, len(source))))
        with torch.no_grad():
            again = network(pixels.to(self.place.device)).cpu()
        return [
            picture for pair in zip(images.to_images(pixels), images.to_images(again), strict=True) for picture in pair
        ]

    @torch.no_grad()
    def save(self, network: nn.Module, folder: Path) -> None:
        """An autoencoder folder whose latent space has mean 0 and deviation 1 in every component over the data."""
        assert isinstance(network, PatchPCA)
        pieces = torch.arange(len(self.images)).split(256)
        z = torch.cat([network.encode(self.images.pixels(i).to(self.place.device)) for i in pieces])  # (N, C, h, w)
        shift, deviation = z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).clamp_min(1e-6).tolist()
        space = LatentSpace(tuple(1 / d for d in deviation), tuple(shift))
        own = self.licensed.own
        facts = {"dataset": self.digests["data"], "licence": own.weights, "data_licence": own.data}
        write_codec(Codec(network.cpu(), space), folder, facts)
