"""What a file's tensor names and shapes say about the network in it."""

from __future__ import annotations

from collections.abc import Mapping

from mezzotint.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def size(shapes: Shapes, name: str, axis: int) -> int:
    """The length of one axis of a tensor; InputError where the file does not hold it."""
    shape = shapes.get(name)
    if shape is None or axis >= len(shape):
        raise InputError(f"the file holds no tensor {name} of the kind that its layout should have")
    return int(shape[axis])


def counted(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules stand directly under `prefix` (which ends in a dot): one more than the highest."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def only(what: str, values: set[int]) -> int:
    """The one value that all parts of a network share; InputError where they differ, since no configuration says so."""
    if len(values) != 1:
        raise InputError(f"the file's {what} differ ({', '.join(map(str, sorted(values)))}); this network has one")
    return values.pop()
