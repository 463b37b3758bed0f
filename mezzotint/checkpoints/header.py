"""The header of a safetensors file, believed only after every number in it was checked against the file.

A safetensors file is 8 bytes n (little-endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, and the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import InputError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
LONGEST = 16 * 2**20  # bytes of JSON: a hundred thousand tensors, far beyond any published model
AXES = 64  # more than torch has

# How files begin that come in the place of weights, and what to do about each.
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves: run git lfs pull in its folder"),
    (b"<", "an HTML or XML page, probably an error message: download the file again"),
    (b"PK\x03\x04", "a PyTorch pickle (zip): if you trust where it came from, give it the ending .ckpt or .bin"),
    (b"\x80\x02", "a Python pickle: if you trust where it came from, give it the ending .ckpt or .bin"),
    (b"\x80\x03", "a Python pickle, not written by PyTorch: get the safetensors file of this model"),
    (b"\x80\x04", "a Python pickle, not written by PyTorch: get the safetensors file of this model"),
    (b"\x80\x05", "a Python pickle, not written by PyTorch: get the safetensors file of this model"),
    (b"GGUF", "a GGUF file: get the safetensors file of this model"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"{", "a JSON text: give the weights file that it belongs to"),
)

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: the shape and dtype of every tensor, and free text entries."""

    shapes: Shapes
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file; InputError unless it describes exactly the bytes that follow it."""
    path = Path(path)
    start, size = read_start(path)
    length = int.from_bytes(start[:8], "little")
    try:
        if size < 8 or length > size - 8:
            told = foreign(start) or f"its header claims {length} bytes and the file has {size}"
            raise ValueError(told if size else "it is empty (0 bytes), the download broke off")
        if length > LONGEST:
            raise ValueError(f"its header claims {length} bytes, more than the {LONGEST} that any model needs")
        with open(path, "rb") as file:
            file.seek(8)
            text = file.read(length)
        content: object = _parsed(text, start)
        if not isinstance(content, dict):
            raise ValueError("its header is no table of tensors")
        metadata: Any = content.pop("__metadata__", {})  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is no table of texts")
        return Header(_shapes(content, size - 8 - length), dict(metadata))
    except RecursionError as error:
        raise _refusal(path, "its header is nested too deeply") from error
    except ValueError as error:  # JSON and UTF-8 errors are of this kind
        raise _refusal(path, str(error)) from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_start(path: Path) -> tuple[bytes, int]:
    """The first 64 bytes of a regular file and its size; InputError for anything that is not a readable file."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a weights file: give the file in it")
        if path.exists() and not path.is_file():  # a pipe would wait for ever, a device never end
            raise InputError(f"{path} is a pipe or a device, not a weights file")
        with open(path, "rb") as file:
            return file.read(64), path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def foreign(start: bytes) -> str | None:
    """What a file is that begins so, in words, where it is a known kind that holds no weights in this format."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((f"it is {saying}" for magic, saying in FOREIGN if text.startswith(magic)), None)


def unreadable(path: Path, error: OSError) -> InputError:
    """The user's message for a file that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"no such weights file: {path}")
    return InputError(f"cannot read {path}: {error.strerror or error}. Check its permissions and its disk.")


def _refusal(path: Path, why: str) -> InputError:
    remedy = "" if ": " in why else ". Copy or download it again."
    return InputError(f"{path} is not an intact safetensors file: {why[:300]}{remedy}")


def _parsed(text: bytes, start: bytes) -> object:
    try:
        return json.loads(text.decode(), object_pairs_hook=_once)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(foreign(start) or f"its header is no JSON ({error})") from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"its header names {twice[:80]!r} twice")
    return table


def _shapes(content: Mapping[str, Any], size: int) -> Shapes:
    """Shape and dtype by name; ValueError unless the tensors tile `size` bytes without gap or overlap."""
    found: Shapes = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in content.items():
        said = f"the tensor {name[:80]!r}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{said} is not described by dtype, shape and data_offsets")
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{said} is of the unknown dtype {str(dtype)[:20]!r}")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > AXES:
            raise ValueError(f"{said} has a shape or place that is no list of whole numbers")
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != expected:
            raise ValueError(f"{said} {str(shape)[:80]} needs {expected:.12g} bytes and has {offsets[1] - offsets[0]}")
        found[name] = (tuple(shape), DTYPES[dtype])
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"the tensor {name[:80]!r} {'overlaps another' if start < end else 'comes after a gap'}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors take {end} bytes and {size} are there")
    return found


def _counts(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
