"""From one layout to the other: tensors are renamed, never computed with.

What a single file cannot say in names and shapes goes into its header, or into config.json and scheduler_config.json
beside it where its family reads them; what it can say nowhere is refused. Before a single file is written it is read
back on the meta device and compared, setting by setting, with what it was made from.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.checkpoints import open_tensors, read_json, write_folder, write_sharded, write_tensors
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.text import NO_WEIGHTS
from mezzotint.errors import InputError
from mezzotint.families.family import Asked, Family, unanswered
from mezzotint.families.load import gather, is_native, named
from mezzotint.families.materials import (
    DISTILLED,
    INDEX,
    SCHEDULER,
    Layout,
    Material,
    Materials,
    Section,
    divided,
    section_part,
)
from mezzotint.families.parts import AUTOENCODERS, BACKBONES, configured
from mezzotint.families.registry import FAMILIES
from mezzotint.families.scheduler import scheduler_config
from mezzotint.files import write_json
from mezzotint.process import Prediction
from mezzotint.text.clip_network import ClipConfig
from mezzotint.text.vocabulary import clip_vocabulary

# Settings that say nothing about what a network computes.
SILENT = ("sample_size", "dropout", "force_upcast", "upcast_attention", "projection_dim")
PER_LEVEL = {"transformer_layers_per_block", "attention_head_dim", "num_attention_heads"}
# What a T5 or BERT computes with; the reference's own value where a file is silent.
TEXT_SETTINGS = {
    "num_layers": None, "num_heads": None, "d_kv": None, "d_ff": None, "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "encoder_layers": None, "encoder_attention_heads": None, "head_dim": None, "activation_function": "gelu",
}  # fmt: skip
TEXT_STEM, STEM = "model", "diffusion_pytorch_model"
CLIP_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
CLIP_WORDS = 49408
LIBRARIES = {"bert": "latent_diffusion", "text_encoder": "transformers"}  # in a model_index.json; others are diffusers
WORDS = {Prediction.VELOCITY: "v"}  # as headers call it
# What of a single file is not carried over, by the beginnings of the names.
KINDS = (
    ("model_ema.", "averaged copies of the weights (EMA)"),
    ("cond_stage_model.model.transformer.resblocks.", "the text encoder's last layer, which is never read"),
    ("loss.", "the autoencoder's loss"),
    ("first_stage_model.loss.", "the autoencoder's loss"),
)
OTHER_KIND = "tables and flags that the folder's configuration says"

Watch = Callable[[str, int, int], object]  # what is being written, bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and what of the source the other layout has no place for, in groups with their members."""

    family: str
    layout: Layout
    files: tuple[Path, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def convert(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    prediction: Prediction | str | None = None,
    distilled: bool | None = None,
    parts: str | Path | None = None,
    force: bool = False,
    watch: Watch = lambda what, done, total: None,
) -> Converted:
    """Rewrite a published checkpoint in a layout, "diffusers" or "single-file"; its numbers stay, to the bit.

    `prediction`, `distilled` and `parts` are as in `load`. A target that exists is replaced with `force` alone, and
    then only if it is a model folder or a file; it is whole or absent. InputError where the layout cannot hold what
    the source says.
    """
    source, target = Path(source), Path(target).absolute()
    if not source.exists():
        raise InputError(f"no such checkpoint: {source}")
    if is_native(source):
        raise InputError(f"{source} is a model of Mezzotint's own, which has one layout alone")
    if layout not in ("diffusers", "single-file"):
        raise InputError(f"no layout {layout!r}: one of diffusers, single-file")
    if target == source.resolve() or source.resolve().is_relative_to(target):
        raise InputError(f"{target} holds the source: choose another place")
    asked = Asked(None if prediction is None else named(prediction), distilled)
    family, materials = gather(source, Path(parts) if parts else None)
    question = unanswered(family, materials, asked)
    if question:
        raise InputError(f"{source}: {question}")
    return (to_folder if layout == "diffusers" else to_single_file)(family, materials, target, asked, force, watch)


def free(place: Path, force: bool) -> None:
    """InputError where something is there already that was not given up."""
    taken = place.exists() and not (place.is_dir() and not any(place.iterdir()))
    if taken and not force:
        raise InputError(f"{place} exists: choose another place, or replace it with --force")


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


def grouped(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Tensors that are left out, by what they are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        kind = next((kind for start, kind in KINDS if name.startswith(start)), OTHER_KIND)
        groups.setdefault(kind, []).append(name)
    return {kind: tuple(sorted(members)) for kind, members in groups.items()}


@dataclass
class Counted:
    """Bytes written so far, handed on to a watch."""

    watch: Watch
    total: int
    done: int = 0

    def at(self, what: str) -> Callable[[int], None]:
        """What a writer of one part calls with the bytes of each piece."""

        def advance(count: int) -> None:
            self.done += count
            self.watch(what, self.done, self.total)

        return advance


def size(material: Material) -> int:
    """Bytes of a part's tensors."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in material.stored().values())


def to_single_file(
    family: Family, materials: Materials, target: Path, asked: Asked, force: bool, watch: Watch
) -> Converted:
    """The original layout: one file, and one beside it for a part that was always published apart."""
    if family.original is None:
        raise InputError(f"{family.title} has no single-file layout")
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: the single file must end in .safetensors")
    facts = family.facts(materials, asked)
    sections = family.original.sections({}, {})
    content: dict[str, Tensor] = {}
    apart: dict[Path, dict[str, Tensor]] = {}
    kept: dict[str, Material] = {}
    for part, material in materials.parts.items():
        if part in sections:
            prefix, kept[part] = sections[part].prefix, material
            content |= {prefix + name: tensor for name, tensor in original(sections[part], material).items()}
        elif part in family.original.companions:
            files, section = family.original.companions[part]
            place = target.parent / files[0]
            apart[place] = original(section, material)
            compare(material, section_part(section, on_meta(apart[place]), place))
    if getattr(facts["process"].schedule, "zero_terminal_snr", False):
        content["ztsnr"] = torch.zeros(0)  # how other programs mark it
    content |= carried(family, kept, content)
    header = said(family, materials, facts)
    beside = read_back(family, materials, kept, content, header, facts, target)
    apart = {file: tensors for file, tensors in apart.items() if not holds(file, tensors)}
    for place in (target, *apart, *beside):
        free(place, force)
    count = Counted(watch, sum(t.nbytes for table in (content, *apart.values()) for t in table.values()))
    for file, tensors in apart.items():
        write_tensors(file, tensors, watch=count.at(file.name))
    for file, settings in beside.items():
        write_json(file, settings)
    write_tensors(target, content, header, watch=count.at(target.name))
    elsewhere = [*kept, *family.original.companions]
    lost = unsaid(family, materials, [part for part in materials.parts if part not in elsewhere], bool(beside))
    return Converted(family.name, "single-file", (target, *apart, *beside), lost)


def holds(file: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file is there already with these tensors: several models may share one."""
    if not file.is_file():
        return False
    found = open_tensors(file)
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def original(section: Section, material: Material) -> dict[str, Tensor]:
    """A part under its original names; InputError where the layout has no place for a tensor."""
    tensors = weights(material)
    try:
        for name, value in (section.implied(material.config) if section.implied else {}).items():
            stored = tensors.pop(name, value)
            if stored.shape != value.shape or not torch.equal(stored, value.to(stored)):
                raise InputError(f"the original layout has no place for {name}, which is not what it implies")
        return restored(tensors, section.rows(material.config)) if section.rows else tensors
    except InputError as error:
        raise InputError(f"{material.at}: {error}") from error


def weights(material: Material) -> dict[str, Tensor]:
    """A part's tensors under the published names, without those that carry no weights."""
    tensors = material.tensors
    if not material.kind.startswith("CLIP"):
        return dict(tensors)
    bare = not any(name.startswith("text_model.") for name in tensors)  # as transformers 5 writes them
    named = {f"text_model.{k}" if bare and not k.startswith("text_projection") else k: v for k, v in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name not in NO_WEIGHTS}


def carried(family: Family, kept: Mapping[str, Material], content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scale of the latents as a tensor of the file, for the family that reads it there (LDM)."""
    scale = kept["vae"].config.get("scaling_factor") if "vae" in kept else None
    if scale is None or scaled(family, content) == scale:
        return {}
    for dtype in (torch.float32, torch.float64):
        number = torch.tensor(float(scale), dtype=dtype)
        if scaled(family, {**content, "scale_factor": number}) == scale:
            return {"scale_factor": number}
    return {}


def scaled(family: Family, content: Mapping[str, Tensor]) -> float | None:
    """The scale of the latents as it would be read."""
    assert family.original is not None
    section = family.original.sections(content, {})["vae"]
    prefix = section.prefix
    shapes = {name[len(prefix) :]: tuple(t.shape) for name, t in content.items() if name.startswith(prefix)}
    return section.infer(shapes).get("scaling_factor")


def on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without their numbers; single numbers are kept."""
    return {name: tensor.to("meta") if tensor.numel() > 1 else tensor for name, tensor in tensors.items()}


def said(family: Family, materials: Materials, facts: Mapping[str, Any]) -> dict[str, str]:
    """What goes into the header: facts that names and shapes do not tell."""
    prediction = facts["process"].prediction
    width, height = facts["size"]
    header = {
        "mezzotint.family": family.name,
        "modelspec.prediction_type": WORDS.get(prediction, prediction.value),
        "modelspec.resolution": f"{width}x{height}",
    }
    if family.pipeline(materials) == "Flux2KleinPipeline":
        header[DISTILLED] = "yes" if facts["guidance"].distilled else "no"
    return header


def read_back(
    family: Family,
    materials: Materials,
    kept: Mapping[str, Material],
    content: Mapping[str, Tensor],
    header: Mapping[str, str],
    facts: Mapping[str, Any],
    target: Path,
) -> dict[Path, dict[str, Any]]:
    """Read a single file that is yet to be written; returns the files to put beside it, none for published shapes.

    InputError where it would become another network or process than it was made from.
    """
    meta = on_meta(content)
    shapes = {name: tuple(tensor.shape) for name, tensor in meta.items()}
    claimed = next((other for other in FAMILIES.values() if other.original and other.original.fits(shapes)), None)
    if claimed is not family:
        taken = claimed.title if claimed else "no family known here"
        raise InputError(f"{materials.path}: as a single file it would be taken for {taken}. Keep the folder")
    others = {part: material for part, material in materials.parts.items() if part not in kept}
    beside: dict[Path, dict[str, Any]] = {}
    try:
        again, told = reread(family, meta, header, target, others, {}, None)
    except InputError:  # a shape that was never published: files beside it say the rest, where the family reads them
        stated = dict(materials.parts[family.backbone].config)
        scheduler = dict(materials.scheduler or scheduler_config(facts["process"], facts["sampling"]))
        again, told = reread(family, meta, header, target, others, stated, scheduler)
        beside = {target.parent / "config.json": stated, target.parent / SCHEDULER: scheduler}
    for part, material in kept.items():
        compare(material, again.parts[part])
    ours, theirs = facts["process"].to_dict(), told["process"].to_dict()
    differences(materials.scheduler_at or materials.path, flat(ours), flat(theirs))
    return beside


def reread(
    family: Family,
    meta: Mapping[str, Tensor],
    header: Mapping[str, str],
    target: Path,
    others: Mapping[str, Material],
    stated: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
) -> tuple[Materials, Mapping[str, Any]]:
    """The parts of a single file and its facts."""
    assert family.original is not None
    parts, rest = divided(target, meta, family.original, stated)
    again = Materials(
        target, "single-file", {**others, **parts}, {}, scheduler, target.parent / SCHEDULER, metadata=header,
        index={"is_distilled": header[DISTILLED] == "yes"} if DISTILLED in header else {},
        marks=frozenset(name for name in rest if "." not in name),
    )  # fmt: skip
    if question := unanswered(family, again, Asked()):
        raise InputError(question)
    return again, family.facts(again, Asked())


def compare(material: Material, found: Material) -> None:
    """InputError unless a part would be read back as the same network with the same names."""
    differences(material.at, network_settings(material), network_settings(found))
    odd = sorted(weights(material).keys() ^ found.tensors.keys())
    if odd:
        raise InputError(f"{material.at}: the single-file layout has no place for {odd[0]} ({len(odd)} in all)")


def network_settings(material: Material) -> dict[str, Any]:
    """The settings that a part computes with, nested ones with dots."""
    known = BACKBONES | AUTOENCODERS
    if material.kind.startswith("CLIP"):
        return flat(asdict(ClipConfig.from_config(material.config)))
    if material.kind in known or "_class_name" in material.config:
        return levelled(flat(asdict(configured(known, material.config, material.at)[1])))
    return {key: material.config.get(key, usual) for key, usual in TEXT_SETTINGS.items()}


def levelled(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a U-Net with what is said level by level kept for the levels that attend, and the innermost one."""
    down, up = settings.get("down_block_types", ()), settings.get("up_block_types", ())[::-1]
    attending = [i for i in range(len(down)) if "Attn" in down[i] + up[i] or i == len(down) - 1]
    for key in PER_LEVEL & settings.keys():
        value = settings[key]
        several = value if isinstance(value, (tuple, list)) else [value] * len(down)
        settings[key] = [several[i] for i in attending]
    return settings


def flat(data: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, without those that say nothing."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= flat(value, f"{stem}{key}.")
        elif key not in SILENT:
            found[stem + key] = value
    return found


def differences(at: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], layout: str = "single-file") -> None:
    """InputError naming the first setting that would be read back otherwise."""
    for name in {**ours, **theirs}:
        if not alike(ours.get(name), theirs.get(name)):
            raise InputError(
                f"{at}: the {layout} layout cannot say {name} = {ours.get(name)!r}, it would be read back as "
                f"{theirs.get(name)!r}. Keep it as it is"
            )


def alike(a: Any, b: Any) -> bool:
    """Equal, or one number for all levels and the same number for each."""
    if isinstance(a, (tuple, list)) != isinstance(b, (tuple, list)):
        several, one = (a, b) if isinstance(a, (tuple, list)) else (b, a)
        return len(several) > 0 and all(item == one for item in several)
    return list(a) == list(b) if isinstance(a, (tuple, list)) else a == b


def unsaid(family: Family, materials: Materials, parts: list[str], beside: bool) -> dict[str, tuple[str, ...]]:
    """What a folder holds and its single file does not."""
    lost: dict[str, tuple[str, ...]] = {}
    if parts:
        lost[f"parts that this layout has no place for (when loading, --parts {materials.path} brings them)"] = (
            *parts,
        )
    if materials.tokenizers:
        texts = [part for part in materials.parts if part.startswith("text_encoder")]
        clip = all(materials.config(part, "vocab_size") == CLIP_WORDS for part in texts)
        remedy = "CLIP's own are used instead" if clip else f"when loading, --parts {materials.path} brings them"
        lost[f"tokenizers ({remedy})"] = tuple(materials.tokenizers)
    if materials.scheduler and not beside:
        lost["what the scheduler file says of sampling (the family's own settings are used instead)"] = (SCHEDULER,)
    if materials.index.get("id2label"):
        lost["names of classes"] = ("id2label",)
    return lost
