"""Number formats of weights: what each keeps of a matrix, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mezzotint.errors import InputError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantised:
    """Matrices stored narrower than they are computed in: `bits` a number, and scales beside them."""

    bits: float
    scale: int  # bytes of a scale
    group: int | None  # numbers that share one; None: a row of the matrix

    def bytes(self, rows: int, columns: int) -> float:
        """Of one matrix (rows, columns)."""
        scales = rows if self.group is None else rows * columns / self.group
        return rows * columns * self.bits / 8 + scales * self.scale


QUANTS: Mapping[str, Quantised] = {
    "int8": Quantised(8, 4, None),  # a float32 scale a row (LLM.int8, Dettmers et al. 2022, without its outliers)
    "fp8": Quantised(8, 4, None),  # e4m3 with a float32 scale a row
    "int4": Quantised(4, 2, 64),  # a float16 scale for 64 numbers
    "nf4": Quantised(4, 2, 64),  # 4-bit normal floats in blocks of 64 (QLoRA, Dettmers et al. 2023), scales in half
}


def dtype_of(name: str) -> torch.dtype:
    """A number format by its name; InputError lists the valid ones."""
    if name not in DTYPES:
        raise InputError(f"no number format '{name}': one of {', '.join(DTYPES)}")
    return DTYPES[name]


def weights(network: nn.Module, dtype: torch.dtype, quant: str | None = None) -> int:
    """Bytes of a network's parameters and tables in `dtype`, its linear layers quantised where `quant` names a way.

    Convolutions, norms, embeddings and biases keep `dtype`, as the libraries that quantise leave them.
    """
    if quant is not None and quant not in QUANTS:
        raise InputError(f"no quantisation '{quant}': one of {', '.join(QUANTS)}")
    matrices = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)} if quant else set[int]()
    total = 0.0
    for tensor in {id(t): t for t in (*network.parameters(), *network.buffers())}.values():
        if quant and id(tensor) in matrices:
            total += QUANTS[quant].bytes(tensor.shape[0], tensor.shape[1])
        else:
            total += tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
    return round(total)


def largest(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest linear layer in `dtype`: one at a time is there in full while quantised weights compute."""
    sizes = (m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    return max(sizes, default=0) * dtype.itemsize
