"""What licences of weights and data allow, as facts by name. No legal advice: the licence's own text decides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mezzotint.errors import InputError
from mezzotint.governance.policy import Use

Answer = Literal["yes", "no", "conditional", "unknown"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a licence says of commercial use, and what it asks in return."""

    commercial: Answer
    asks: tuple[str, ...] = ()
    strict: int = 0  # rank among known ones: a work of several parts is under the strictest


ATTRIBUTION, ALIKE, USES = "name the authors", "share alike", "pass the use restrictions on"
KNOWN: Mapping[str, Terms] = {  # by SPDX name, else by how the licence calls itself; lower case
    "cc0-1.0": Terms("yes"),
    "mit": Terms("yes", (ATTRIBUTION,), 1),
    "bsd-2-clause": Terms("yes", (ATTRIBUTION,), 1),
    "bsd-3-clause": Terms("yes", (ATTRIBUTION,), 1),
    "apache-2.0": Terms("yes", (ATTRIBUTION,), 2),
    "cc-by-4.0": Terms("yes", (ATTRIBUTION,), 3),
    "creativeml openrail-m": Terms("yes", (USES,), 4),
    "creativeml open rail++-m": Terms("yes", (USES,), 4),
    "cc-by-sa-4.0": Terms("yes", (ATTRIBUTION, ALIKE), 5),
    "stability ai community license": Terms("conditional", ("yearly revenue below 1 M USD, or their own terms",), 6),
    "cc-by-nc-4.0": Terms("no", (ATTRIBUTION,), 7),
    "cc-by-nc-sa-4.0": Terms("no", (ATTRIBUTION, ALIKE), 8),
    "flux non-commercial": Terms("no", (USES,), 9),
    "flux [dev] non-commercial": Terms("no", (USES,), 9),
}  # fmt: skip
UNKNOWN = Terms("unknown", (), 10)
UNSTATED = "unknown"  # stands in contracts where nobody said
TRIMMINGS = re.compile(r"( license| licence)?( v[\d.]+)?( \([^)]*\))?$")  # what may follow a name


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a use is allowed, what stands against it, and what is asked."""

    allowed: bool
    conflicts: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()


def terms(licence: str) -> Terms:
    """The terms of a licence by its name; what is not known is unknown, and never taken for free."""
    name = TRIMMINGS.sub("", " ".join(licence.casefold().split()))
    return KNOWN.get(name) or KNOWN.get(f"{name} license") or UNKNOWN


def gate(rules: Use, licences: Mapping[str, str | None]) -> Gate:
    """The licences of all parts, by what they are of, against what the pictures are for.

    A part without a licence counts as unknown. For commercial use what is unknown or conditional is in the way, too:
    the policy's owner may decide that with forbidden = "record".
    """
    found = {part: terms(name or "") for part, name in licences.items()}
    asks = dict.fromkeys(f"{part}: {ask}" for part, each in found.items() for ask in each.asks)
    conflicts: list[str] = []
    if rules.use == "commercial":
        why = {"no": "forbids commercial use", "conditional": "allows it under conditions", "unknown": "is not known"}
        conflicts = [
            f"the licence of {part} ({licences[part] or 'none stated'}) {why[each.commercial]}"
            for part, each in found.items() if each.commercial != "yes"
        ]  # fmt: skip
    return Gate(not conflicts or rules.forbidden == "record", tuple(conflicts), tuple(asks))


def stated(name: str | None) -> bool:
    """Whether anybody said; files of some families say in a sentence that they do not."""
    return bool(name) and name != UNSTATED and "not stated" not in name


def combined(licences: Iterable[str | None]) -> str:
    """The licence that a work of several parts is under at least: the strictest; unknown ones win."""
    named = [name for name in licences if name]
    silent = next(iter(named), UNSTATED)  # in the words of the part that does not say
    return max(filter(stated, named), key=lambda name: terms(name).strict, default=silent)


def derived(own: str | None, base: str | None, of: str = "its base") -> str:
    """The licence of what is made from a base: the one that its maker states, else the base's.

    InputError where the stated one is freer than the base's: what the base forbids stays forbidden.
    """
    least = combined([base])
    if not own:
        return least
    if stated(least) and terms(own).strict < terms(least).strict:
        raise InputError(
            f"licence = '{own}' is freer than '{least}', the licence of {of}.\n"
            "Leave licence out, and the base's holds, or state one that allows no more."
        )
    return own
