"""`mezzotint inspect`: what a file or a model folder says about itself, without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import tyro

from mezzotint import images
from mezzotint.cli import console
from mezzotint.errors import InputError

WEIGHTS = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class Options:
    """Say what a checkpoint is: family, parts and parameters, process, latent and text space, guidance, licence.

    Reads a model folder of Mezzotint or diffusers, a single original file, a LoRA, a control network, words of textual
    inversion, or an image that Mezzotint made. Headers and settings alone are read, so a file of 30 GB takes no longer
    than a small one. What the files leave open is said, never guessed.

    For example:

        mezzotint inspect models/solar-cells
        mezzotint inspect v2-1_768-ema-pruned.safetensors
        mezzotint inspect out/cracks/0000_seed0.png --json
    """

    path: tyro.conf.Positional[Path]
    """A model folder, a weights file or an image."""
    parts: Path | None = None
    """A folder with what a single file lacks: vae, text_encoder, tokenizer."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    """Print what is known about the path."""
    found = examine(options.path, options.parts)
    if options.json:
        console.print_json(found)
    else:
        print(console.facts(found))
    return 0


def examine(path: Path, parts: Path | None = None) -> dict[str, Any]:
    """The facts about a model, an addition to one, a safetensors file or an image, as plain data."""
    if path.is_dir():
        return folder_facts(path)
    if not path.is_file():
        raise InputError(f"no such file or folder: {path}")
    if path.suffix.lower() in WEIGHTS:
        return file_facts(path, parts)
    if path.suffix.lower() in images.SUFFIXES:
        return image_facts(path)
    raise InputError(f"{path} is no model folder, weights file or image. Give one of these.")


def folder_facts(folder: Path) -> dict[str, Any]:
    """A model of ours, a published one, an addition to a model, or parts that nothing is known about."""
    from mezzotint.families import facts
    from mezzotint.families.load import is_native

    if is_native(folder):
        return model_facts(folder)
    if found := facts.addition(folder):
        return {"path": str(folder), **found}
    try:
        return {"path": str(folder), "kind": "model folder", **facts.published(folder)}
    except InputError as error:
        if not part_facts(folder):
            raise
        return {**model_facts(folder), "not_a_known_model": str(error)}


def file_facts(path: Path, parts: Path | None) -> dict[str, Any]:
    """A published model in one file, an addition to a model, or tensors that nothing is known about."""
    from mezzotint.families import facts

    plain = path.suffix == ".safetensors"
    entries = {"metadata": metadata_of(path)} if plain else {}
    if found := facts.addition(path):
        return {"path": str(path), **found, **entries}
    try:
        return {"path": str(path), "kind": "model file", **facts.published(path, parts), **entries}
    except InputError as error:
        if not plain:
            raise
        found = {"path": str(path), "kind": "safetensors file", **tensor_facts([path])}
        return {**found, "not_a_known_model": str(error)}


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
    from mezzotint.checkpoints import read_shapes

    stored = [found for path in paths for found in read_shapes(path).values()]
    return {
        "parameters": sum(prod(shape) for shape, _ in stored),
        "tensors": len(stored),
        "dtype": sorted({str(dtype).removeprefix("torch.") for _, dtype in stored}),
        "bytes": sum(path.stat().st_size for path in paths),
        "metadata": {name: text for path in paths for name, text in metadata_of(path).items()},
    }


def metadata_of(path: Path) -> dict[str, str]:
    """The text entries of a header, long ones cut."""
    from mezzotint.checkpoints import read_metadata

    entries = {name: text for name, text in read_metadata(path).items() if name != "format"}
    return {name: text if len(text) <= 200 else f"{text[:200]}..." for name, text in entries.items()}


def image_facts(path: Path) -> dict[str, Any]:
    """Size of an image, and the record beside it where there is one."""
    from mezzotint.checkpoints import read_json

    image = images.read(path)
    record = path.with_suffix(".json")
    found: dict[str, Any] = {"path": str(path), "kind": "image", "size": list(image.size), "mode": image.mode}
    return found | {"record": read_json(record) if record.is_file() else "none beside it"}
