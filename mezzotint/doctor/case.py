"""What is examined: a model with its adapters, the user's images, and what the network answers on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mezzotint.codec import inpaint_concat
from mezzotint.conditioning import Conditioning
from mezzotint.data.folder import NO_LABEL
from mezzotint.doctor import pictures
from mezzotint.doctor.finding import NotChecked
from mezzotint.doctor.pictures import Pictures
from mezzotint.doctor.planned import Foresee, unforeseen
from mezzotint.errors import InputError
from mezzotint.families import Model, load
from mezzotint.families.adapt import adapted
from mezzotint.families.model import working
from mezzotint.families.steering import steering
from mezzotint.generate import generate_batch
from mezzotint.request import Request

Found = TypeVar("Found")

BATCH = 32  # images that a network is asked about at once
DRAWN = 12  # pictures that the model draws of itself
QUICK = 16  # steps of a path of DPM-Solver++ (2M), whose end is near that of many


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the model draws as its contract says, with the wish behind each picture."""

    latents: Tensor  # (M, C, h, w) in backbone units
    pixels: Tensor  # (M, P, H, W), not yet cut to [-1, 1]
    rows: Tensor  # (M,) the image of the data whose caption and label it was drawn for


@dataclass(frozen=True)
class Case:
    """A model at hand with everything that may be looked at; what costs time is computed once, when first asked for.

    `bare` is the model without its adapters. `mismatches` are the refusals that a forced load let pass.
    """

    path: Path
    bare: Model
    data: Pictures | None = None
    base: Model | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    cache: Path | None = None
    trace: Path | None = None
    folder: Path | None = None  # the whole folder of the data
    mismatches: tuple[str, ...] = ()
    seed: int = 0
    say: Callable[[str], None] = field(default=lambda what: None)
    foresee: Foresee = unforeseen  # what a request was planned to take
    memory: dict[str, Any] = field(default_factory=dict[str, Any])  # evidence that several probes look at

    def once(self, name: str, make: Callable[[], Found]) -> Found:
        """What `make` gives, made when the first probe asks for it."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]

    @cached_property
    def model(self) -> Model:
        """The model with its adapters, where they fit."""
        if not self.lora:
            return self.bare
        try:
            return adapted(self.bare, self.lora)
        except InputError:
            return self.bare

    @property
    def images(self) -> Pictures:
        """The user's images; NotChecked where there are none."""
        if self.data is None:
            raise NotChecked("needs images: give --data DIR, a few dozen of those that the model was trained on")
        return self.data

    @cached_property
    def latents(self) -> Tensor:
        """(N, C, h, w) of the user's images in backbone units, by the model's own codec."""
        with working(self.bare, "codec"), torch.inference_mode():
            pixels = self.images.pixels.to(self.bare.device)
            return torch.cat([self.bare.codec.encode(part).float().cpu() for part in pixels.split(BATCH)])

    @cached_property
    def usable(self) -> Tensor:
        """The latents; NotChecked where they are not finite, which the probe of the latent space reports."""
        if not bool(self.latents.isfinite().all()):
            raise NotChecked("the codec's latents are not finite: see the latent space")
        return self.latents

    @cached_property
    def steering(self) -> Conditioning:
        """What steers the network towards each of the user's images: its caption, its label; (N, ...)."""
        return self.steered(self.model, self.images.captions, self.images.labels)

    @cached_property
    def unsteered(self) -> Conditioning:
        """The same without caption and label."""
        count = len(self.images)
        return self.steered(self.model, ("",) * count, torch.full((count,), NO_LABEL))

    def steered(self, model: Model, captions: Sequence[str], labels: Tensor) -> Conditioning:
        """The conditioning of a row for each caption and label, as `generate` makes it for the model's own size."""
        contract = model.contract
        known = range(len(contract.classes.names)) if contract.classes else ()  # the data's probe names the others
        wishes = [
            Request(prompt=caption if model.text else "", label=label if label in known else None)
            for caption, label in zip(captions, labels.tolist(), strict=True)
        ]
        scale = contract.guidance.scale if contract.guidance.embedded else 1.0
        with torch.inference_mode():
            found = steering(model, wishes, scale, contract.size)[0].map(lambda tensor: tensor.cpu())
        if contract.inpaint is not None:
            found = replace(found, concat=self._repainting(model, len(captions)))
        return found

    def _repainting(self, model: Model, count: int) -> Tensor:
        """Mask maps that ask for the whole picture, (count, k k + C, h, w)."""
        width, height = model.contract.size
        pixels, everywhere = torch.zeros(1, model.codec.pixel_channels, height, width), torch.ones(1, 1, height, width)
        with working(model, "codec"), torch.inference_mode():
            k, cells = model.contract.inpaint or 1, model.contract.mask_cells
            maps = inpaint_concat(model.codec, pixels.to(model.device), everywhere.to(model.device), k, cells).cpu()
        return maps.expand(count, *maps.shape[1:])

    @torch.inference_mode()
    def answers(self, model: Model, x: Tensor, t: Tensor, steering: Conditioning, rows: Tensor | None = None) -> Tensor:
        """The network's raw prediction (B, C, h, w) on x (B, C, h, w) when told t (B,), float32 on the CPU.

        `rows` (B,) says which row of the conditioning belongs to each x; by default they go in order.
        """
        if rows is None:
            rows = torch.arange(len(x))
        found: list[Tensor] = []
        with working(model, "backbone"):
            for part in torch.arange(len(x)).split(BATCH):
                told = steering.map(
                    lambda tensor, part=part: tensor[rows[part]].to(
                        model.device, model.dtype if tensor.is_floating_point() else tensor.dtype
                    )
                )
                raw = model.backbone(x[part].to(model.device, model.dtype), t[part].to(model.device), told)
                found.append(raw[:, : model.codec.channels].float().cpu())
        return torch.cat(found)

    @cached_property
    def noise(self) -> Tensor:
        """(N or more, C, h, w) standard normal, the same for every comparison."""
        return self.noises(0)

    def noises(self, draw: int) -> Tensor:
        """The noise of a comparison that is repeated with another one; draw 0 is that of all others."""
        count, generator = max(len(self.images), DRAWN), torch.Generator().manual_seed(self.seed + 7919 * draw)
        return torch.randn(count, *self.usable.shape[1:], generator=generator)

    @cached_property
    def drawn(self) -> Drawn:
        """A few pictures along a quick and good path, for captions and labels of the user's images."""
        return self.draw(self.model, **self.quick(self.model))

    def quick(self, model: Model) -> dict[str, Any]:
        """A path that has all but converged in few steps; a distilled model keeps its own."""
        facts = model.contract
        if facts.guidance.distilled or facts.sampling.sampler == "lcm" or facts.sampling.steps <= QUICK:
            return {}
        return {"sampler": "dpmpp_2m", "steps": QUICK}

    def draw(self, model: Model, count: int = DRAWN, **changes: Any) -> Drawn:
        """`count` pictures by a request with these changes, for captions and labels taken evenly from the data."""
        rows = torch.zeros(count, dtype=torch.long)
        wishes: list[Mapping[str, Any]] = [{}] * count
        if self.data is not None:
            rows = torch.tensor([i % len(self.data) for i in pictures.spread(len(self.data), count)] * count)[:count]
            wishes = [self._wish(model, int(row)) for row in rows]
        elif model.contract.classes is not None:
            classes = model.contract.classes
            wishes = [{"label": i % len(classes.names)} for i in range(count)]
        width, height = model.contract.size
        requests = [
            Request(**{"seed": self.seed + 1000 + i, "width": width, "height": height, **wish, **changes})
            for i, wish in enumerate(wishes)
        ]
        self.say("pictures of its own")
        results = [r for i in range(0, count, BATCH) for r in generate_batch(model, requests[i : i + BATCH])]
        latents = torch.cat([result.latents.float().cpu() for result in results])
        with working(model, "codec"), torch.inference_mode():
            pixels = torch.cat([model.codec.decode(part.to(model.device)).cpu() for part in latents.split(BATCH)])
        return Drawn(latents, pixels, rows)

    def _wish(self, model: Model, row: int) -> Mapping[str, Any]:
        wish: dict[str, Any] = {}
        if model.text is not None:
            wish["prompt"] = self.images.captions[row]
        label = int(self.images.labels[row])
        if model.contract.classes is not None and label in range(len(model.contract.classes.names)):
            wish["label"] = label
        return wish


def opened(
    path: str | Path,
    *,
    data: str | Path | None = None,
    base: str | Path | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    cache: str | Path | None = None,
    trace: str | Path | None = None,
    count: int = 24,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda what: None,
    **asked: Any,
) -> Case:
    """Open a model for examination: mismatches between its parts do not stop it, they are findings.

    `asked` answers what files cannot say (prediction, distilled, parts), as for `load`. InputError where there is no
    model, no image, or a file is damaged.
    """
    path = Path(path)
    say("model")
    model = load(path, device, dtype, force=True, **asked)
    known = set(_stated(path))
    mismatches = tuple(entry for entry in model.contract.lineage.overrides if entry not in known)
    found = pictures.read(Path(data), model.contract.size, model.codec.pixel_channels, count) if data else None
    other = load(Path(base), device, dtype, force=True) if base else None
    return Case(
        path, model, found, other, tuple((Path(file), weight) for file, weight in lora),
        Path(cache) if cache else None, Path(trace) if trace else None, Path(data) if data else None, mismatches,
        seed, say,
    )  # fmt: skip


def _stated(path: Path) -> tuple[str, ...]:
    """The overrides that the files themselves record."""
    from mezzotint.contract import FILE, read_contract

    return read_contract(path).lineage.overrides if (path / FILE).is_file() else ()
