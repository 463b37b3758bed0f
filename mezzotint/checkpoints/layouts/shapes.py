"""What a file's tensor names and shapes say about the network in it."""

from __future__ import annotations

from collections.abc import Mapping

from mezzotint.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def size(shapes: Shapes, name: str, axis: int) -> int:
    """The length of one axis of a tensor; InputError where the file does not hold it, or holds nothing in it."""
    shape = shapes.get(name, ())
    if axis >= len(shape) or shape[axis] < 1:
        raise InputError(f"the file holds no tensor {name} of the kind that its layout should have")
    return int(shape[axis])


def counted(shapes: Shapes, prefix: str) -> int:
    """How many modules, numbered from 0, stand directly under `prefix` (which ends in a dot); InputError for gaps."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    found = {int(number) for number in numbers if number.isascii() and number.isdigit() and len(number) < 9}
    if len(found) != max(found, default=-1) + 1:
        raise InputError(f"the file's modules {prefix}* are not numbered without gaps; part of the weights is missing")
    return len(found)


def only(what: str, values: set[int]) -> int:
    """The one value that all parts of a network share; InputError where they differ, since no configuration says so."""
    if len(values) != 1:
        raise InputError(f"the file's {what} differ ({', '.join(map(str, sorted(values)))}); this network has one")
    return values.pop()
