"""From one layout to the other: tensors are renamed, never computed with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mezzotint.checkpoints import read_json, write_folder, write_sharded, write_tensors
from mezzotint.checkpoints.keymap import restored
from mezzotint.errors import InputError
from mezzotint.families.family import Asked, Family
from mezzotint.families.load import gather, is_native
from mezzotint.families.materials import INDEX, SCHEDULER, Layout, Material, Materials, Section, shapes_of
from mezzotint.families.parts import AUTOENCODERS, BACKBONES
from mezzotint.families.scheduler import scheduler_config
from mezzotint.files import write_json
from mezzotint.text.vocabulary import clip_vocabulary

# Settings that say nothing about what a network computes.
SILENT = ("sample_size", "dropout", "force_upcast", "upcast_attention")
TEXT_STEM, STEM = "model", "diffusion_pytorch_model"
CLIP_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and what of the source the other layout has no place for."""

    family: str
    files: tuple[Path, ...]
    left_out: tuple[str, ...]


def convert(
    source: str | Path, target: str | Path, layout: Layout, asked: Asked | None = None, parts: str | Path | None = None
) -> Converted:
    """Rewrite a checkpoint in the other layout; the numbers stay what they are, to the bit.

    InputError where the target layout cannot hold what the source says.
    """
    source, target, asked = Path(source), Path(target), asked or Asked()
    if not source.exists():
        raise InputError(f"no such checkpoint: {source}")
    if is_native(source):
        raise InputError(f"{source} is a model of Mezzotint's own, which has one layout alone")
    family, materials = gather(source, Path(parts) if parts else None)
    question = family.asks(materials)
    if question and asked == Asked():
        raise InputError(f"{source}: {question}")
    if layout == "diffusers":
        return to_folder(family, materials, target, asked)
    return to_single_file(family, materials, target, asked)


def to_folder(family: Family, materials: Materials, target: Path, asked: Asked) -> Converted:
    """A model folder that diffusers and Mezzotint open."""
    pipeline = family.pipeline(materials)
    if not pipeline:
        raise InputError(f"the folder layout has no pipeline for {family.title}: it stays a single file")
    facts = family.facts(materials, asked)
    scheduler = dict(materials.scheduler or scheduler_config(facts["process"], facts["sampling"]))
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1", **family.index}
    index |= {key: value for key, value in materials.index.items() if not key.startswith("_") and plain(value)}
    if facts["guidance"].distilled and not facts["guidance"].embedded:
        index["is_distilled"] = True

    def fill(root: Path) -> None:
        for part, material in materials.parts.items():
            name = family.folders.get(part, part)
            library = "transformers" if part.startswith("text_encoder") and name == part else "diffusers"
            write_json(root / name / "config.json", dict(material.config))
            stem = TEXT_STEM if library == "transformers" else STEM
            write_sharded(root / name, stem, material.tensors)
            index[name] = materials.index.get(name) or [library, material.kind]
        for name, folder in materials.tokenizers.items():
            shutil.copytree(folder, root / name)
            index[name] = materials.index.get(name) or ["transformers", tokenizer_class(folder)]
        for part, name in CLIP_TOKENIZERS.items():
            if name not in materials.tokenizers and materials.kind(part).startswith("CLIP"):
                clip_vocabulary().save_pretrained(root / name)
                index[name] = ["transformers", "CLIPTokenizer"]
        write_json(root / "scheduler" / SCHEDULER, scheduler)
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        if pipeline.startswith("StableDiffusion") and "XL" not in pipeline and "3" not in pipeline:
            index.update(safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)
        write_json(root / INDEX, index)

    write_folder(target, fill)
    return Converted(family.name, (target,), tuple(materials.left_out))


def plain(value: Any) -> bool:
    """Settings of an index, not its parts."""
    return isinstance(value, (bool, str, int, float, dict))


def tokenizer_class(folder: Path) -> str:
    stated = folder / "tokenizer_config.json"
    return str(read_json(stated).get("tokenizer_class", "AutoTokenizer")) if stated.is_file() else "AutoTokenizer"


def to_single_file(family: Family, materials: Materials, target: Path, asked: Asked) -> Converted:
    """The original layout: one file, and one beside it for a part that was always published apart."""
    if family.original is None:
        raise InputError(f"{family.title} has no single-file layout")
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: the single file must end in .safetensors")
    facts = family.facts(materials, asked)
    sections = family.original.sections({}, {})
    content: dict[str, Tensor] = {}
    apart: dict[Path, dict[str, Tensor]] = {}
    left_out: list[str] = [*materials.tokenizers, *(["scheduler"] if materials.scheduler else [])]
    for part, material in materials.parts.items():
        if part in sections:
            section = sections[part]
            content |= {section.prefix + name: tensor for name, tensor in original(section, material).items()}
        elif part in family.original.companions:
            files, section = family.original.companions[part]
            apart[target.parent / files[0]] = original(section, material)
        else:
            left_out.append(part)
    process = facts["process"]
    words = {"modelspec.prediction_type": process.prediction.value, "modelspec.architecture": family.name}
    if facts["guidance"].distilled:
        words["mezzotint.distilled"] = "yes"
    for file, tensors in apart.items():
        write_tensors(file, tensors)
    write_tensors(target, content, words)
    return Converted(family.name, (target, *apart), tuple(left_out))


def original(section: Section, material: Material) -> dict[str, Tensor]:
    """A part under its original names; InputError where names and shapes would be read back as another network."""
    tensors = restored(material.tensors, section.rows(material.config)) if section.rows else material.tensors
    known = BACKBONES | AUTOENCODERS
    if material.kind in known:
        config = known[material.kind].config
        before, after = (config.from_config(data) for data in (material.config, section.infer(shapes_of(tensors))))
        for name in (f.name for f in fields(config) if f.name not in SILENT):
            if getattr(before, name) != getattr(after, name):
                raise InputError(
                    f"{material.at}: the single-file layout cannot say {name} = {getattr(before, name)!r}, it would be "
                    f"read back as {getattr(after, name)!r}: keep the folder"
                )
    return tensors
