"""A painted picture on its way out: through the same house as every other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mezzotint.errors import Refused
from mezzotint.families import Model
from mezzotint.governance.prompts import Verdict
from mezzotint.pipeline import marking, record
from mezzotint.pipeline.house import House
from mezzotint.pipeline.release import Drawn, released, withheld
from mezzotint.request import Artifact, Request

if TYPE_CHECKING:
    from PIL.Image import Image


def left(
    desk: House, model: Model, request: Request, painted: Image, verdict: Verdict, told: dict[str, Any],
    asks: dict[str, Any],
) -> Artifact:  # fmt: skip
    """A painted picture through the house: signed with its source as parent. Refused where a filter withholds it.

    The painted spot carries no watermark unless it is a large part of the picture: it would not be found. Refused, too,
    where the policy wants one always.
    """
    facts = record(model, request)
    mark = next(iter(marking.carried(desk, model, request, facts)), None)
    one = Drawn(painted, {"seed": request.seed, **facts}, mark, request.mask, request.image)
    if not verdict.allowed:
        withheld(desk, one, verdict)
        raise Refused(
            verdict.rule, f"refused by the policy '{desk.policy.name}', image of seed {request.seed}: {verdict.says}."
        )
    return released(desk, one, told, asks, model=model.path)
