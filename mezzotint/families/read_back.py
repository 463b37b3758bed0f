"""What would be read back of a single file, on the meta device, before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.families.family import Asked, Family, unanswered
from mezzotint.families.materials import DISTILLED, SCHEDULER, Material, Materials, divided
from mezzotint.families.originals import weights
from mezzotint.families.parts import AUTOENCODERS, BACKBONES, configured
from mezzotint.families.registry import FAMILIES
from mezzotint.families.scheduler import scheduler_config
from mezzotint.text.clip_network import ClipConfig

# Settings that say nothing about what a network computes.
SILENT = ("sample_size", "dropout", "force_upcast", "upcast_attention", "projection_dim")
PER_LEVEL = {"transformer_layers_per_block", "attention_head_dim", "num_attention_heads"}
# What a T5 or BERT computes with; the reference's own value where a file is silent.
TEXT_SETTINGS = {
    "num_layers": None, "num_heads": None, "d_kv": None, "d_ff": None, "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "encoder_layers": None, "encoder_attention_heads": None, "head_dim": None, "activation_function": "gelu",
}  # fmt: skip


def on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without their numbers; single numbers are kept."""
    return {name: tensor.to("meta") if tensor.numel() > 1 else tensor for name, tensor in tensors.items()}


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
        raise InputError(question.text)
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
