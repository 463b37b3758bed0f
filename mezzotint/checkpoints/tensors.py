"""Safetensors files: read by memory map, written tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mezzotint.checkpoints.header import DTYPES, read_header
from mezzotint.errors import InputError
from mezzotint.files import write_with

SUFFIX = ".safetensors"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**20  # numbers converted at a time
LARGEST_JSON = 64 * 2**20


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped from disk and not copied; InputError for a truncated, overlapping or foreign file.

    The pages are private to this process: writing into a tensor never changes the file.
    """
    path = Path(path)
    read_header(path)  # says more exactly what is wrong, and what to do, than the library's own reader
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not an intact safetensors file: {error}. Copy or download it again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a file's header, without touching its tensors."""
    return read_header(path).metadata


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    watch: Callable[[int], object] = lambda written: None,
) -> Path:
    """Write tensors atomically; floating ones are stored as `dtype` where it is given.

    Tensors go to disk piece by piece: no second copy of the model is held, whatever its dtype, layout or device.
    `watch` is told the bytes of every piece.
    """
    kinds = {name: stored_dtype(tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # so that all lie aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        header[name] = {
            "dtype": NAMES[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                _write_numbers(file, tensors[name].detach(), kinds[name], watch)

    return write_with(path, write)


def stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor gets in a file: `dtype` is for floating numbers only."""
    return dtype if dtype and tensor.is_floating_point() else tensor.dtype


def pieces(tensor: Tensor, numbers: int = PIECE) -> Iterator[Tensor]:
    """A tensor's numbers in their order as flat pieces: views where it is contiguous, else one copy of a row each."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(numbers) if tensor.numel() else ()
    elif tensor.ndim == 1:
        yield from (piece.contiguous() for piece in tensor.split(numbers))
    else:
        rows = max(1, numbers * len(tensor) // max(1, tensor.numel()))
        yield from (piece.reshape(-1) for piece in tensor.split(rows))


def _write_numbers(file: BinaryIO, tensor: Tensor, dtype: torch.dtype, watch: Callable[[int], object]) -> None:
    for piece in pieces(tensor):
        watch(file.write(piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError where it is missing, broken, absurdly long or something else."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not readable JSON: it is no file")
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise InputError(f"{path} is not readable JSON: {size} bytes are more than any configuration has")
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
