"""Checkpoints: everything a stopped run needs to go on bit for bit, each folder whole or absent."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint import files
from mezzotint.checkpoints import read_json, read_tensors, write_tensors
from mezzotint.errors import InputError

STATE = "state.json"
NAME = re.compile(r"step-(\d{8})")


def save(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, torch.optim.Optimizer],
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write folder/step-NNNNNNNN after `step` finished steps, then remove all but the `keep` newest.

    The folder is filled beside its place, flushed, and renamed: a kill at any moment leaves the older ones untouched.
    InputError on a full disk says which checkpoint is still good.
    """
    place = folder / f"step-{step:08d}"
    if place.exists():
        return place
    fresh: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=folder))
        os.chmod(fresh, 0o755)
        for name, module in modules.items():
            write_tensors(fresh / f"{name}.safetensors", module.state_dict())
        for name, optimiser in optimisers.items():
            write_tensors(fresh / f"{name}.optimiser.safetensors", _flat(optimiser))
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


def restore(
    checkpoint: Path, modules: Mapping[str, nn.Module], optimisers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """Put a checkpoint's tensors into modules and optimisers, in place."""
    for name, module in modules.items():
        module.load_state_dict(read_tensors(checkpoint / f"{name}.safetensors"), strict=True)
    for name, optimiser in optimisers.items():
        flat = read_tensors(checkpoint / f"{name}.optimiser.safetensors")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in flat.items():
            index, _, entry = key.partition(".")
            state.setdefault(int(index), {})[entry] = value.clone()
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _flat(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{index}.{key}": value for index, entries in state.items() for key, value in entries.items()}


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
