"""Tables of tensors in safetensors files: written batch by batch, read where they lie, so neither needs them whole."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mezzotint import files
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}


def write(path: Path, count: int, header: Mapping[str, str], batches: Iterable[Mapping[str, Tensor]]) -> Path:
    """Write `count` rows that come in batches {name: (B, ...)}; no more than one batch is ever held.

    What does not fit on the disk is said with the first batch, not after the last one (InputError); a run that stops on
    the way leaves nothing behind.
    """

    def fill(temporary: Path) -> None:
        with open(temporary, "r+b") as stream:
            places: dict[str, int] = {}
            kinds: dict[str, object] = {}
            written = 0
            for batch in batches:
                found: dict[str, object] = {name: (rows.shape[1:], rows.dtype) for name, rows in batch.items()}
                if not places:
                    kinds, places = found, _begin(stream, path, count, header, batch)
                if found != kinds:
                    raise ValueError(f"rows {written} on are {found}, those before are {kinds}")
                for name, rows in batch.items():
                    _append(stream, places, name, rows)
                written += len(next(iter(batch.values())))
            if written != count:
                raise ValueError(f"{written} rows came for {path}, not {count}")

    return files.write_with(path, fill)


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a table; the tensors are the file itself, mapped: only rows that are taken are read.

    InputError where the file is cut short or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            return dict(stored.metadata() or {}), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"the cache {path} is damaged ({error}); delete it, it is computed again.") from error


def _begin(
    stream: BinaryIO, path: Path, count: int, header: Mapping[str, str], first: Mapping[str, Tensor]
) -> dict[str, int]:
    """Write the header; returns where in the file each tensor's next row goes."""
    offset, entries, places = 0, {}, {}
    for name, rows in sorted(first.items(), key=lambda item: (-item[1].element_size(), item[0])):  # aligned
        shape = [count, *rows.shape[1:]]
        size = math.prod(shape) * rows.element_size()
        kind = DTYPES[str(rows.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        places[name] = offset
        offset += size
    free = shutil.disk_usage(path.parent).free
    if offset > free:
        raise OSError(errno.ENOSPC, f"it takes {offset / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    text = json.dumps({"__metadata__": dict(header), **entries}).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + place for name, place in places.items()}


def _append(stream: BinaryIO, places: dict[str, int], name: str, rows: Tensor) -> None:
    import torch

    data = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    stream.seek(places[name])
    stream.write(data.data)
    places[name] += data.nbytes
