"""Train an autoencoder: distance + perceptual distance + patch discriminator + KL (Rombach et al. 2022, app. G)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mezzotint import images
from mezzotint.backbones import efficientnet
from mezzotint.codec import Codec, LatentSpace
from mezzotint.data import folder
from mezzotint.data.folder import ImageFolder
from mezzotint.errors import InputError
from mezzotint.training import audit, codecs, draws, finish, parts
from mezzotint.training.adversary import PatchDiscriminator, balance, hinge, perceptual_distance
from mezzotint.training.methods import Batch, Place
from mezzotint.training.recipe import Recipe
from mezzotint.training.recipe import Vae as Plan

if TYPE_CHECKING:
    from PIL.Image import Image


class Passage(nn.Module):
    """Once through an autoencoder: pixels and unit noise to reconstruction, mean and (if it has one) log-variance."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        network = cast(Any, self.network)
        moments = network.encode(pixels)  # (B, C or 2C, h, w)
        mean, log_variance = moments[:, : noise.shape[1]], None
        z = mean
        if moments.shape[1] == 2 * noise.shape[1]:
            log_variance = moments[:, noise.shape[1] :].clamp(-30, 20)
            z = mean + torch.exp(log_variance / 2) * noise
        return network.decode(z), mean, log_variance


class Vae:
    """loss = distance + perceptual + balance * adversarial + KL; the discriminator has its own loss and optimiser.

    Distances are means over numbers, so the KL is summed over latents and divided by the pixel count: `vae.kl` then
    compares with published weights, which stand beside distances summed over pixels.
    """

    averaged = "autoencoder"

    def __init__(self, recipe: Recipe, place: Place) -> None:
        assert recipe.vae is not None  # recipe.check saw to it
        self.recipe, self.plan, self.place = recipe, recipe.vae, place
        network = cast(Any, parts.autoencoder(recipe))
        self.latent_channels, self.factor = int(network.latent_channels), int(network.factor)
        data, plan = recipe.data, recipe.vae
        if data.size[0] % self.factor or data.size[1] % self.factor:
            raise InputError(f"data.size {list(data.size)} must be multiples of {self.factor} for this autoencoder.")
        self.trained: dict[str, nn.Module] = {"autoencoder": Passage(network).to(place.device)}
        self.rates = {"autoencoder": 1.0}
        if plan.adversarial:
            judge = PatchDiscriminator(data.channels, plan.discriminator_channels, plan.discriminator_layers)
            self.trained["discriminator"] = judge.to(place.device)
            self.rates["discriminator"] = plan.discriminator_rate
        self.features = efficientnet.load().to(place.device) if plan.perceptual else None
        audit.before(recipe, place)
        self.images = folder.read(Path(data.folder), data.size, data.channels)
        self.held_out: ImageFolder | None = None
        if data.validation:
            self.held_out = folder.read(Path(data.validation), data.size, data.channels)
        self.mirrorings = folder.mirrorings(list(data.flips))
        self.digests = {"data": self.images.manifest.digest}

    def draw(self, step: int) -> Batch:
        """Images in shuffled order, mirrored at random, and the noise of the posterior."""
        plan, size = self.recipe, self.recipe.batch
        index = draws.shuffled(plan.seed, step, size, len(self.images))
        rng = draws.generator(plan.seed, step, "image")
        flip = torch.randint(len(self.mirrorings), (size,), generator=rng).tolist()
        pixels = [self.images.pixels(i, self.mirrorings[f]) for i, f in zip(index, flip, strict=True)]
        width, height = plan.data.size
        shape = (size, self.latent_channels, height // self.factor, width // self.factor)
        noise = torch.randn(shape, generator=rng) if self.plan.sample else torch.zeros(shape)
        return {"index": index, "pixels": torch.stack(pixels), "noise": noise}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Both players' losses in one sum: their gradients do not meet, each sees the other as fixed."""
        pixels, plan = batch["pixels"], self.plan
        drawn, mean, log_variance = self.trained["autoencoder"](pixels, batch["noise"])
        drawn = drawn.float()
        distance = reconstruction(plan, drawn, pixels)
        numbers = {"loss/distance": distance.detach()}
        if self.features is not None:
            perceptual = perceptual_distance(self.features, drawn, pixels).mean()
            numbers["loss/perceptual"] = perceptual.detach()
            distance = distance + plan.perceptual * perceptual
        total = distance
        if log_variance is not None and self.plan.kl:
            divergence = kl(mean, log_variance) / pixels[0].numel()
            numbers["loss/kl"] = divergence.detach()
            total = total + plan.kl * divergence
        if "discriminator" in self.trained and step >= plan.discriminator_start:
            judge = self.trained["discriminator"]
            judge.requires_grad_(False)  # the autoencoder's turn
            adversarial = -judge(drawn).mean()
            scale = balance(distance, adversarial, self._last())
            judge.requires_grad_(True)
            verdict = hinge(judge(pixels), judge(drawn.detach()))
            numbers |= {"loss/adversarial": adversarial.detach(), "loss/discriminator": verdict.detach()}
            numbers["balance"] = scale
            total = total + plan.adversarial * scale * adversarial + verdict
        return total, numbers

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return [self.images.names[i] for i in batch["index"].tolist()]

    @torch.no_grad()
    def validate(self, network: nn.Module) -> dict[str, float]:
        """Mean absolute error, PSNR in dB (mean over images) and perceptual distance on held-out images."""
        if self.held_out is None:
            return {}
        count = min(self.recipe.validation.images, len(self.held_out))
        index = torch.linspace(0, len(self.held_out) - 1, count).round().long()
        absolute, psnr, perceptual = 0.0, 0.0, 0.0
        for piece in index.split(16):
            pixels = self.held_out.pixels(piece).to(self.place.device)
            drawn, _, _ = network(pixels, self._no_noise(pixels))
            error = ((drawn - pixels) / 2).flatten(1)
            absolute += float((2 * error).abs().mean(1).double().sum())
            psnr += float((-10 * torch.log10(error.square().mean(1).clamp_min(1e-12))).double().sum())
            if self.features is not None:
                perceptual += float(perceptual_distance(self.features, drawn, pixels).double().sum())
        found = {"validation": absolute / count, "psnr": psnr / count}
        return found | ({"validation/perceptual": perceptual / count} if self.features is not None else {})

    @torch.no_grad()
    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Held-out images, each beside its reconstruction."""
        source = self.held_out or self.images
        count = min(self.recipe.previews.count, len(source))
        pixels = source.pixels(torch.linspace(0, len(source) - 1, count).round().long()).to(self.place.device)
        drawn, _, _ = network(pixels, self._no_noise(pixels))
        return [image for pair in zip(images.to_images(pixels), images.to_images(drawn), strict=True) for image in pair]

    @torch.no_grad()
    def save(self, network: nn.Module, folder: Path) -> None:
        """An autoencoder folder whose latent space whitens every channel over the training images."""
        autoencoder = cast(Any, network).network
        means = []
        for piece in torch.arange(len(self.images)).split(16):
            pixels = self.images.pixels(piece).to(self.place.device)
            means.append(autoencoder.encode(pixels)[:, : self.latent_channels].double().cpu())  # (B, C, h, w)
        z = torch.cat(means).transpose(0, 1).flatten(1)  # (C, all)
        scale = 1 / z.std(1).clamp_min(1e-6)
        space = LatentSpace(tuple(scale.float().tolist()), tuple(z.mean(1).float().tolist()))
        facts = {
            "licence": self.recipe.licence or "unknown", "data_licence": self.recipe.data_licence,
            "dataset": self.digests["data"], "recipe": finish.digest(self.recipe), "code": finish.version(),
        }  # fmt: skip
        codecs.write_codec(Codec(autoencoder, space), folder, facts)

    def _no_noise(self, pixels: Tensor) -> Tensor:
        height, width = (side // self.factor for side in pixels.shape[-2:])
        return pixels.new_zeros(len(pixels), self.latent_channels, height, width)

    def _last(self) -> Tensor:
        """The weights that everything drawn passes through last."""
        network = self.trained["autoencoder"]
        return [p for p in network.parameters() if p.ndim > 1 and p.requires_grad][-1]


def reconstruction(plan: Plan, drawn: Tensor, pixels: Tensor) -> Tensor:
    """Mean |d| (l1) or d^2 (l2), plus `gradient` times the same of differences between neighbouring pixels."""
    error = drawn - pixels  # (B, P, H, W)
    size = torch.abs if plan.reconstruction == "l1" else torch.square
    total = size(error).mean()
    if plan.gradient:
        total = total + plan.gradient * (size(error.diff(dim=-1)).mean() + size(error.diff(dim=-2)).mean())
    return total


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) summed over latents, mean over images (Kingma & Welling 2014, app. B)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean() / 2
