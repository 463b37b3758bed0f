"""Large weights in several files with an index, as the published folders have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.checkpoints.tensors import SUFFIX, stored_dtype, write_tensors
from mezzotint.files import write_json

LIMIT = 5 * 10**9  # bytes in a file


def write_sharded(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    limit: int = LIMIT,
    dtype: torch.dtype | None = None,
    watch: Callable[[int], object] = lambda written: None,
) -> list[Path]:
    """Write `stem`.safetensors, or files of at most `limit` bytes and their `stem`.safetensors.index.json.

    Tensors keep their order; one that is larger than `limit` has a file of its own. Older weights of that stem in the
    folder are removed once the new ones are there. Floating tensors are stored as `dtype` where it is given.
    `watch` is told the bytes of every piece as it is written.
    """
    folder = Path(folder)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * stored_dtype(tensor, dtype).itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + bytes_, total + bytes_
    index = folder / f"{stem}{SUFFIX}.index.json"
    if len(shards) == 1:
        written = [write_tensors(folder / f"{stem}{SUFFIX}", tensors, dtype=dtype, watch=watch)]
    else:
        names = [f"{stem}-{at:05d}-of-{len(shards):05d}{SUFFIX}" for at in range(1, len(shards) + 1)]
        each = zip(names, shards, strict=True)
        written = [write_tensors(folder / name, shard, dtype=dtype, watch=watch) for name, shard in each]
        homes = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        written.append(write_json(index, {"metadata": {"total_size": total}, "weight_map": homes}))
    ours = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(SUFFIX)}(\.index\.json)?")
    for place in folder.iterdir():
        if ours.fullmatch(place.name) and place not in written:
            place.unlink()
    return written
