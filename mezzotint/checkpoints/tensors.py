"""Safetensors files: read by memory map, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.files import write_with

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped from disk and not copied; InputError for a truncated, overlapping or foreign file.

    The pages are private to this process: writing into a tensor never changes the file.
    """
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise InputError(f"no such weights file: {path}") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not an intact safetensors file: {error}. Copy or download it again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a file's header, without touching its tensors."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise InputError(f"no such weights file: {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not an intact safetensors file: {error}. Copy or download it again.") from error


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write tensors atomically; floating ones are stored as `dtype` where it is given."""

    def fit(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()

    content = {name: fit(tensor) for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(content, temporary, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error

    return write_with(path, write)


def read_part(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a model part: `stem`.safetensors, or the shards that `stem`.safetensors.index.json lists."""
    folder = Path(folder)
    whole, index = folder / f"{stem}{SUFFIX}", folder / f"{stem}{INDEX}"
    if whole.is_file() or not index.is_file():
        return read_tensors(whole)
    listed: Any = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index} has no weight_map from tensor to file")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(listed.values())):
        if Path(shard).name != shard:
            raise InputError(f"{index} points outside its folder: {shard!r}")
        tensors |= read_tensors(folder / shard)
    if tensors.keys() != listed.keys():
        odd = sorted(tensors.keys() ^ listed.keys())
        raise InputError(f"{index} and its shards disagree on {len(odd)} tensors, {odd[0]} first")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError where it is missing, broken or something else."""
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
