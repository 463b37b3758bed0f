"""From a request to pictures that may leave: rules, watermark, drawing, filters, signature, log, in this order."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.errors import Refused
from mezzotint.families.model import Model
from mezzotint.families.native import identified
from mezzotint.generate import generate
from mezzotint.governance.policy import Policy
from mezzotint.pipeline import copies, marking
from mezzotint.pipeline.admission import admitted, facts_of
from mezzotint.pipeline.house import House, house
from mezzotint.pipeline.record import record
from mezzotint.pipeline.release import Drawn, looked_at, released, withheld
from mezzotint.request import Artifact, Request

if TYPE_CHECKING:
    from mezzotint.families.model import Engine
    from mezzotint.sampling.loop import Watch


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A model together with the rules its images leave under."""

    model: Model
    house: House

    def run(
        self, request: Request, watch: Watch | None = None, media: str = "image/png", engine: Engine = nullcontext
    ) -> list[Artifact]:
        """Draw the request's images, each marked, signed, and with the record that makes it again.

        Refused where the policy does not allow the request, or withholds all of its pictures; where it withholds some,
        a warning says how many and why.
        """
        model, desk = self.model, self.house
        gate = facts_of(admitted(desk, model, request))
        facts = record(model, request)
        marks = marking.carried(desk, model, request, facts)
        if desk.key is not None and marks and marks[0].method == "start noise":
            request = marking.noised(model, request, desk.key, marks)
        pictures = generate(model, request, watch, engine).images
        drawn = [
            Drawn(picture, {"seed": request.seed + i, **facts}, mark, request.mask, request.image)
            for i, (picture, mark) in enumerate(zip(pictures, marks or [None] * request.count, strict=True))
        ]
        kept = copies.check(model.path) if self._looks_for_copies(request) else None
        verdicts = looked_at(desk, pictures, kept)
        for each, (verdict, _) in zip(drawn, verdicts, strict=True):
            if not verdict.allowed:
                withheld(desk, each, verdict)
        refused = [verdict for verdict, _ in verdicts if not verdict.allowed]
        if len(refused) == len(drawn):
            raise Refused(refused[0].rule, f"refused by the policy '{desk.policy.name}': {refused[0].says}.")
        if refused:
            warnings.warn(f"{len(refused)} of {len(drawn)} pictures stay: {refused[0].says}", stacklevel=2)
        adapters = [str(Path(path).resolve()) for path, _ in request.lora]
        return [
            released(desk, each, told, gate, media, model.path, adapters)
            for each, (verdict, told) in zip(drawn, verdicts, strict=True) if verdict.allowed
        ]  # fmt: skip

    def _looks_for_copies(self, request: Request) -> bool:
        """Whether pictures are compared with training images: not where most of a picture is the given one."""
        return self.house.policy.pictures.copies is not False and request.image is None and self.model.path is not None


def pipeline(model: Model, policy: Policy | str | Path | None = None) -> Pipeline:
    """A model under a policy: a TOML file, "off", or the default for None.

    A published checkpoint comes without digests of its weights; they are computed here, once, since every record names
    them: about a second per gigabyte. InputError where the policy cannot be kept: a key, a certificate or a library is
    missing.
    """
    desk = house(policy)
    named = identified(model)
    return Pipeline(replace(named, path=model.path), desk)
