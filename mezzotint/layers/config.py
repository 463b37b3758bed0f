"""Network configurations as plain dataclasses, read from and written to the published config.json files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

OURS = {"ours": True}  # metadata of a field that the published class does not have


def read_config(kind: type[Config], data: Mapping[str, object], fixed: Mapping[str, object]) -> Config:
    """Build the dataclass `kind` from a config.json; lists become tuples, keys starting with '_' are the writer's own.

    `fixed` names options that the published files may carry and we build one way only: any other value of theirs, and
    any key that is neither a field nor in `fixed`, raises InputError naming it.
    """
    hints = get_type_hints(kind)
    chosen: dict[str, object] = {}
    for key, value in data.items():
        if key.startswith("_"):
            continue
        value = _plain(value)
        if key in hints:
            if not _fits(value, hints[key]):
                wanted = str(kind.__annotations__[key])
                raise InputError(f"{kind.__name__}: '{key}' = {value!r} is not of the kind it must be: {wanted}")
            chosen[key] = value
        elif key not in fixed:
            near = difflib.get_close_matches(key, [*hints, *fixed], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise InputError(f"{kind.__name__} does not know the option '{key}' = {value!r}{hint}")
        elif value != fixed[key]:
            raise InputError(f"{kind.__name__} cannot build '{key}' = {value!r}: only {fixed[key]!r} is supported")
    return kind(**chosen)


def write_config(config: DataclassInstance, class_name: str) -> dict[str, object]:
    """The config.json of a network: the dataclass as plain data with the published class name in front.

    A field marked OURS is written only where it says something, so that the published class knows all that is in it.
    """
    silent = {f.name for f in fields(config) if "ours" in f.metadata and getattr(config, f.name) == f.default}
    options = {key: _listed(value) for key, value in asdict(config).items() if key not in silent}
    return {"_class_name": class_name, **options}


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value of the option `name` that is not among those that can be built."""
    if value not in allowed:
        raise InputError(f"'{name}' = {value!r} cannot be built; {', '.join(map(repr, allowed))} can")


def divides(name: str, channels: int, part: int) -> None:
    """Refuse a number of groups or heads that does not divide the channels evenly."""
    if part < 1 or channels % part:
        raise InputError(f"'{name}' = {part} does not divide {channels} channels")


def _fits(value: object, hint: Any) -> bool:
    """Whether a plain value is of the annotated type: numbers, text, None, tuples of them, unions."""
    if isinstance(hint, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if not isinstance(value, tuple):
            return False
        items = cast("tuple[object, ...]", value)
        if not inner:  # tuple[()]: none is a choice
            return not items
        wanted = inner[:1] * len(items) if inner[-1] is ... else inner
        return len(items) == len(wanted) and len(items) > 0 and all(map(_fits, items, wanted))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float)) if hint is float else isinstance(value, hint)


def _plain(value: object) -> object:
    return tuple(_plain(item) for item in cast("list[object]", value)) if isinstance(value, (list, tuple)) else value


def _listed(value: object) -> object:
    return [_listed(item) for item in cast("list[object]", value)] if isinstance(value, (list, tuple)) else value
