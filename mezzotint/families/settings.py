"""What a request comes to: the sampler's path, the guidance and the size, once the contract has answered the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mezzotint import images
from mezzotint.errors import InputError
from mezzotint.families.model import Model
from mezzotint.guidance import Guidance
from mezzotint.process import Level, RectifiedFlow
from mezzotint.request import Request
from mezzotint.sampling import LCM, SAMPLERS, Path, Sampler, fitted

if TYPE_CHECKING:
    from PIL.Image import Image

STRENGTH = 0.8  # of image-to-image where the request does not say


@dataclass(frozen=True, slots=True)
class Settings:
    """What a request comes to once the contract has answered what it left open; equal for all requests of one batch."""

    sampler: Sampler
    path: Path  # the steps really taken
    first: int  # index of the first one
    guidance: Guidance
    width: int
    height: int
    strength: float | None  # None: there is no image
    masked: bool
    adapters: tuple[object, ...]  # LoRA files with weights, and embedding files
    controls: tuple[tuple[str, float], ...]  # control networks with their scales
    references: tuple[tuple[int, int], ...]  # width and height of each picture to look at
    skip: tuple[int, ...]  # blocks left out in the second look of skip-layer guidance

    @property
    def total(self) -> int:
        """The steps of the whole path, those not taken (image to image) included."""
        return self.first + len(self.path.steps)

    def index(self, level: Level[float]) -> int:
        """The place of a level on the whole path, 0 the first."""
        return self.first + sum(step.now.t > level.t for step in self.path.steps)

    def progress(self, level: Level[float]) -> float:
        """How far along the whole path a level is: 0 at its first step, 1 at its last."""
        return min(1.0, self.index(level) / max(1, self.total - 1))


def settle(model: Model, request: Request) -> Settings:
    """Answer from the contract what the request leaves open; InputError where the model cannot serve it."""
    facts = model.contract
    name = request.sampler or facts.sampling.sampler
    if name not in SAMPLERS:
        near = get_close_matches(name, SAMPLERS, n=1, cutoff=0.0)
        raise InputError(f"unknown sampler {name!r}: did you mean {near[0]!r}? Valid: {', '.join(SAMPLERS)}")
    sampler: Any = SAMPLERS[name]
    if request.eta is not None:
        if not hasattr(sampler, "eta"):
            able = [n for n, s in SAMPLERS.items() if hasattr(s, "eta")]
            raise InputError(f"sampler {name!r} has no eta; these have: {', '.join(able)}")
        sampler = replace(sampler, eta=request.eta)
    sampler = fitted(
        sampler, facts.sampling.spacing, facts.sampling.offset, facts.sampling.last, facts.sampling.variance
    )
    references = tuple(looked_at(model, picture).size for picture in request.references)
    usual = references[0] if references and request.image is None else facts.size
    width, height = (request.width, request.height) if request.width and request.height else usual
    patch = getattr(model.backbone.config, "patch_size", 1)
    multiple = model.codec.factor * patch
    if width % multiple or height % multiple:
        w, h = (max(multiple, round(side / multiple) * multiple) for side in (width, height))
        raise InputError(f"size {width}x{height} is not a multiple of {multiple}, which this model needs: use {w}x{h}")
    steps = request.steps or facts.sampling.steps
    strength, masked = request.strength, request.mask is not None
    if request.image is not None and strength is None:
        strength = 1.0 if masked else STRENGTH
    first = 0 if strength is None else entry(model, steps, strength)
    if strength is not None and not masked and isinstance(sampler, LCM) and facts.sampling.from_image == "all":
        sampler, first = replace(sampler, reach=strength), 0  # all its steps, from lower down
    tokens = (width // multiple) * (height // multiple)
    scale = facts.guidance.scale if request.guidance is None else request.guidance
    return Settings(
        sampler=sampler,
        path=sampler.path(model.process, steps, first, tokens),
        first=first,
        guidance=Guidance(
            scale, request.guidance_rescale, request.guidance_interval, request.skip_scale, request.skip_interval
        ),
        width=width,
        height=height,
        strength=strength,
        masked=masked,
        adapters=(tuple(request.lora), tuple(request.embedding)),
        controls=tuple((str(path), scale) for path, _, scale in request.control),
        references=references,
        skip=skippable(model, request.skip_layers),
    )


def entry(model: Model, steps: int, strength: float) -> int:
    """The step at which a picture enters the path: the share walked is rounded down, on a flow up (as published)."""
    if isinstance(model.process.schedule, RectifiedFlow):
        return min(steps - 1, int(steps - steps * strength))
    return steps - max(1, int(steps * strength))


def looked_at(model: Model, picture: Image) -> Image:
    """A picture as the network sees it: within the model's bound, its centre cut to whole latent units."""
    bound = model.contract.references
    if bound is None:
        raise InputError("this model cannot look at pictures: leave the references out")
    return images.bounded(picture, bound, model.codec.factor)


def skippable(model: Model, layers: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks to leave out; InputError where the network has no such blocks."""
    count = int(getattr(model.backbone, "skippable", 0))
    if layers and not count:
        raise InputError("this model's blocks cannot be skipped: leave skip_layers out")
    if any(not 0 <= layer < count for layer in layers):
        raise InputError(f"skip_layers {layers} are not all among the blocks 0 to {count - 1}")
    return layers


def shared(settings: Sequence[Settings]) -> Settings:
    """The settings of a batch; InputError where its requests ask for different ones."""
    first, *others = settings
    for field in fields(Settings):
        if any(getattr(other, field.name) != getattr(first, field.name) for other in others):
            raise InputError(f"requests drawn as one batch must agree, and differ in {field.name}: draw them apart")
    return first
