"""What an audit says: findings by severity, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["stop", "warn", "note"]  # training must not start | look at it before | good to know
SEVERITIES: tuple[Severity, ...] = ("stop", "warn", "note")
KEPT = 200  # examples of a finding; what stops a run is listed in full


@dataclass(frozen=True, slots=True)
class Example:
    """One case of a finding: the files to look at side by side, and what is to be said of them."""

    files: tuple[str, ...]
    says: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found in a data set."""

    kind: str  # a fixed short name, for programs
    severity: Severity
    what: str  # a sentence with the numbers
    count: int  # images, files or lines concerned
    do: str  # one imperative sentence
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True)
class Audit:
    """All findings about a training folder, most severe first, and the facts behind them."""

    folder: str
    validation: str | None
    findings: tuple[Finding, ...]
    facts: dict[str, Any]  # plain JSON data

    @property
    def stops(self) -> tuple[Finding, ...]:
        """The findings with which training must not start."""
        return tuple(finding for finding in self.findings if finding.severity == "stop")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def finding(
    kind: str, severity: Severity, what: str, do: str, examples: Iterable[Example], count: int | None = None
) -> Finding:
    """A finding about so many examples as there are, unless `count` says otherwise."""
    every = tuple(examples)
    kept = every if severity == "stop" else every[:KEPT]
    return Finding(kind, severity, what, len(every) if count is None else count, do, kept)


def counted(number: int, noun: str, many: str = "") -> str:
    """ "1 image", "2,094 images"; `many` for a plural that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def at(folder: Path, name: str) -> str:
    """A file of a folder, as examples name it."""
    return str(folder / name)
