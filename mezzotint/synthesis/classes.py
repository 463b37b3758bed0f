"""What a model's class names say: a kind of defect, and before it the type of thing that has it ("mono crack")."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.contract import Contract
from mezzotint.errors import InputError

HEALTHY = ("healthy", "good", "normal", "ok")


@dataclass(frozen=True, slots=True)
class Class:
    """One class of a model: its index, name, type ("" where the model knows one only) and kind."""

    index: int
    name: str
    type: str
    kind: str


def classes(contract: Contract) -> list[Class]:
    """The classes of a model in order of their index; InputError where it has none."""
    if contract.classes is None:
        raise InputError("this model has no classes, so nothing tells it which defect to paint. Use a class model.")
    found: list[Class] = []
    for index, name in enumerate(contract.classes.names):
        if index != contract.classes.null:
            *before, kind = re.split(r"[ _-]+", name.strip())
            found.append(Class(index, name, " ".join(before), kind))
    return found


def defects(known: Sequence[Class], wanted: Sequence[str]) -> list[str]:
    """The kinds of defect to paint, as asked for or all the model knows; InputError for one it does not know."""
    kinds = list(dict.fromkeys(c.kind for c in known if c.kind.lower() not in HEALTHY))
    for kind in wanted:
        if kind not in kinds:
            raise InputError(f"the model does not know the defect '{kind}'; it knows: {', '.join(kinds)}")
    if not kinds:
        raise InputError("the model knows no kind of defect: all its classes are healthy ones")
    return list(wanted) or kinds


def types(known: Sequence[Class]) -> list[str]:
    """The types a model knows, in order."""
    return list(dict.fromkeys(c.type for c in known))


def of(known: Sequence[Class], type: str, kind: str) -> Class:
    """The class of a type and a kind."""
    for c in known:
        if (c.type, c.kind) == (type, kind):
            return c
    raise InputError(f"the model has no class for a {kind} on a {type}; it has: {', '.join(c.name for c in known)}")
