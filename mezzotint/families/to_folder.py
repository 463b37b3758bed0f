"""Parts to a model folder in the published layout."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mezzotint.checkpoints import read_json, write_folder, write_sharded
from mezzotint.errors import InputError
from mezzotint.families.converted import Converted, Counted, Watch, free, grouped
from mezzotint.families.family import Asked, Family
from mezzotint.families.materials import INDEX, SCHEDULER, Material, Materials
from mezzotint.families.read_back import differences, flat
from mezzotint.families.registry import FAMILIES
from mezzotint.families.scheduler import scheduler_config
from mezzotint.files import write_json
from mezzotint.text.vocabulary import clip_vocabulary

TEXT_STEM = "model"  # of a text encoder's files, and of all other networks'
STEM = "diffusion_pytorch_model"
CLIP_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
LIBRARIES = {"bert": "latent_diffusion", "text_encoder": "transformers"}  # in a model_index.json; others are diffusers


def to_folder(family: Family, materials: Materials, target: Path, asked: Asked, force: bool, watch: Watch) -> Converted:
    """A model folder that diffusers and Mezzotint open."""
    pipeline = family.pipeline(materials)
    if not pipeline:
        raise InputError(f"the folder layout has no pipeline for {family.title}: it stays a single file")
    free(target, force)
    facts = family.facts(materials, asked)
    learned = facts.get("variance") == "learned"
    scheduler = dict(materials.scheduler or scheduler_config(facts["process"], facts["sampling"], learned))
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1", **family.index}
    index |= {key: value for key, value in materials.index.items() if not key.startswith("_") and plain(value)}
    if pipeline == "Flux2KleinPipeline":
        index["is_distilled"] = facts["guidance"].distilled
    parts = {
        part: replace(material, config=settings_of(family, materials, part, facts["size"]))
        for part, material in materials.parts.items()
    }
    again = replace(materials, layout="diffusers", parts=parts, scheduler=scheduler, index=index)
    if family is not next((other for other in FAMILIES.values() if other.fits(again)), None):
        raise InputError(f"{materials.path}: as a folder it would be taken for another model. Keep the single file")
    told = family.facts(again, Asked())
    differences(materials.path, flat(facts["process"].to_dict()), flat(told["process"].to_dict()), "folder")
    count = Counted(watch, sum(size(material) for material in parts.values()))

    def fill(root: Path) -> None:
        for part, material in parts.items():
            name = family.folders.get(part, part)
            texts = part.startswith("text_encoder") or part in ("safety_checker", "image_encoder")
            write_json(root / name / "config.json", material.config)
            write_sharded(root / name, TEXT_STEM if texts else STEM, material.tensors, watch=count.at(name))
            library = LIBRARIES.get(name, LIBRARIES["text_encoder"] if texts else "diffusers")
            index[name] = materials.index.get(name) or [library, material.kind]
        for name, folder in materials.tokenizers.items():
            shutil.copytree(folder, root / name)
            index[name] = materials.index.get(name) or ["transformers", tokenizer_class(folder)]
        for part, name in CLIP_TOKENIZERS.items():
            if name not in materials.tokenizers and materials.kind(part).startswith("CLIP"):
                own_tokenizer(materials.parts[part]).save_pretrained(root / name)
                index[name] = ["transformers", "CLIPTokenizer"]
        write_json(root / "scheduler" / SCHEDULER, scheduler)
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        index.update(absent(pipeline, index))
        write_json(root / INDEX, index)

    write_folder(target, fill)
    return Converted(family.name, "diffusers", (target,), grouped(materials.left_out))


def settings_of(family: Family, materials: Materials, part: str, picture: tuple[int, int]) -> dict[str, Any]:
    """config.json of a part; a backbone whose shapes do not show how large its latents are is told it."""
    config = {key: value for key, value in materials.parts[part].config.items() if key != "_name_or_path"}
    silent = part == "unet" or config.get("_class_name") == "SD3Transformer2DModel"
    if part == family.backbone and silent and (materials.layout == "single-file" or "sample_size" not in config):
        factor = 2 ** (len(materials.config("vae", "block_out_channels", (1,))) - 1)
        width, height = (side // factor for side in picture)
        config["sample_size"] = width if width == height else [height, width]
    return config


def absent(pipeline: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline lists and a folder may lack."""
    names: tuple[str, ...] = ()
    if pipeline.startswith(("StableDiffusionPipeline", "StableDiffusionInpaint", "LatentConsistency")):
        names = ("safety_checker", "feature_extractor", "image_encoder")
    elif pipeline.startswith("StableDiffusionXL"):
        names = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
    elif pipeline.startswith("StableDiffusion3"):
        names = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
    found: dict[str, Any] = {name: [None, None] for name in names if name not in index}
    return found | ({"requires_safety_checker": False} if "safety_checker" in found else {})


def plain(value: Any) -> bool:
    """Settings of an index, not its parts."""
    return isinstance(value, (bool, str, int, float, dict))


def own_tokenizer(material: Material) -> Any:
    """CLIP's tokenizer; OpenCLIP's encoders, told by their activation, were trained with "!" for padding."""
    tokenizer = copy.deepcopy(clip_vocabulary())
    if material.config.get("hidden_act") == "gelu":
        tokenizer.pad_token = "!"
    return tokenizer


def tokenizer_class(folder: Path) -> str:
    """The class that a tokenizer's or a processor's folder names."""
    for file, key in (("processor_config.json", "processor_class"), ("tokenizer_config.json", "tokenizer_class")):
        if (folder / file).is_file() and (stated := read_json(folder / file).get(key)):
            return str(stated)
    return "AutoTokenizer"


def size(material: Material) -> int:
    """Bytes of a part's tensors."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in material.stored().values())
