"""From a request to pictures with their record: the one place where images leave the house."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

from mezzotint.errors import InputError
from mezzotint.families.model import Model
from mezzotint.generate import generate, settle
from mezzotint.request import Artifact, Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from mezzotint.sampling.loop import Watch


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A model together with the rules its images leave under."""

    model: Model

    def run(self, request: Request, watch: Watch | None = None) -> list[Artifact]:
        """Draw the request's images, each with the record that makes it again."""
        result = generate(self.model, request, watch)
        facts = record(self.model, request)
        return [Artifact(image, {"seed": request.seed + i, **facts}) for i, image in enumerate(result.images)]


def pipeline(model: Model, policy: str | None = None) -> Pipeline:
    """A pipeline without filters, watermark or signature, which is what the policy "off" (or none) says."""
    if policy not in (None, "off"):
        raise InputError(f"policy {policy!r} cannot be kept: there are no filters or signatures yet; use 'off'")
    return Pipeline(model)


def record(model: Model, request: Request) -> dict[str, Any]:
    """How these images are made, contract's answers included, as plain data; pictures by a digest of their pixels."""
    settings, contract = settle(model, request), model.contract
    apart = ("count", "seed", "start_noise")
    asked = {f.name: getattr(request, f.name) for f in fields(request) if f.name not in apart}
    pictures = {name: pixels_digest(asked[name]) for name in ("image", "mask") if asked[name] is not None}
    answered = {
        "sampler": request.sampler or contract.sampling.sampler,
        "steps": settings.first + len(settings.path.steps),
        "guidance": settings.guidance.scale,
        "width": settings.width,
        "height": settings.height,
        "strength": settings.strength,
        "start_noise": request.start_noise is not None,
    }
    return {
        "request": asked | answered | {"image": None, "mask": None} | pictures,
        "model": {
            "family": contract.family,
            "weights": contract.weights,
            "codec": contract.latent.codec,
            "licence": contract.licence.model_dump(),
            "lineage": contract.lineage.model_dump(mode="json"),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "mezzotint": metadata.version("mezzotint"),
    }


def pixels_digest(image: Image) -> str:
    """SHA-256 of mode, size and pixels: the same picture has the same digest in any file format that keeps it."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
