"""Parts to a single file in the family's original layout.

What a single file cannot say in names and shapes goes into its header, or into config.json and scheduler_config.json
beside it where its family reads them; what it can say nowhere is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.checkpoints import open_tensors, write_tensors
from mezzotint.errors import InputError
from mezzotint.families.converted import Converted, Counted, Watch, free
from mezzotint.families.family import Asked, Family
from mezzotint.families.materials import SCHEDULER, Material, Materials, section_part
from mezzotint.families.originals import original, said
from mezzotint.families.read_back import compare, on_meta, read_back
from mezzotint.files import write_json

CLIP_WORDS = 49408


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
