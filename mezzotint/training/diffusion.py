"""What every method that trains on noised images shares: batches, conditioning, error, loss, validation, previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezzotint.codec import LatentSpace, inpaint_concat
from mezzotint.conditioning import Conditioning
from mezzotint.data import buckets, cache, folder
from mezzotint.data.folder import NO_LABEL, ImageFolder
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.families.model import working
from mezzotint.families.steering import class_index
from mezzotint.process import Level, prediction, weighting
from mezzotint.training import audit, draws, finish, masking, parts, previews
from mezzotint.training.captions import Captions
from mezzotint.training.methods import Batch, Place
from mezzotint.training.tables import Classes, Inpaint, Recipe, Text

if TYPE_CHECKING:
    from PIL.Image import Image

Flips = tuple[int, ...]
Extend = Callable[[ImageFolder, Tensor, list[Flips], torch.Generator], Batch]
Network = Callable[..., Tensor]  # (x (B, C, h, w), t (B,), conditioning) -> raw; with prompts behind where text trains


class Diffusion:
    """loss = mean w(t) |raw(x_t, t, conditioning) - target|^2, x_t = alpha clean + sigma noise, under the contract.

    Latents and captions are computed once and kept with the digests of what made them. `extend` adds entries to every
    batch. `prompts` stand in for the captions of all images (one is drawn for each), `label` for their labels. Where
    `text_trains`, networks are called with the prompts themselves. `name` tells the caches of two data sets apart.
    """

    def __init__(
        self, recipe: Recipe, place: Place, model: Model, text_trains: bool = False, extend: Extend | None = None,
        prompts: Sequence[str] = (), label: str | None = None, name: str = "train",
    ) -> None:  # fmt: skip
        self.recipe, self.place, self.model, self.extend = recipe, place, model, extend
        self.text_trains, self.prompts = text_trains, tuple(prompts)
        contract, data = model.contract, recipe.data
        self.process = model.process
        self.classes = contract.classes
        self.class_plan = recipe.classes or Classes()
        self.text_plan = recipe.text or Text()
        self.inpaint = None if contract.inpaint is None else (recipe.inpaint or Inpaint())
        self.licensed = finish.licensed(recipe, contract.licence)
        self.label = None if label is None else _label(model, label)
        self.mirrorings = folder.mirrorings(list(data.flips))
        self.sizes = buckets.sizes(data.size, data.bucket_step, data.bucket_ratio) if data.bucket_step else [data.size]
        for size in self.sizes:
            _check_size(model, size)
        _check_loss(self)
        names = self.classes.names if self.classes else None
        if name == "train":
            audit.before(recipe, place, names, None if self.prompts else model.text, self.sizes)
        classes = len(names) if names else None
        self.images = folder.read_buckets(Path(data.folder), self.sizes, data.channels, classes)
        self.held_images: tuple[ImageFolder, ...] = ()
        if data.validation:
            self.held_images = folder.read_buckets(Path(data.validation), self.sizes, data.channels, classes)
        self.captions: Captions | None = None
        if model.text:
            everything = [c for images in self.images + self.held_images for c in images.captions]
            self.captions = Captions([*everything, *self.prompts])
        self._banks: dict[tuple[int, int, int], Tensor] = {}
        if self.inpaint:
            masking.check(self.inpaint, *self.images)
        self._encode(name)
        self.digests = {"data": self.images[0].manifest.digest, "codec": contract.latent.codec}
        if recipe.base:
            self.digests["base"] = contract.weights
        if contract.text:
            self.digests["text"] = " ".join(encoder.digest for encoder in contract.text.encoders)
        weights = channel_weights(model.codec.space, model.codec.channels, recipe.loss.channel_power)
        self.channels = weights.to(place.device)  # (1, C, 1, 1)
        self.held_out = self._held_out()

    def draw(self, step: int) -> Batch:
        """Images in shuffled or balanced order; noise, times, mirroring, dropout and masks drawn for this step."""
        plan, size = self.recipe, self.recipe.batch
        bucket, index = draws.bucketed(plan.seed, step, size, [len(images) for images in self.images])
        images = self.images[bucket]
        if plan.data.sampling == "balanced":
            index = draws.balanced(plan.seed, step, size, images.labels)
        rng = draws.generator(plan.seed, step, "image")
        flip = torch.randint(len(self.mirrorings), (size,), generator=rng)
        batch = self._sample(images, self.latents[bucket], index, flip, self.mirrorings, plan.seed, step)
        loss = plan.loss
        shift = self._shift(images)
        batch["t"] = weighting.draw_times(self.process, size, rng, loss.density, loss.mean, loss.deviation, shift)
        if self.captions:
            rows = self.captions.places(self._captions(images, index, rng))
            batch["caption"] = draws.dropped(rows, self.text_plan.dropout, 0, rng)
        if self.classes:
            batch["label"] = self._labels(images, index, batch.pop("keeps"), self.class_plan.dropout, rng)
        if loss.offset:
            constant = torch.randn(*batch["noise"].shape[:2], 1, 1, generator=rng)
            batch["noise"] = batch["noise"] + loss.offset * constant
        batch["bucket"] = torch.full_like(index, bucket)
        return batch

    def conditioning(self, batch: Batch) -> Conditioning:
        """What steers the network: cached text, labels, maps, numbers about the picture, guidance, hints."""
        found = Conditioning()
        if self.captions and not self.text_trains:
            # encoders may be narrower than what trains
            found = self.captions.take(batch["caption"]).map(
                lambda part: part.float() if part.is_floating_point() else part
            )
        hint, contract = batch.get("hint"), self.model.contract
        guidance = torch.full_like(batch["t"], self.recipe.loss.guidance, dtype=torch.float32)
        return replace(
            found,
            label=batch.get("label"),
            concat=batch.get("concat"),
            time_ids=batch.get("time_ids"),
            guidance=guidance if contract.guidance.embedded else None,
            hints=None if hint is None else (hint,),
        )

    def error(self, network: Network, batch: Batch) -> tuple[Tensor, Level[Tensor]]:
        """(B, C, h, w) squared error of the raw output, and the level of each image."""
        raw, level = self.raw(network, batch)
        return self.squared(raw, batch, level), level

    def raw(self, network: Network, batch: Batch) -> tuple[Tensor, Level[Tensor]]:
        """What the network says of a batch, float32, and the level of each image."""
        level = self.process.levels(batch["t"])
        x = self.process.noised(batch["clean"], batch["noise"], level)  # (B, C, h, w)
        told = self.conditioning(batch)
        if self.text_trains and self.captions:
            return network(x, level.t, told, self.captions.texts(batch["caption"])).float(), level
        return network(x, level.t, told).float(), level

    def squared(self, raw: Tensor, batch: Batch, level: Level[Tensor]) -> Tensor:
        """(B, C, h, w) squared distance from the target of the process in force."""
        said, _ = prediction.split(raw, batch["clean"].shape[1])
        return (said - prediction.target(self.process.prediction, batch["clean"], batch["noise"], level)) ** 2

    def weigh(self, error: Tensor, level: Level[Tensor], batch: Batch) -> Tensor:
        """The weighted mean: by level, channel, mask, and the images' own weights."""
        plan = self.recipe.loss
        if plan.channel_power:
            error = error * self.channels
        if self.inpaint and self.inpaint.inside_weight != 1 and self.model.contract.inpaint:
            inside = batch["concat"][:, : self.model.contract.inpaint**2].amax(1, keepdim=True)  # (B, 1, h, w)
            scale = 1 + (self.inpaint.inside_weight - 1) * inside
            error = error * scale / scale.mean()
        if "inside" in batch:
            scale = plan.outside + (1 - plan.outside) * batch["inside"]  # (B, 1, h, w)
            error = error * scale / scale.mean((1, 2, 3), keepdim=True)
        weights = weighting.weights(self.process, level, plan.weighting, plan.gamma)  # (B,)
        if "weight" in batch:
            weights = weights * batch["weight"]
        return (weights * error.flatten(1).mean(1)).mean()

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """The loss of a batch, with the bound on the variance where the network learns it."""
        raw, level = self.raw(network, batch)
        loss = self.weigh(self.squared(raw, batch, level), level, batch)
        if self.model.contract.variance == "learned" and self.recipe.loss.variance:
            loss = loss + self.recipe.loss.variance * self._bound(raw, batch, level).mean()
        return loss

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        pairs = zip(batch["bucket"].tolist(), batch["index"].tolist(), strict=True)
        return [self.images[bucket].names[index] for bucket, index in pairs]

    @torch.no_grad()
    def validate(self, network: Network) -> dict[str, float]:
        """Unweighted squared error per band of the clock on fixed images, noise, times and masks.

        Nothing in it depends on the recipe's method, seed, batch or loss: figures of different runs compare.
        """
        if not self.held_out:
            return {}
        found: list[float] = []
        for band in self.held_out:
            total, count = 0.0, 0
            for batch in band:
                moved = {key: value.to(self.place.device) for key, value in batch.items()}
                error, _ = self.error(network, moved)
                total += float(error.flatten(1).mean(1).double().sum())
                count += len(error)
            found.append(total / count)
        bands = len(found)
        named = {f"validation/{100 * b // bands}-{100 * (b + 1) // bands}%": value for b, value in enumerate(found)}
        return {"validation": sum(found) / bands, **named}

    def previews(self, model: Model) -> list[Image]:
        """Pictures of the model in training through the one inference path."""
        return previews.drawn(self, model)

    def bank(self, images: ImageFolder, seed: int) -> Tensor:
        """Procedural masks (M, 1, H, W) for images of this size, drawn once for a run's seed or validation's."""
        assert self.inpaint is not None
        height, width = images.bytes.shape[-2:]
        if (seed, width, height) not in self._banks:
            self._banks[seed, width, height] = masking.bank(self.inpaint, seed, width, height)
        return self._banks[seed, width, height]

    def _encode(self, name: str) -> None:
        """Latents and captions, computed once; then codec and text encoders rest."""
        where = Path(self.recipe.data.cache) if self.recipe.data.cache else self.place.folder / "cache"
        model, at = self.model, self.model.path or self.recipe.at
        self.codec_dtype = parts.DTYPES[self.recipe.codec.dtype] if self.recipe.codec else torch.float32
        model.codec.autoencoder.to(dtype=self.codec_dtype)
        with working(model, "codec"):
            self.latents = [self._latents(where, images, self.mirrorings, name) for images in self.images]
            self.held_latents = [self._latents(where, images, [()], "validation") for images in self.held_images]
        if self.inpaint:  # masked latents are made at every step
            model.codec.autoencoder.to(self.place.device)
        if self.captions and model.text and model.contract.text and not self.text_trains:
            path = where / f"text-{name}.safetensors"
            with working(model, "text"):
                self.captions.encode(
                    model.text, model.contract.text, path, Path(at),
                    lambda done, total: self.place.watch("captions", done, total),
                )  # fmt: skip

    def _latents(self, where: Path, images: ImageFolder, mirrorings: list[Flips], name: str) -> Tensor:
        model, device = self.model, self.place.device
        height, width = images.bytes.shape[-2:]
        file = f"{name}-{width}x{height}.safetensors" if len(self.sizes) > 1 else f"{name}.safetensors"
        return cache.latents(
            where / file,
            images,
            mirrorings,
            lambda pixels: model.codec.encode(pixels.to(device, self.codec_dtype)),
            model.contract.latent.codec,
            model.path or self.recipe.at,
            watch=lambda done, total: self.place.watch(f"latents of {name}", done, total),
            dtype=str(self.codec_dtype).removeprefix("torch."),
        )

    def _sample(
        self, images: ImageFolder, latents: Tensor, index: Tensor, flip: Tensor, mirrorings: list[Flips],
        seed: int, step: int,
    ) -> Batch:  # fmt: skip
        """What does not depend on caption, label and time; "keeps" says which labels hold inside a mask."""
        clean = latents[index, flip]  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=draws.generator(seed, step, "noise"))
        batch = {"index": index, "flip": flip, "clean": clean, "noise": noise}
        flips = [mirrorings[f] for f in flip.tolist()]
        keeps = torch.ones(len(index), dtype=torch.bool)
        contract, codec, device = self.model.contract, self.model.codec, self.place.device
        if self.inpaint and contract.inpaint:
            mask, keeps = masking.draw(self.inpaint, images, self.bank(images, seed), index, flips, seed, step)
            pixels = torch.stack([images.pixels(i, dims) for i, dims in zip(index, flips, strict=True)])
            with torch.no_grad():
                maps = inpaint_concat(codec, pixels.to(device), mask.to(device), contract.inpaint, contract.mask_cells)
            batch["concat"] = maps.cpu()
        if self.recipe.loss.outside != 1:
            batch["inside"] = masking.inside(images, index, flips, codec.factor)
        if contract.picture:
            batch["time_ids"] = numbers(contract.picture, images, index)
        if self.classes:
            batch["keeps"] = keeps
        if self.extend:
            batch |= self.extend(images, index, flips, draws.generator(seed, step, "extend"))
        return batch

    def _held_out(self) -> list[list[Batch]]:
        """For each band of the clock the same images, with noise, masks and times of their own: fixed for good."""
        plan = self.recipe.validation
        total = sum(len(images) for images in self.held_images)
        chosen = torch.linspace(0, total - 1, min(plan.images, total)).round().long() if total else torch.tensor([])
        result: list[list[Batch]] = []
        for band in range(plan.bands if total else 0):
            order = torch.randperm(len(chosen), generator=draws.generator(plan.seed, band, "times"))
            t = parts.times(self.process, (band + (order + 0.5) / len(chosen)) / plan.bands)
            pieces: list[Batch] = []
            first, taken = 0, 0
            for number, (images, latents) in enumerate(zip(self.held_images, self.held_latents, strict=True)):
                index = chosen[(chosen >= first) & (chosen < first + len(images))] - first
                first += len(images)
                if len(index):
                    whole = self._held(images, latents, index, -1 - band - plan.bands * number)
                    whole["t"] = t[taken : taken + len(index)]
                    taken += len(index)
                    pieces += _pieces(whole, self.recipe.batch // self.recipe.accumulation)
            result.append(pieces)
        return result

    def _held(self, images: ImageFolder, latents: Tensor, index: Tensor, step: int) -> Batch:
        seed = self.recipe.validation.seed
        batch = self._sample(images, latents, index, torch.zeros_like(index), [()], seed, step)
        if self.captions:
            rng = draws.generator(seed, step, "caption")
            batch["caption"] = self.captions.places(self._captions(images, index, rng))
        if self.classes:
            batch["label"] = self._labels(images, index, batch.pop("keeps"), 0.0, torch.Generator())
        return batch

    def _captions(self, images: ImageFolder, index: Tensor, rng: torch.Generator) -> list[str]:
        if not self.prompts:
            return [images.captions[i] for i in index.tolist()]
        chosen = torch.randint(len(self.prompts), (len(index),), generator=rng)
        return [self.prompts[i] for i in chosen.tolist()]

    def _labels(self, images: ImageFolder, index: Tensor, keeps: Tensor, share: float, rng: torch.Generator) -> Tensor:
        """Labels (B,); where there is none, where the mask leaves it out, and for a share of them, the null class."""
        assert self.classes is not None
        labels = images.labels[index] if self.label is None else torch.full_like(index, self.label)
        labels = torch.where(keeps, labels, NO_LABEL)
        if self.classes.null is None:
            if bool((labels == NO_LABEL).any()):
                raise InputError("an image has no label, and this model has no class for that: label every image")
            return labels
        return draws.dropped(labels, share, self.classes.null, rng)

    def _shift(self, images: ImageFolder) -> float | None:
        said = self.recipe.loss.shift
        if said == "contract":
            return None
        if said != "resolution":
            return said
        contract = self.model.contract
        patch = int(getattr(self.model.backbone.config, "patch_size", 1))
        cell = (contract.latent.factor * patch) ** 2
        usual = contract.size[0] * contract.size[1] // cell
        tokens = images.bytes.shape[-1] * images.bytes.shape[-2] // cell
        return weighting.resolution_shift(self.process, tokens, usual, contract.sampling.steps)

    def _bound(self, raw: Tensor, batch: Batch, level: Level[Tensor]) -> Tensor:
        from mezzotint.process import variational

        timesteps = getattr(self.process.schedule, "timesteps", 1)
        return timesteps * variational.bound(self.process, raw, batch["clean"], batch["noise"], batch["t"])


def channel_weights(space: LatentSpace, channels: int, power: float) -> Tensor:
    """(1, C, 1, 1) of mean 1: the size of a unit of each latent channel in the autoencoder's units, to a power.

    A whitened latent space makes components that nobody sees as large as those everyone does: at power 2 an error
    counts as it does in the pixels of an orthonormal codec, at 0 as in the latents; 1 is between.
    """
    size = 1 / torch.tensor(space.scale).abs().expand(channels)
    weights = size**power
    return (weights / weights.mean()).view(1, -1, 1, 1)


def numbers(names: Sequence[str], images: ImageFolder, index: Tensor) -> Tensor:
    """(B, K) what a network is told about the picture: the file's size, what was cut, the size in training."""
    height, width = images.bytes.shape[-2:]
    original, crop = images.original[index].float(), images.crop[index].float()
    known = {
        "original_width": original[:, 0], "original_height": original[:, 1], "crop_left": crop[:, 0],
        "crop_top": crop[:, 1], "target_width": torch.full((len(index),), float(width)),
        "target_height": torch.full((len(index),), float(height)), "aesthetic": torch.full((len(index),), 6.0),
    }  # fmt: skip
    return torch.stack([known[name] for name in names], dim=1)


def _label(model: Model, label: str) -> int:
    if model.contract.classes is None:
        raise InputError(f"label {label!r} was given, but {model.path} has no classes: leave it out")
    return class_index(model.contract.classes, label)


def _check_size(model: Model, size: tuple[int, int]) -> None:
    multiple = model.codec.factor * int(getattr(model.backbone.config, "patch_size", 1))
    if size[0] % multiple or size[1] % multiple:
        raise InputError(f"size {size[0]}x{size[1]} is not a multiple of {multiple}, which this model needs")


def _check_loss(self: Diffusion) -> None:
    """InputError for a shift where there is none to choose, before anything is prepared."""
    plan = self.recipe.loss
    shift = None if plan.shift == "contract" else 1.0
    weighting.draw_times(self.process, 1, torch.Generator(), plan.density, plan.mean, plan.deviation, shift)


def _pieces(batch: Batch, size: int) -> list[Batch]:
    count = len(batch["index"])
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, count, size)]
