"""Invertible tables between two layouts of the same weights: the original single file's and the diffusers folder's.

A layout is a list of entries, one per module (its weight and bias follow) or per bare parameter. `renamed` goes from
the original to the folder, `restored` back; the two are inverse to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mezzotint.errors import InputError


class Change(Protocol):
    """What happens to a tensor on its way: one tensor of the original becomes the folder's tensors, and back."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """From the original's tensor to the folder's."""
        ...

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """From the folder's tensors to the original's: the inverse of `split`."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """The same tensor under another name."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0]


@dataclass(frozen=True, slots=True)
class Fused:
    """Several projections stored as one, stacked along the rows: equal parts, or rows in proportion to `parts`.

    With `axes` the weight is stored as a convolution of kernel 1 over so many axes.
    """

    parts: tuple[int, ...]
    axes: int = 0

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        unit, rest = divmod(tensor.shape[0], sum(self.parts))
        if rest:
            raise InputError(f"{tensor.shape[0]} rows do not fall into parts of {self.parts}")
        return _matrix(tensor, self.axes).split([unit * part for part in self.parts])

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return _kernel(torch.cat(tensors), self.axes)


@dataclass(frozen=True, slots=True)
class Swapped:
    """Two halves along the rows in the other order: (shift, scale) against (scale, shift)."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        first, second = tensor.chunk(2)
        return (torch.cat((second, first)),)

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return self.split(tensors[0])[0]


@dataclass(frozen=True, slots=True)
class Pointwise:
    """A linear layer stored as a convolution of kernel 1 over `axes` axes; vectors (biases) stay."""

    axes: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (_matrix(tensor, self.axes),)

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return _kernel(tensors[0], self.axes)


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix stored the other way round."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.T,)

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0].T


@dataclass(frozen=True, slots=True)
class HeadFused:
    """q, k and v fused head by head, as in guidance and improved diffusion: rows are (heads, 3, width of a head).

    With `axes` the weight is stored as a convolution of kernel 1 over so many axes; those two have one.
    """

    heads: int
    axes: int = 1

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.shape[0] % (3 * self.heads):
            raise InputError(f"{tensor.shape[0]} rows do not fall into q, k and v of {self.heads} heads")
        by_head = _matrix(tensor, self.axes).unflatten(0, (self.heads, 3, -1))
        return tuple(part.flatten(0, 1) for part in by_head.unbind(1))

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        by_head = torch.stack([tensor.unflatten(0, (self.heads, -1)) for tensor in tensors], dim=1)
        return _kernel(by_head.flatten(0, 2), self.axes)


@dataclass(frozen=True, slots=True)
class Copied:
    """One tensor of the original that the folder holds several times over; going back, all must still be equal."""

    times: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,) * self.times

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        if not all(tensors[0] is other or other.is_meta or torch.equal(tensors[0], other) for other in tensors[1:]):
            raise InputError("copies of one tensor differ, so the original layout, which has one, cannot hold them")
        return tensors[0]


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that the original stores and the folder's network computes: going back, it is computed.

    A stored one must equal the computed one within `tolerance` and the rounding of its own number format.
    """

    compute: Callable[[], Tensor]  # float32
    tolerance: float = 1e-6

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if not tensor.is_meta:
            found, expected = tensor.float(), self.compute().to(tensor)
            allowed = self.tolerance + torch.finfo(tensor.dtype).eps
            if found.shape != expected.shape or (found - expected.float()).abs().max() > allowed:
                raise InputError("a stored table is not the one that this network computes, so it cannot be left out")
        return ()

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return self.compute()


def _matrix(tensor: Tensor, axes: int) -> Tensor:
    """A convolution of kernel 1 over `axes` axes as a matrix; matrices and vectors (biases) stay."""
    return tensor.flatten(1) if tensor.ndim == 2 + axes else tensor


def _kernel(tensor: Tensor, axes: int) -> Tensor:
    """A matrix as a convolution of kernel 1 over `axes` axes; vectors (biases) stay."""
    return tensor[(...,) + (None,) * axes] if tensor.ndim == 2 else tensor


SAME = Same()


@dataclass(frozen=True, slots=True)
class Entry:
    """`theirs`, a module or parameter of the original layout, and the folder's names for it.

    Names of modules stand for all that is directly in them (`.weight`, `.bias`); bare parameters are named in full.
    """

    theirs: str
    ours: tuple[str, ...]
    change: Change = SAME


def entry(theirs: str, *ours: str, change: Change = SAME) -> Entry:
    """One row of a table."""
    return Entry(theirs, ours, change)


def nested(theirs: str, ours: str, table: Mapping[str, str], change: Change = SAME) -> list[Entry]:
    """The rows of a small table, original name to folder's name, for the module `theirs` that is `ours` there."""
    return [Entry(f"{theirs}.{a}", (f"{ours}.{b}",), change) for a, b in table.items()]


def renamed(tensors: Mapping[str, Tensor], entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Tensors of the original layout under the folder's names; what no entry speaks of keeps its own name."""
    table = {row.theirs: row for row in entries}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        row, leaf = _row(table, name)
        if row is None:
            found[name] = tensor
            continue
        parts = row.change.split(tensor)
        found |= {f"{ours}{leaf}": part for ours, part in zip(row.ours, parts, strict=True)}
    return found


def restored(tensors: Mapping[str, Tensor], entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Tensors of the folder under the original's names; the inverse of `renamed`.

    InputError where some parts of a fused tensor are missing, or a tensor has no place in the original layout.
    """
    entries = list(entries)
    table = {row.ours[0]: row for row in entries if row.ours}
    others = {ours for row in table.values() for ours in row.ours[1:]}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        row, leaf = _row(table, name)
        if row is None:
            if name in others or name.rpartition(".")[0] in others:
                continue  # comes along with the first part
            raise InputError(f"the original layout has no place for {name}")
        names = [f"{ours}{leaf}" for ours in row.ours]
        missing = [other for other in names if other not in tensors]
        if missing:
            raise InputError(f"{row.theirs}{leaf} is made of {len(names)} tensors, and {missing[0]} is missing")
        found[f"{row.theirs}{leaf}"] = row.change.join((tensor, *(tensors[other] for other in names[1:])))
    dtypes = {tensor.dtype for tensor in found.values() if tensor.is_floating_point()}
    for row in entries:
        if not row.ours:  # the folder has nothing for it; it is written in the number format of its neighbours
            computed = row.change.join(())
            found[row.theirs] = computed.to(next(iter(dtypes))) if len(dtypes) == 1 else computed
    return found


def _row(table: Mapping[str, Entry], name: str) -> tuple[Entry | None, str]:
    """The entry for a tensor and what of its name the entry leaves open: "" or ".weight"."""
    if name in table:
        return table[name], ""
    stem, _, leaf = name.rpartition(".")
    return table.get(stem), f".{leaf}"
