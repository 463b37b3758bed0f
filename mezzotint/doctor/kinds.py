"""What a path is, from headers and names alone: a model, an addition to one, a cache, a run of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.adapters import is_adapter
from mezzotint.checkpoints import find_weights, read_metadata, read_shapes
from mezzotint.contract import FILE
from mezzotint.data import cache
from mezzotint.errors import InputError
from mezzotint.families import facts
from mezzotint.families.adapt import LORA, inside
from mezzotint.families.materials import INDEX
from mezzotint.files import read_toml

WEIGHTS = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
RECIPE, METRICS = "recipe.toml", "metrics.jsonl"  # what training leaves in a run folder
WORDS = "textual inversion"


def may_hold_weights(path: Path) -> bool:
    """Whether a path is a folder, or a file with the ending of weights."""
    return path.is_dir() or path.suffix.lower() in WEIGHTS or path.name.endswith(".index.json")


def recipe_of(path: Path) -> dict[str, Any] | None:
    """The recipe of a run of training; None for anything else, such as a set that `synth` made."""
    if not (path / RECIPE).is_file():
        return None
    recipe = read_toml(path / RECIPE)
    return recipe if "method" in recipe else None


def table(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of a recipe; an empty one where it has none."""
    found = recipe.get(name)
    return found if isinstance(found, Mapping) else {}


def placed(name: object, run: Path) -> Path | None:
    """What a recipe names, as seen from here or from above the run folder; None where it is gone."""
    if not isinstance(name, str):
        return None
    return next((root / name for root in (Path(), *run.resolve().parents) if (root / name).exists()), None)


def is_model(path: Path) -> bool:
    """Whether a folder claims to be a whole model; whether it is one, loading says.

    A control network has a contract too, and its network lies beside it.
    """
    return (path / INDEX).is_file() or ((path / FILE).is_file() and not (path / "config.json").is_file())


def is_cache(path: Path) -> bool:
    """Whether a file, or any in a folder, holds latents or text states that training kept."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    kinds = tuple(name.rpartition("-")[0] for name in (cache.LATENTS, cache.TEXT))
    return any(
        file.suffix == ".safetensors" and file.is_file() and read_metadata(file).get("format", "").startswith(kinds)
        for file in files
    )


def addition(path: Path) -> str | None:
    """What is added to a model, in words; None for anything else. A LoRA is known by its keys, however odd the rest."""
    if adapter(path) is not None:
        return "a LoRA"
    found = facts.addition(path)
    if found is None:
        return None
    return WORDS if found["kind"] == WORDS else f"a {found['kind']}"


def adapter(path: Path) -> Path | None:
    """The LoRA that a file or folder is, in any of the layouts that training writes; None where there is none."""
    for place in (path, path / "kohya.safetensors", path / "peft"):
        if not place.exists():
            continue
        try:
            file = find_weights(inside(place, LORA, "LoRA"))
        except InputError:  # a folder without one, or not a file of weights
            continue
        if is_adapter(read_shapes(file)):
            return place
    return None
