"""One step of a chain that is checked: from a picture to its model, from a model to its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Hop:
    """What was looked at, and whether it holds; None where it could not be checked, and `says` says why."""

    what: str  # such as "signature of the model"
    holds: bool | None
    says: str
    digest: str = ""  # SHA-256 of what it is about
    place: str = ""  # the file or folder
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


def failed(hops: list[Hop]) -> list[Hop]:
    """Those that do not hold."""
    return [hop for hop in hops if hop.holds is False]
