"""What was planned for this machine before anything ran, against what is measured now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezzotint.doctor.finding import Finding, Measure

if TYPE_CHECKING:
    from mezzotint.doctor.timing import Timed

BEYOND = 2.0  # times what was planned: networks that were planned and run differ by 1.3 at most, beside one job by 2


@dataclass(frozen=True, slots=True)
class Planned:
    """Seconds that a request of one picture was planned to take, by part, and its peak of memory."""

    step: float
    kinds: Mapping[str, float]  # of the step, by kind of layer
    text: float
    decode: float
    peak: float  # bytes


Foresee = Callable[[tuple[int, int]], Planned | None]  # for a width and height; None where the machine is not measured


def unforeseen(size: tuple[int, int]) -> None:
    """No plan."""
    return None


def against(
    plan: Planned | None, step: Timed, kinds: Sequence[Timed], text: Timed, decode: Timed
) -> tuple[list[Finding], list[Measure]]:
    """Each part over its plan; a note where even the quickest step is far beyond it. Decoding is at the model's size,
    and so compared only where the step is."""
    if plan is None:
        return [], []
    pairs = [(step, plan.step), (text, plan.text), (decode, 0.0 if step.note else plan.decode)]
    pairs += [(each, plan.kinds.get(each.name.removeprefix("step."), 0.0)) for each in kinds]
    told = [
        Measure(f"{part.name} over its plan", part.value / foreseen, min(part.spans) / foreseen,
                max(part.spans) / foreseen, f"below {BEYOND:g}" if part is step else "")
        for part, foreseen in pairs if foreseen > 0.0
    ]  # fmt: skip
    told.append(Measure("planned peak of memory", plan.peak / 1e9, unit="GB"))
    least = min(step.spans) / plan.step
    if least < BEYOND:
        return [], told
    most = max(kinds, key=lambda each: each.value - plan.kinds.get(each.name.removeprefix("step."), 0.0), default=None)
    says = f"even the quickest step takes {least:.1f} times the {plan.step:.2g} s that were planned for this machine"
    says += f", most of it beyond the plan in {most.name.removeprefix('step.')}" if most else ""
    do = "Look what else this machine does now. If nothing, measure it anew: the plan rests on an older measurement."
    return [Finding("speed.plan", "note", says, do, "mezzotint plan --calibrate", least / BEYOND, tuple(told))], told
