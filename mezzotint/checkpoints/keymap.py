"""Invertible tables between two layouts of the same weights: the original single file's and the diffusers folder's.

A layout is a list of entries, one per module (its weight and bias follow) or per bare parameter. `renamed` goes from the
original to the folder, `restored` back; the two are inverse to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Several projections stored as one, stacked along the rows: equal parts, or rows in proportion to `parts`."""

    parts: tuple[int, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        unit, rest = divmod(tensor.shape[0], sum(self.parts))
        if rest:
            raise InputError(f"{tensor.shape[0]} rows do not fall into parts of {self.parts}")
        return tensor.split([unit * part for part in self.parts])

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(tensors)


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
        return (tensor.flatten(1) if tensor.ndim == 2 + self.axes else tensor,)

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        tensor = tensors[0]
        return tensor[(...,) + (None,) * self.axes] if tensor.ndim == 2 else tensor


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

    Stored as a convolution of kernel 1 over one axis where the weight has three axes.
    """

    heads: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rows = tensor.flatten(1) if tensor.ndim > 1 else tensor
        by_head = rows.unflatten(0, (self.heads, 3, -1))
        return tuple(part.flatten(0, 1) for part in by_head.unbind(1))

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        by_head = torch.stack([tensor.unflatten(0, (self.heads, -1)) for tensor in tensors], dim=1)
        rows = by_head.flatten(0, 2)
        return rows[..., None] if rows.ndim == 2 else rows


@dataclass(frozen=True, slots=True)
class Copied:
    """One tensor of the original that the folder holds several times over; going back, all must still be equal."""

    times: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,) * self.times

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
            raise InputError("copies of one tensor differ, so the original layout, which has one, cannot hold them")
        return tensors[0]


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
    table = {row.ours[0]: row for row in entries}
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
    return found


def _row(table: Mapping[str, Entry], name: str) -> tuple[Entry | None, str]:
    """The entry for a tensor and what of its name the entry leaves open: "" or ".weight"."""
    if name in table:
        return table[name], ""
    stem, _, leaf = name.rpartition(".")
    return table.get(stem), f".{leaf}"
