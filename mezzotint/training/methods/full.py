"""Train a whole backbone under its process: text-, class- and mask-conditioned, on latents computed once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mezzotint.codec import LatentSpace, inpaint_concat
from mezzotint.conditioning import Conditioning
from mezzotint.data import cache, folder
from mezzotint.data.folder import ImageFolder
from mezzotint.process import Level, prediction, weighting
from mezzotint.training import draws, finish, masking, parts
from mezzotint.training.methods import Batch, Place
from mezzotint.training.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


class Full:
    """loss = mean w(t) |raw(x_t, t, conditioning) - target|^2, x_t = alpha clean + sigma noise."""

    averaged = "backbone"

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self.recipe, self.place = recipe, place
        start = parts.base(recipe)
        self.base = start.contract.weights if start else None  # digest of the weights this starts from
        self.process = parts.process(recipe, start)
        self.codec, codec_file = parts.codec(recipe, start)
        self.codec.autoencoder.to(place.device)
        parts.check_loss(recipe.loss, self.process)
        self.text = parts.text(recipe, start)
        network = parts.backbone(recipe, self.codec, self.text, start)
        self.trained: dict[str, nn.Module] = {"backbone": network.to(place.device)}
        self.rates = {"backbone": 1.0}
        data = recipe.data
        self.classes = len(recipe.classes.names) if recipe.classes else None
        self.images = folder.read(Path(data.folder), data.size, data.channels, self.classes)
        self.mirrorings = folder.mirrorings(list(data.flips))
        self.latents = self._latents(self.images, self.mirrorings, codec_file, "train")
        self.digests = {"data": self.images.manifest.digest, "codec": self.codec.digest()}
        self.captions = parts.Captions(self.text, self.images.captions) if self.text else None
        if self.text:
            self.digests["text"] = " ".join(reading.digest for reading in self.text.readings())
        width, height = data.size
        self.bank = torch.zeros((0, 1, height, width), dtype=torch.bool)
        self.preview_masks = self.bank
        if recipe.inpaint:
            masking.check(recipe.inpaint, self.images)
            self.bank = masking.bank(recipe.inpaint, recipe.seed, width, height)
            self.preview_masks = self.images.masks if len(self.images.masks) else self.bank
        self.validation_images: ImageFolder | None = None
        self.held_out = self._held_out(codec_file)
        weights = channel_weights(self.codec.space, self.codec.channels, recipe.loss.channel_power)
        self.channels = weights.to(place.device)  # (1, C, 1, 1)

    def draw(self, step: int) -> Batch:
        """Images in shuffled or balanced order; noise, times, mirroring, dropout and masks drawn for this step."""
        plan, size, count = self.recipe, self.recipe.batch, len(self.images)
        if plan.data.sampling == "balanced":
            index = draws.balanced(plan.seed, step, size, self.images.labels)
        else:
            index = draws.shuffled(plan.seed, step, size, count)
        rng = draws.generator(plan.seed, step, "image")
        flip = torch.randint(len(self.mirrorings), (size,), generator=rng)
        batch = self._sample(self.images, self.latents, index, flip, self.mirrorings, plan.seed, step)
        loss = plan.loss
        batch["t"] = weighting.draw_times(self.process, size, rng, loss.density, loss.mean, loss.deviation)  # type: ignore[arg-type]
        if self.captions:
            batch["caption"] = draws.dropped(self.captions.of[index], plan.text.dropout if plan.text else 0.0, 0, rng)
        if plan.classes:
            labels = torch.where(batch.pop("keeps"), self.images.labels[index], folder.NO_LABEL)
            batch["label"] = draws.dropped(labels, plan.classes.dropout, len(plan.classes.names), rng)
        return batch

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted mean of squared errors; inside the mask an error counts `inpaint.inside_weight` times."""
        error, level = self._error(self.trained["backbone"], batch)  # (B, C, h, w)
        if self.recipe.loss.channel_power:
            error = error * self.channels
        if self.recipe.inpaint and self.recipe.inpaint.inside_weight != 1:
            k = self.recipe.inpaint.k
            inside = batch["concat"][:, : k * k].amax(1, keepdim=True)  # (B, 1, h, w)
            scale = 1 + (self.recipe.inpaint.inside_weight - 1) * inside
            error = error * scale / scale.mean()
        plan = self.recipe.loss
        weights = weighting.weights(self.process, level, plan.weighting, plan.gamma)  # (B,)
        return (weights * error.flatten(1).mean(1)).mean(), {}

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return [self.images.names[i] for i in batch["index"].tolist()]

    @torch.no_grad()
    def validate(self, network: nn.Module) -> dict[str, float]:
        """Unweighted squared error per band of the clock on fixed images, noise, times and masks."""
        if self.held_out is None:
            return {}
        bands = self.recipe.validation.bands
        found: list[float] = []
        for band in range(bands):
            total, count = 0.0, 0
            for piece in _pieces(self.held_out[band], self.recipe.batch // self.recipe.accumulation):
                moved = {key: value.to(self.place.device) for key, value in piece.items()}
                error, _ = self._error(network, moved)
                total += float(error.flatten(1).mean(1).double().sum())
                count += len(error)
            found.append(total / count)
        named = {f"validation/{100 * b // bands}-{100 * (b + 1) // bands}%": value for b, value in enumerate(found)}
        return {"validation": sum(found) / bands, **named}

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Pictures through the one inference path, on validation images where the model repaints."""
        return finish.previews(self, network)

    def save(self, network: nn.Module, folder: Path) -> None:
        """A model folder with its contract."""
        finish.save(self, network, folder)

    def _error(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Level[Tensor]]:
        level = self.process.levels(batch["t"])
        x = self.process.noised(batch["clean"], batch["noise"], level)  # (B, C, h, w)
        raw = network(x, level.t, self._conditioning(batch))  # (B, C, h, w)
        target = prediction.target(self.process.prediction, batch["clean"], batch["noise"], level)
        return (raw.float() - target) ** 2, level

    def _conditioning(self, batch: Batch) -> Conditioning:
        text = self.captions.take(batch["caption"]) if self.captions else Conditioning()
        return Conditioning(
            tokens=text.tokens, mask=text.mask, pooled=text.pooled, label=batch.get("label"), concat=batch.get("concat")
        )

    def _sample(
        self, images: ImageFolder, latents: Tensor, index: Tensor, flip: Tensor, mirrorings: list[tuple[int, ...]],
        seed: int, step: int,
    ) -> Batch:  # fmt: skip
        """Clean latents, noise and (inpainting) maps; "keeps" says which labels hold inside the mask."""
        clean = latents[index, flip]  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=draws.generator(seed, step, "noise"))
        batch = {"index": index, "clean": clean, "noise": noise, "keeps": torch.ones(len(index), dtype=torch.bool)}
        if self.recipe.inpaint:
            flips = [mirrorings[f] for f in flip.tolist()]
            mask, batch["keeps"] = masking.draw(self.recipe.inpaint, images, self.bank, index, flips, seed, step)
            pixels = torch.stack([images.pixels(i, dims) for i, dims in zip(index, flips, strict=True)])
            pixels, mask = pixels.to(self.place.device), mask.to(self.place.device)
            with torch.no_grad():
                batch["concat"] = inpaint_concat(self.codec, pixels, mask, self.recipe.inpaint.k).cpu()
        if not self.recipe.classes:
            del batch["keeps"]
        return batch

    def _held_out(self, codec_file: Path) -> list[Batch] | None:
        """One fixed batch for each band of the clock: times evenly spread inside the band."""
        data, plan = self.recipe.data, self.recipe.validation
        if data.validation is None:
            return None
        self.validation_images = images = folder.read(Path(data.validation), data.size, data.channels, self.classes)
        latents = self._latents(images, [()], codec_file, "validation")
        count = min(plan.images, len(images))
        index = torch.linspace(0, len(images) - 1, count).round().long()
        caption_of: Tensor | None = None
        if self.text and self.captions:
            caption_of = self.captions.extend(parts.Captions(self.text, images.captions))
        result: list[Batch] = []
        for band in range(plan.bands):
            batch = self._sample(images, latents, index, torch.zeros_like(index), [()], plan.seed, -1 - band)
            order = torch.randperm(count, generator=draws.generator(plan.seed, band, "times"))
            batch["t"] = parts.times(self.process, (band + (order + 0.5) / count) / plan.bands)
            if caption_of is not None:
                batch["caption"] = caption_of[index]
            if self.recipe.classes:
                labels = torch.where(batch.pop("keeps"), images.labels[index], folder.NO_LABEL)
                batch["label"] = draws.dropped(labels, 0.0, len(self.recipe.classes.names), torch.Generator())
            result.append(batch)
        return result

    def _latents(self, images: ImageFolder, mirrorings: list[tuple[int, ...]], codec_file: Path, name: str) -> Tensor:
        where = Path(self.recipe.data.cache) if self.recipe.data.cache else self.place.folder / "cache"
        device = self.place.device
        return cache.latents(
            where / f"{name}.safetensors",
            images,
            mirrorings,
            lambda pixels: self.codec.encode(pixels.to(device)),
            self.codec.digest(),
            codec_file,
            watch=lambda done, total: self.place.watch(f"latents of {name}", done, total),
        )


def channel_weights(space: LatentSpace, channels: int, power: float) -> Tensor:
    """(1, C, 1, 1) of mean 1: the size of a unit of each latent channel in the autoencoder's units, to a power.

    A whitened latent space makes components that nobody sees as large as those everyone does: at power 2 an error
    counts as it does in the pixels of an orthonormal codec, at 0 as in the latents; 1 is between.
    """
    size = 1 / torch.tensor(space.scale).abs().expand(channels)
    weights = size**power
    return (weights / weights.mean()).view(1, -1, 1, 1)


def _pieces(batch: Batch, size: int) -> list[Batch]:
    count = len(batch["index"])
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, count, size)]
