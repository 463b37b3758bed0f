"""Calls of operators, and the sizes that their speed depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mezzotint.layers.operators import kind_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """What the cost of an operator's call depends on; equal calls are counted together."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]  # as `shape_of` gives it
    flops: float  # a multiplication and an addition are two
    bytes: float  # read and written, each operand once

    @property
    def backward(self) -> bool:
        """Whether it computes gradients."""
        return "backward" in self.name


def shape_of(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """The sizes that decide how fast a kernel is.

    Convolution: pixels it works on (batch and all), channels in and out, kernel width. Linear: products, rows, inner
    width, columns. Attention: heads over the batch, queries, keys, width of a head. Anything else: numbers written.
    """
    kind = kind_of(name)
    shapes = [tuple(t.shape) for t in inputs]
    if name == "convolution" and len(shapes) > 1:
        pixels = prod((outputs[0].shape[0], *outputs[0].shape[2:]))
        return pixels, shapes[1][1], shapes[1][0], shapes[1][-1]
    if name == "convolution_backward" and len(shapes) > 2:  # gradient, input, weight
        pixels = prod((shapes[0][0], *shapes[0][2:]))
        return pixels, shapes[2][1], shapes[2][0], shapes[2][-1]
    if kind == "attention" and "scaled_dot_product" in name:
        query, key = shapes[int("backward" in name) :][:2]
        return prod(query[:-2]), query[-2], key[-2], query[-1]
    if kind == "linear":
        left, right = ([s for s in shapes if len(s) >= 2][-2:] + [(1, 1), (1, 1)])[:2]
        return prod(left[:-2]), left[-2], left[-1], right[-1]
    return (sum(t.numel() for t in outputs),)
