"""From a request to pictures with their record: the one place where images leave the house."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezzotint.errors import InputError
from mezzotint.families.model import Model
from mezzotint.families.native import identified
from mezzotint.generate import generate
from mezzotint.pipeline.record import record
from mezzotint.request import Artifact, Request

if TYPE_CHECKING:
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
    """A pipeline without filters, watermark or signature, which is what the policy "off" (or none) says.

    A published checkpoint comes without digests of its weights; they are computed here, once, since every record names
    them: about a second per gigabyte.
    """
    if policy not in (None, "off"):
        raise InputError(f"policy {policy!r} cannot be kept: there are no filters or signatures yet; use 'off'")
    return Pipeline(identified(model))
