"""One way to open weights, whatever they are in: safetensors, shards, PyTorch pickles, or a part's folder of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mezzotint.checkpoints.header import Shapes, read_header
from mezzotint.checkpoints.pickles import SUFFIXES, read_pickle
from mezzotint.checkpoints.tensors import SUFFIX, read_json, read_tensors
from mezzotint.errors import InputError

STEMS = ("diffusion_pytorch_model", "model")  # of networks, and of text encoders
VARIANTS = ("fp16", "bf16")  # preferred in this order where the plain weights are missing
INDEX = re.compile(r"\.index(\.\w+)?\.json$")

Found = TypeVar("Found")


def open_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """All tensors at a path by name, on the CPU, mapped from disk where the format allows it.

    `path`: a .safetensors file, a PyTorch pickle, the index of a sharded model, or the folder of a model part. `key`
    chooses among several sets of weights in a pickle ("ema", "model"). InputError for whatever is not intact weights.
    """
    path = find_weights(path)
    if INDEX.search(path.name):
        return _joined(path, lambda shard: open_tensors(shard))
    return read_tensors(path) if path.suffix.lower() == SUFFIX else read_pickle(path, key)


def read_shapes(path: Path, key: str | None = None) -> Shapes:
    """Name -> (shape, dtype) of all tensors at a path, as `open_tensors` would find them, without touching numbers.

    (Pickles from before PyTorch 1.6 cannot be mapped and are read whole.)
    """
    path = find_weights(path)
    if INDEX.search(path.name):
        return _joined(path, lambda shard: read_shapes(shard))
    if path.suffix.lower() == SUFFIX:
        return read_header(path).shapes
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in read_pickle(path, key).items()}


def read_part(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a model part: the file, or the shards, that `stem` names in its folder."""
    return open_tensors(_in_folder(Path(folder), (stem,)) or Path(folder) / f"{stem}{SUFFIX}")


def find_weights(path: Path) -> Path:
    """The weights file or index that a path means; InputError where there is none or the ending is unknown.

    In a folder the first of these: the plain .safetensors file, its index, a variant (fp16, then bf16, then the only
    one), and then the same as .bin.
    """
    path = Path(path)
    if path.is_dir():
        found = _in_folder(path, STEMS)
        if found is None:
            raise InputError(f"{path} has no weights: neither {' nor '.join(stem + SUFFIX for stem in STEMS)} is there")
        return found
    if path.suffix.lower() in (SUFFIX, *SUFFIXES) or INDEX.search(path.name):
        return path
    raise InputError(f"{path} is no weights file by its ending: {', '.join((SUFFIX, *SUFFIXES))} are read")


def _in_folder(folder: Path, stems: tuple[str, ...]) -> Path | None:
    for ending in (SUFFIX, ".bin"):
        for stem in stems:
            stem = "pytorch_model" if ending == ".bin" and stem == "model" else stem
            whole, index = folder / f"{stem}{ending}", folder / f"{stem}{ending}.index.json"
            for place in (whole, index, _variant(folder, stem, ending)):
                if place is not None and place.is_file():
                    return place
    return None


def _variant(folder: Path, stem: str, ending: str) -> Path | None:
    """stem.VARIANT.safetensors or its index; InputError where there are several and none is preferred."""
    shape = re.compile(
        rf"{re.escape(stem)}(\.(?P<a>\w+){re.escape(ending)}(\.index\.json)?|{re.escape(ending)}\.index\.(?P<b>\w+)\.json)"
    )
    found: dict[str, Path] = {}
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := shape.fullmatch(place.name):
            found.setdefault(match["a"] or match["b"], place)
    preferred = [found[name] for name in VARIANTS if name in found]
    if not preferred and len(found) > 1:
        raise InputError(f"{folder} has several variants and no plain {stem}{ending}: name one of {', '.join(found)}")
    return next(iter(preferred or found.values()), None)


def _joined(index: Path, read: Callable[[Path], Mapping[str, Found]]) -> dict[str, Found]:
    """What the shards of an index hold together; InputError unless each holds exactly what the index says."""
    listed: Any = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index} has no weight_map from tensor to file")
    found: dict[str, Found] = {}
    homes: set[tuple[str, str]] = set()
    for shard in sorted(set(listed.values())):
        # links are followed, as the caches of model hubs are made of them; a name that leads elsewhere is a trap
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise InputError(f"{index} points outside its folder: {shard[:80]!r}")
        if Path(shard).suffix not in (SUFFIX, *SUFFIXES):
            raise InputError(f"{index} lists {shard[:80]!r}, which is no weights file by its ending")
        content = read(index.parent / shard)
        homes |= {(name, shard) for name in content}
        found |= content
    if homes != set(listed.items()):
        odd = sorted({name for name, _ in homes ^ set(listed.items())})
        raise InputError(f"{index} and its shards disagree on {len(odd)} tensors, {odd[0]} first")
    return found
