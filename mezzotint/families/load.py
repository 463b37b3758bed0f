"""From a path to a model: look at what is there, name the family, put the parts together."""

from __future__ import annotations

from pathlib import Path

import torch

from mezzotint.checkpoints import open_tensors, read_json
from mezzotint.contract import FILE
from mezzotint.errors import InputError
from mezzotint.families import native
from mezzotint.families.assemble import assemble
from mezzotint.families.family import Asked, Family
from mezzotint.families.materials import INDEX, Materials, read_folder, read_original, shapes_of
from mezzotint.families.model import Model
from mezzotint.families.parts import CONTROLS
from mezzotint.families.registry import FAMILIES
from mezzotint.process import Prediction


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    *,
    prediction: Prediction | str | None = None,
    distilled: bool | None = None,
    parts: str | Path | None = None,
    offload: bool = False,
) -> Model:
    """Open a checkpoint, check every part against its contract, and return it ready to generate.

    A folder of Mezzotint or of diffusers, or an original single file. `prediction` answers what a file cannot say
    (Stable Diffusion 2: epsilon or velocity), and so does `distilled` (FLUX.2 klein); `parts` is a folder with what a
    single file lacks (tokenizer, vae, text_encoder). `offload` keeps every part on the CPU but for the time that it
    works on `device`; on the CPU itself, parts that are mapped from files give their memory back between uses. `force`
    lets mismatches pass and writes them into the model's lineage. InputError says what was found instead.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such checkpoint: {path}")
    if is_native(path):
        return native.load(path, device, dtype, force, offload)
    asked = Asked(prediction=None if prediction is None else named(prediction), distilled=distilled)
    family, materials = gather(path, Path(parts) if parts else None)
    return assemble(family, materials, asked, device, dtype, force, offload)


def is_native(path: Path) -> bool:
    """Whether a path is a folder that Mezzotint's training wrote."""
    if (path / FILE).is_file() and not (path / "config.json").is_file():  # a control network has both
        return True
    return (path / INDEX).is_file() and read_json(path / INDEX).get("_class_name") == native.MARK


def gather(path: Path, parts: Path | None = None) -> tuple[Family, Materials]:
    """The family of a published checkpoint and its parts; nothing is built yet."""
    if path.is_file():
        tensors = open_tensors(path)
        shapes = shapes_of(tensors)
        for family in FAMILIES.values():
            if family.original and family.original.fits(shapes):
                return family, read_original(path, tensors, family.original, parts)
        raise InputError(f"{path} is {lone_part(shapes)}. Single files known here: {titles(True)}.")
    materials = read_folder(path)
    for family in FAMILIES.values():
        if family.fits(materials):
            return family, materials
    raise InputError(f"{path} is {described(materials)}. Folders known here: {titles(False)}.")


def titles(single: bool) -> str:
    return ", ".join(family.title for family in FAMILIES.values() if family.original or not single)


def described(materials: Materials) -> str:
    """What a folder holds that no family claims, in words."""
    name = materials.index.get("_class_name")
    if name:
        return f"a folder of {name}, which is no family known here"
    kinds = {part.kind for part in materials.parts.values()}
    if kinds and kinds <= CONTROLS.keys():
        return "a control network: give it with --control, to a model"
    if materials.parts:
        found = ", ".join(
            f"{part} ({material.kind or 'of unknown class'})" for part, material in materials.parts.items()
        )
        return f"a folder with parts of a model alone: {found}"
    return "a folder without a model"


def lone_part(shapes: dict[str, tuple[int, ...]]) -> str:
    """What a single file holds that no family claims, in words."""
    for marks, what in (
        (("lora_", ".lora"), "a LoRA: give it with --lora, to a model"),
        (("control_model.", "controlnet_", "input_hint_block"), "a ControlNet: give it with --control, to a model"),
        (("string_to_param", "emb_params"), "a textual-inversion embedding: give it with --embedding, to a model"),
    ):
        if any(mark in name for name in shapes for mark in marks):
            return what
    first = next(iter(shapes), "nothing")
    return f"a file of {len(shapes)} tensors ({first} first) that fit no family"


def named(prediction: Prediction | str) -> Prediction:
    """A prediction by its name; InputError lists the valid ones."""
    try:
        return Prediction(prediction)
    except ValueError as error:
        raise InputError(f"no prediction '{prediction}': one of {', '.join(Prediction)}") from error
