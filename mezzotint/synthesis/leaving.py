"""A painted picture on its way out: through the same house as every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mezzotint.families import Model
from mezzotint.governance.prompts import Verdict
from mezzotint.pipeline import marking, record
from mezzotint.pipeline.house import House
from mezzotint.pipeline.marking import Mark
from mezzotint.pipeline.release import Drawn, released, withheld
from mezzotint.request import Artifact, Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Leave:
    """What is known of a picture before it is painted."""

    facts: dict[str, Any]
    mark: Mark | None


def asked(desk: House, model: Model, request: Request) -> Leave:
    """The record and the mark of a picture that is about to be painted.

    The painted spot carries no watermark unless it is a large part of the picture: it would not be found. Refused where
    the policy wants one always.
    """
    facts = record(model, request)
    return Leave(facts, next(iter(marking.carried(desk, model, request, facts)), None))


def left(
    desk: House, model: Model, request: Request, leave: Leave, painted: Image, verdict: Verdict, told: dict[str, Any],
    asks: dict[str, Any],
) -> Artifact | None:  # fmt: skip
    """A painted picture through the house: signed with its source as parent; None where a filter withholds it."""
    one = Drawn(painted, {"seed": request.seed, **leave.facts}, leave.mark, request.mask, request.image)
    if not verdict.allowed:
        withheld(desk, one, verdict)
        return None
    return released(desk, one, told, asks, model=model.path)
