"""`mezzotint inspect`: what a file or a model folder says about itself, without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import tyro

from mezzotint import images
from mezzotint.cli import console
from mezzotint.errors import InputError


@dataclass(frozen=True)
class Options:
    """Say what a model is: parts and parameters, process, latent and text space, classes, licence, lineage.

    Reads a model folder, a single safetensors file, or an image that Mezzotint made; loads no weights.

    For example:

        mezzotint inspect models/solar-cells
        mezzotint inspect out/cracks/0000_seed0.png --json
    """

    path: tyro.conf.Positional[Path]
    """A model folder, a .safetensors file or an image."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    """Print what is known about the path."""
    found = examine(options.path)
    if options.json:
        console.print_json(found)
    else:
        print(console.facts(found))
    return 0


def examine(path: Path) -> dict[str, Any]:
    """The facts about a model folder, a safetensors file or an image, as plain data."""
    if path.is_dir():
        return model_facts(path)
    if not path.is_file():
        raise InputError(f"no such file or folder: {path}")
    if path.suffix == ".safetensors":
        return {"path": str(path), "kind": "safetensors file", **tensor_facts([path])}
    if path.suffix.lower() in images.SUFFIXES:
        return image_facts(path)
    raise InputError(f"{path} is no model folder, safetensors file or image. Give one of these.")


def model_facts(folder: Path) -> dict[str, Any]:
    """Parts from the folder and its safetensors headers, everything else from its contract."""
    from mezzotint.contract import FILE, read_contract

    parts = part_facts(folder)
    if not parts and not (folder / FILE).is_file():
        raise InputError(f"{folder} is no model folder: it has neither {FILE} nor a part with safetensors weights")
    found: dict[str, Any] = {"path": str(folder), "kind": "model folder", "layout": "diffusers"}
    found["parameters"] = sum(part["parameters"] for part in parts.values())
    found["parts"] = parts
    if not (folder / FILE).is_file():
        return found | {"contract": f"none: nothing here says how it was trained ({FILE} is missing)"}
    contract = read_contract(folder).model_dump(mode="json")
    return {"family": contract.pop("family"), **found, **contract}


def part_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Each subfolder with weights: its class, parameters and number format."""
    from mezzotint.checkpoints import read_json

    parts: dict[str, dict[str, Any]] = {}
    for part in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        weights = sorted(part.glob("*.safetensors"))
        if weights:
            config = read_json(part / "config.json") if (part / "config.json").is_file() else {}
            name = config.get("_class_name") or ", ".join(config.get("architectures", []))
            parts[part.name] = {"class": name, **tensor_facts(weights)}
    return parts


def tensor_facts(paths: list[Path]) -> dict[str, Any]:
    """Number of tensors and parameters, formats and header entries of safetensors files, from their headers alone."""
    headers = [header(path) for path in paths]
    entries: dict[str, str] = {}
    for head in headers:
        entries |= {name: value for name, value in head.pop("__metadata__", {}).items() if name != "format"}
    tensors = [tensor for head in headers for tensor in head.values()]
    return {
        "parameters": sum(prod(tensor["shape"]) for tensor in tensors),
        "tensors": len(tensors),
        "dtype": sorted({tensor["dtype"] for tensor in tensors}),
        "bytes": sum(path.stat().st_size for path in paths),
        "metadata": {name: value if len(value) <= 200 else f"{value[:200]}..." for name, value in entries.items()},
    }


def header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: its length in 8 little-endian bytes, then that many bytes."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(path.stat().st_size - 8, 100_000_000):
            raise InputError(f"{path} is not an intact safetensors file. Copy or download it again.")
        try:
            return json.loads(stream.read(length))
        except ValueError as error:
            raise InputError(
                f"{path} is not an intact safetensors file: {error}. Copy or download it again."
            ) from error


def image_facts(path: Path) -> dict[str, Any]:
    """Size of an image, and the record beside it where there is one."""
    from mezzotint.checkpoints import read_json

    image = images.read(path)
    record = path.with_suffix(".json")
    found: dict[str, Any] = {"path": str(path), "kind": "image", "size": list(image.size), "mode": image.mode}
    return found | {"record": read_json(record) if record.is_file() else "none beside it"}
