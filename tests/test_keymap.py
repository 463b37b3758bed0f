"""Each change between two layouts, and what a table of them does with a file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mezzotint.checkpoints.keymap import (
    Change,
    Computed,
    Copied,
    Fused,
    HeadFused,
    Pointwise,
    Swapped,
    Transposed,
    entry,
    nested,
    renamed,
    restored,
)
from mezzotint.errors import InputError

ROWS = torch.arange(12.0)
CHANGES: dict[str, tuple[Change, Tensor, list[list[float]]]] = {
    "equal parts": (Fused((1, 1, 1)), ROWS, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    "parts in proportion": (Fused((1, 1, 4)), ROWS, [[0, 1], [2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]),
    "head by head": (HeadFused(2), ROWS, [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
    "halves swapped": (Swapped(), ROWS[:4], [[2, 3, 0, 1]]),
    "copies": (Copied(2), ROWS[:2], [[0, 1], [0, 1]]),
    "pointwise": (Pointwise(2), ROWS[:2], [[0, 1]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_go_where_they_should(name: str) -> None:
    """Vectors (biases): the rows by number, and back."""
    change, rows, expected = CHANGES[name]
    parts = change.split(rows)
    assert [part.tolist() for part in parts] == expected
    assert torch.equal(change.join(parts), rows)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_matrices_follow_the_vectors(name: str, axes: int) -> None:
    """Weights, as matrices or as convolutions of kernel 1, are split as their biases are and come back as they were."""
    change, rows, expected = CHANGES[name]
    if isinstance(change, Fused):
        change = Fused(change.parts, axes)
    elif isinstance(change, HeadFused):
        change = HeadFused(change.heads, axes)
    elif isinstance(change, Pointwise):
        change = Pointwise(axes)
    weight = (rows[:, None] + torch.tensor([0.0, 0.25, 0.5]))[(...,) + (None,) * axes]  # (rows, 3, 1 ...)
    parts = change.split(weight)
    assert [part.flatten(1)[:, 0].tolist() for part in parts] == expected
    kept = isinstance(change, Swapped | Copied)
    assert all(part.ndim == (2 + axes if kept else 2) for part in parts)
    assert torch.equal(change.join(parts), weight)


def test_transposed_is_its_own_inverse() -> None:
    weight = torch.randn(2, 3)
    (part,) = Transposed().split(weight)
    assert torch.equal(part, weight.T)
    assert torch.equal(Transposed().join((part,)), weight)


@pytest.mark.parametrize("change", [Fused((1, 1, 1)), HeadFused(2)])
def test_rows_that_do_not_divide_are_refused(change: Change) -> None:
    with pytest.raises(InputError, match="do not fall into"):
        change.split(torch.zeros(10))


def test_computed_table_is_checked_and_comes_back_in_the_format_of_the_file() -> None:
    table = torch.linspace(0, 1, 5)
    rows = [entry("a", "b"), entry("positions", change=Computed(lambda: table))]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        original = {"a.weight": torch.ones(2, dtype=dtype), "positions": table.to(dtype)}
        folder = renamed(original, rows)
        assert folder.keys() == {"b.weight"}
        back = restored(folder, rows)
        assert back["positions"].dtype == dtype
        assert torch.equal(back["positions"], original["positions"])
    for wrong in (table + 1e-4, table[:4]):
        with pytest.raises(InputError, match="not the one"):
            renamed({"positions": wrong}, rows)


def test_copies_that_differ_cannot_go_back() -> None:
    rows = [entry("embedder", "first", "second", change=Copied(2))]
    folder = {"first.weight": torch.ones(2), "second.weight": torch.ones(2)}
    assert restored(folder, rows).keys() == {"embedder.weight"}
    with pytest.raises(InputError, match="copies of one tensor differ"):
        restored(folder | {"second.weight": torch.zeros(2)}, rows)


def test_modules_parameters_and_strangers() -> None:
    """A module's tensors follow it, parameters are named in full, and strangers keep their name one way only."""
    rows = [entry("conv", "conv_in"), entry("scale", "norm.weight"), *nested("mlp", "ff", {"0": "up", "2": "down"})]
    original = {f"{name}.{leaf}": torch.randn(2) for name in ("conv", "mlp.0", "mlp.2") for leaf in ("weight", "bias")}
    original["scale"] = torch.randn(2)
    folder = renamed(original, rows)
    assert folder.keys() == {
        *(f"{name}.{leaf}" for name in ("conv_in", "ff.up", "ff.down") for leaf in ("weight", "bias")),
        "norm.weight",
    }
    assert restored(folder, rows).keys() == original.keys()
    assert "ema.decay" in renamed({"ema.decay": torch.ones(())}, rows)
    with pytest.raises(InputError, match=r"no place for ema\.decay"):
        restored({"ema.decay": torch.ones(())}, rows)


def test_missing_part_is_named() -> None:
    rows = [entry("qkv", "to_q", "to_k", "to_v", change=Fused((1, 1, 1)))]
    with pytest.raises(InputError, match=r"to_k\.bias is missing"):
        restored({"to_q.bias": torch.ones(2), "to_v.bias": torch.ones(2)}, rows)
