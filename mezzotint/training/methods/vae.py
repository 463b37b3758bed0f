"""Train an autoencoder: distance + perceptual distance + patch discriminator + KL (Rombach et al. 2022, app. G).

A new one, or that of any model further: then its latent space stays, and by default its encoder too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mezzotint import images
from mezzotint.backbones import efficientnet
from mezzotint.codec import Codec, LatentSpace
from mezzotint.codec.flux2_vae import Flux2VAE, keep_statistics, latent_space
from mezzotint.codec.patch_pca import PatchPCA
from mezzotint.codec.vq import VQ
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
    """Once through an autoencoder: pixels and unit noise to the reconstruction and the loss of the bottleneck.

    That is the KL divergence of a posterior from N(0, 1), or the codebook's loss; None where nothing is squeezed.
    """

    def __init__(self, network: nn.Module, commitment: float) -> None:
        super().__init__()
        self.network, self.commitment = network, commitment

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        network = cast(Any, self.network)
        z = network.encode(pixels)  # (B, C or 2C, h, w)
        if isinstance(network, VQ):
            codes, loss = network.quantize.learn(z, self.commitment)
            return network.decode_codes(codes), loss
        if z.shape[1] == noise.shape[1]:
            return network.decode(z), None
        mean, log_variance = z.to(noise.dtype).chunk(2, dim=1)  # no longer half precision
        log_variance = log_variance.clamp(-30, 20)
        return network.decode(mean + torch.exp(log_variance / 2) * noise), kl(mean, log_variance)


class Vae:
    """loss = distance + perceptual + balance * adversarial + KL; the discriminator has its own loss and optimiser.

    Distances are means over numbers, so the KL is summed over latents and divided by the pixel count: `vae.kl` then
    compares with published weights, which stand beside distances summed over pixels. With a codebook its loss takes
    the place of the KL. Where the decoder trains alone there is no KL: the posterior does not move.
    """

    averaged = "autoencoder"

    def __init__(self, recipe: Recipe, place: Place) -> None:
        assert recipe.vae is not None  # recipe.check saw to it
        self.recipe, self.plan, self.place = recipe, recipe.vae, place
        data, plan = recipe.data, recipe.vae
        trained, self.start = parts.autoencoder(recipe)
        self.network = network = cast(Any, trained)
        self.licensed = finish.licensed(recipe, self.start and self.start.licence)
        self.latent_channels, self.factor = int(network.latent_channels), int(network.factor)
        self.encodes = self.start is None or plan.trains == "all"  # whether what latents mean is learned too
        if data.size[0] % self.factor or data.size[1] % self.factor:
            raise InputError(f"data.size {list(data.size)} must be multiples of {self.factor} for this autoencoder.")
        passage = Passage(network, plan.commitment if self.encodes else 0.0)  # an encoder at rest commits to nothing
        self.trained: dict[str, nn.Module] = {"autoencoder": passage.to(place.device)}
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
        if self.start is not None:
            self.digests["codec"] = self.start.codec.digest()

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
        drawn, squeezed = self.trained["autoencoder"](pixels, batch["noise"])
        drawn = drawn.to(pixels.dtype)
        distance = reconstruction(plan, drawn, pixels)
        numbers = {"loss/distance": distance.detach()}
        if self.features is not None:
            perceptual = perceptual_distance(self.features, drawn, pixels).mean()
            numbers["loss/perceptual"] = perceptual.detach()
            distance = distance + plan.perceptual * perceptual
        total = distance
        if squeezed is not None and isinstance(self.network, VQ):
            numbers["loss/codebook"] = squeezed.detach()
            total = total + plan.codebook * squeezed
        elif squeezed is not None and self.encodes and plan.kl:
            divergence = squeezed / pixels[0].numel()
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
            drawn, _ = network(pixels, self._no_noise(pixels))
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
        drawn, _ = network(pixels, self._no_noise(pixels))
        return [image for pair in zip(images.to_images(pixels), images.to_images(drawn), strict=True) for image in pair]

    @torch.no_grad()
    def save(self, network: nn.Module, folder: Path) -> None:
        """An autoencoder folder: in the latent space that it started with, or in one that whitens the training images.

        Where the decoder trained alone, the folder says whose latents it decodes.
        """
        autoencoder, start = cast(Any, network).network, self.start
        facts = {
            "licence": self.licensed.own.weights, "data_licence": self.licensed.own.data,
            "dataset": self.digests["data"], "recipe": finish.digest(self.recipe), "code": finish.version(),
        }  # fmt: skip
        if start is None:
            codec = Codec(autoencoder, self._whitened(autoencoder))
        else:
            base = self.digests["codec"]
            facts["base"] = base
            codec = Codec(autoencoder, start.codec.space, () if self.encodes else (*start.codec.decodes, base))
        codecs.write_codec(codec, folder, facts)

    def _whitened(self, autoencoder: Any) -> LatentSpace:
        """Mean 0 and deviation 1 in every channel over the training images; kept as statistics where there is room."""
        means = []
        for piece in torch.arange(len(self.images)).split(16):
            pixels = self.images.pixels(piece).to(self.place.device)
            means.append(autoencoder.encode(pixels)[:, : self.latent_channels].double().cpu())  # (B, C, h, w)
        z = torch.cat(means).transpose(0, 1).flatten(1)  # (C, all)
        if isinstance(autoencoder, Flux2VAE):
            keep_statistics(autoencoder, z.mean(1), z.var(1))
            return latent_space(autoencoder)
        scale = 1 / z.std(1).clamp_min(1e-6)
        return LatentSpace(tuple(scale.float().tolist()), tuple(z.mean(1).float().tolist()))

    def _no_noise(self, pixels: Tensor) -> Tensor:
        height, width = (side // self.factor for side in pixels.shape[-2:])
        return pixels.new_zeros(len(pixels), self.latent_channels, height, width)

    def _last(self) -> Tensor:
        """The weights that everything drawn passes through last."""
        return self.network.synthesis if isinstance(self.network, PatchPCA) else self.network.decoder.conv_out.weight


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
