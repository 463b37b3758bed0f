"""What a probe says: measures with their bounds, findings with their causes, and what to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from mezzotint.doctor.statistics import Mean

Grade = Literal["broken", "harmful", "note"]  # nothing good can come out | it costs quality or time | good to know
GRADES: tuple[Grade, ...] = ("broken", "harmful", "note")


@dataclass(frozen=True, slots=True)
class Measure:
    """One number with its uncertainty, and the bound that it is held to."""

    name: str
    value: float
    low: float | None = None  # 95 % interval, where the number is a mean over images or draws
    high: float | None = None
    bound: str = ""  # "at most 0.05", in words
    unit: str = ""


def measured(name: str, mean: Mean, bound: str = "", unit: str = "") -> Measure:
    """A mean with its interval as a measure."""
    return Measure(name, mean.value, mean.low, mean.high, bound, unit)


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over a common axis, or bars, by name: what a report draws."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    kind: Literal["lines", "bars"] = "lines"
    log_x: bool = False
    log_y: bool = False
    labels: Sequence[str] = ()  # of the bars, by place


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A picture to look at, with what is to be seen."""

    title: str
    image: Image


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause: what was measured, what follows from it, what mends it."""

    cause: str  # a fixed name, listed in doctor.causes
    grade: Grade
    says: str  # a sentence with the numbers
    do: str  # one imperative sentence
    command: str = ""  # that mends it, where one does
    strength: float = 1.0  # times beyond its bound, to rank findings of one grade
    measures: tuple[Measure, ...] = ()
    also: tuple[str, ...] = ()  # causes that the evidence does not tell apart from this one


@dataclass(frozen=True, slots=True)
class Checked:
    """What one probe found, healthy or not."""

    findings: tuple[Finding, ...] = ()
    measures: tuple[Measure, ...] = ()
    plots: tuple[Plot, ...] = ()
    exhibits: tuple[Exhibit, ...] = ()


class NotChecked(Exception):
    """Raised by a probe that lacks what it needs; the message says what to give it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A probe's name, what it says or why it could not look, and the seconds it took."""

    probe: str
    checked: Checked | None
    why: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found about a model, the likeliest cause first."""

    path: str
    facts: Mapping[str, Any]  # plain data: what the files say
    findings: tuple[Finding, ...]  # ranked; those that follow from another one behind it
    follows: Mapping[str, str]  # cause -> the cause that brings it about, where both were found
    outcomes: tuple[Outcome, ...]
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # images, seed: what a repetition needs

    @property
    def healthy(self) -> bool:
        """Nothing that costs quality or time was found."""
        return all(each.grade == "note" for each in self.findings)
