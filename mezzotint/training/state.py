"""Checkpoints: everything a stopped run needs to go on bit for bit, each folder whole or absent."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint import files
from mezzotint.checkpoints import read_json, read_tensors, write_tensors
from mezzotint.errors import InputError
from mezzotint.training.parallel import divided, own

STATE = "state.json"
NAME = re.compile(r"step-(\d{8})")


def trained(network: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a network: the parameters that train, each once, and buffers if all of them do."""
    parameters = dict(network.named_parameters())
    found: dict[str, Tensor] = {name: p for name, p in parameters.items() if p.requires_grad}
    if len(found) == len(parameters):
        stored = network.state_dict(keep_vars=True).keys()  # not those which the network can compute
        found |= {name: buffer for name, buffer in network.named_buffers() if name in stored}
    return found


def same(network: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names in another network of the kind, such as an average."""
    tensors: dict[str, Tensor] = dict(network.named_parameters())
    tensors |= dict(network.named_buffers())
    return {name: tensors[name] for name in names}


def moments(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an optimiser of these parameters, as "parameter.entry"."""
    states = optimiser.state
    return {f"{name}.{key}": value for name, p in tensors.items() if p in states for key, value in states[p].items()}


def save(
    folder: Path, step: int, content: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], keep: int
) -> Path:
    """Write folder/step-NNNNNNNN after `step` finished steps, then remove all but the `keep` newest.

    `content` names the files and their tensors. The folder is filled beside its place, flushed, and renamed: a kill at
    any moment leaves the older ones untouched. InputError on a full disk says which checkpoint is still good.
    """
    place = folder / f"step-{step:08d}"
    if place.exists():
        return place
    fresh: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=folder))
        os.chmod(fresh, 0o755)
        for name, tensors in content.items():
            write_tensors(fresh / f"{name}.safetensors", tensors)
        digests = {path.name: files.sha256_file(path) for path in sorted(fresh.glob("*.safetensors"))}
        files.write_json(fresh / STATE, {"step": step, "files": digests, **facts})
        _flush(fresh)
        os.rename(fresh, place)
        _flush(folder)
    except (OSError, InputError) as error:
        good = newest(folder)
        left = f"The checkpoint {good} is complete" if good else "No checkpoint was complete before"
        raise InputError(
            f"cannot write the checkpoint {place}: {error}\n{left}; free space, then go on with --resume."
        ) from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def newest(folder: Path) -> Path | None:
    """The last checkpoint of a run, if it has one."""
    found = complete(folder)
    return found[-1] if found else None


def sweep(folder: Path) -> None:
    """Remove what a kill left half-written."""
    for path in Path(folder).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def facts(checkpoint: Path) -> dict[str, Any]:
    """What `save` was told, with "step"; InputError where a file of the checkpoint is damaged."""
    content = read_json(checkpoint / STATE)
    for name, digest in content["files"].items():
        path = checkpoint / name
        if not path.is_file() or files.sha256_file(path) != digest:
            raise InputError(f"{path} is damaged. Delete {checkpoint} and go on from the checkpoint before it.")
    return content


@torch.no_grad()
def restore(checkpoint: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's tensors into these, in place; InputError where it holds others than just these."""
    stored = read_tensors(checkpoint / f"{name}.safetensors")
    _check_names(checkpoint / f"{name}.safetensors", stored.keys() ^ tensors.keys())
    for key, tensor in tensors.items():
        own(tensor).copy_(own(divided(stored[key], tensor)))


def restore_moments(
    checkpoint: Path, name: str, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put a file's moments into the optimiser of these parameters."""
    path = checkpoint / f"{name}.safetensors"
    for key, value in read_tensors(path).items():
        parameter, _, entry = key.rpartition(".")
        _check_names(path, {parameter} - tensors.keys())
        p = tensors[parameter]
        value = divided(value, p) if value.shape == p.shape else value.to(p.device)
        optimiser.state[p][entry] = value.clone()  # not the file's pages


def _check_names(path: Path, strange: Set[str]) -> None:
    if strange:
        raise InputError(
            f"{path} does not hold what this recipe trains: {min(strange)} is in one of them only"
            f" ({len(strange)} such names). Go on with the version that made it, or start another run."
        )


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
