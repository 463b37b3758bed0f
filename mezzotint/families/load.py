"""From a path to a model: look at what is there, then read it."""

from __future__ import annotations

from pathlib import Path

import torch

from mezzotint.checkpoints import read_json
from mezzotint.contract import FILE
from mezzotint.errors import InputError
from mezzotint.families import native
from mezzotint.families.model import Model

SUPPORTED = f"a model folder with {native.INDEX} and {FILE}, as Mezzotint's training writes it"


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, force: bool = False
) -> Model:
    """Open a checkpoint, check every part against its contract, and return it ready to generate.

    `force` lets mismatches pass and writes them into the model's lineage. InputError says what was found instead.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such checkpoint: {path}")
    found = describe(path)
    if found != native.MARK:
        raise InputError(f"{path} is {found}, which is not supported. Supported: {SUPPORTED}.")
    return native.load(path, device, dtype, force)


def describe(path: Path) -> str:
    """What a path holds, in words; native.MARK where it is ours."""
    if path.is_file():
        kinds = {".safetensors": "a single weights file", ".gguf": "a quantised weights file"}
        pickles = dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), "a pickle file")
        return (kinds | pickles).get(path.suffix.lower(), "not a checkpoint")
    if (path / FILE).is_file():
        return native.MARK
    if (path / native.INDEX).is_file():
        name = read_json(path / native.INDEX).get("_class_name")
        return native.MARK if name == native.MARK else f"a diffusers folder of {name}"
    if (path / "config.json").is_file():
        return f"one part of a model ({read_json(path / 'config.json').get('_class_name', 'of unknown class')})"
    return "a folder without a model"
