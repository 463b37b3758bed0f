"""What a published checkpoint says of itself, from headers and configurations alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.adapters import describe, is_adapter
from mezzotint.adapters.textual_inversion import summary
from mezzotint.checkpoints import find_weights, open_tensors, read_json, read_metadata, read_shapes
from mezzotint.checkpoints.header import Shapes as Stored
from mezzotint.contract import AdapterContract, read_adapter_contract
from mezzotint.errors import InputError
from mezzotint.families.adapt import LORA, PEFT, WORDS
from mezzotint.families.control import FOLLOWS, single
from mezzotint.families.converted import grouped
from mezzotint.families.family import Asked, Family, unanswered
from mezzotint.families.load import gather
from mezzotint.families.materials import Material, Materials, folder_part
from mezzotint.families.parts import AUTOENCODERS, BACKBONES, CONTROLS, configured
from mezzotint.process import Prediction

NETWORKS = BACKBONES | AUTOENCODERS | CONTROLS
LENGTHS = {"clip": 77, "t5": 256, "ldmbert": 77, "qwen3": 512, "mistral3": 512}  # tokens read of a prompt
READ = {"qwen3": 3, "mistral3": 3}  # hidden states joined on channels, where more than one
ANSWERS = {
    "prediction": (Asked(prediction=Prediction.EPSILON), Asked(prediction=Prediction.VELOCITY)),
    "distilled": (Asked(distilled=True), Asked(distilled=False)),
}


def published(path: Path, parts: Path | None = None) -> dict[str, Any]:
    """Family, parts, process, latent and text space of a folder or a single file; InputError where it is neither."""
    family, materials = gather(path, parts)
    question = unanswered(family, materials, Asked())
    asked = ANSWERS[question.fact] if question else (Asked(),)
    facts = [family.facts(materials, answer) for answer in asked]
    process, sampling, guidance = (either(facts, name) for name in ("process", "sampling", "guidance"))
    known = {part: part_facts(material) for part, material in materials.parts.items()}
    size, classes = facts[0]["size"], facts[0].get("classes")
    return {
        "family": family.name,
        "title": family.title,
        "layout": materials.layout,
        "parameters": sum(part["parameters"] for part in known.values()),
        "parts": known,
        "process": process,
        "sampling": sampling,
        "latent": latent_space(family, materials),
        "text": text_space(family, materials, facts[0]),
        "classes": classes.model_dump() if classes else None,
        "guidance": guidance,
        "size": list(size),
        "licence": {"weights": family.licence(materials)},
        "left_open": question.text if question else None,
        "missing": missing(family, materials),
        "left_out": {what: len(names) for what, names in grouped(materials.left_out).items()},
        "notes": list(family.notes(materials)),
    }


def either(facts: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One group of facts; what depends on the answer that the files leave open says both."""
    first, *others = [found[name].to_dict() if name == "process" else found[name].model_dump() for found in facts]
    for other in others:
        first |= {key: f"{first[key]} or {other[key]}" for key in first if first[key] != other[key]}
    return first


def part_facts(material: Material) -> dict[str, Any]:
    """Class, parameters of the network that its settings make, what is stored besides, formats, bytes."""
    stored = material.stored()
    network = built(material)
    numbers = sum(torch.Size(shape).numel() for shape, _ in stored.values())
    parameters = sum(p.numel() for p in network.parameters()) if network else weights_of(stored)
    besides = sum(b.numel() for b in network.buffers()) if network else numbers - parameters
    return {
        "class": material.kind,
        "parameters": parameters,
        "stored_besides": besides,  # tables and statistics that no training changes
        "dtype": sorted({str(dtype).removeprefix("torch.") for _, dtype in stored.values()}),
        "bytes": sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored.values()),
        "tensors": len(stored),
    }


def built(material: Material) -> nn.Module | None:
    """The network on the meta device; None for text encoders, whose tensors are counted as they are stored."""
    if "_class_name" not in material.config:
        return None
    try:
        part, config = configured(NETWORKS, material.config, material.at)
    except InputError:
        return None
    with torch.device("meta"):
        return part.network(config)


def weights_of(stored: Stored) -> int:
    """Numbers of a text encoder but for tables of positions and single numbers."""
    return sum(
        torch.Size(shape).numel()
        for name, (shape, dtype) in stored.items()
        if dtype.is_floating_point and shape and not name.endswith(("attn_mask", "inv_freq"))
    )


def latent_space(family: Family, materials: Materials) -> dict[str, Any] | None:
    """Kind of codec, channels and pixels a latent, scale and shift; None where the codec is not there."""
    if not family.codec:
        return {"codec": "none: the network works on pixels", "factor": 1}
    if family.codec not in materials.parts:
        return None
    material = materials.parts[family.codec]
    network: Any = built(material)
    whitened = hasattr(network, "bn")
    scale, shift = (material.config.get(f"{name}_factor") for name in ("scaling", "shift"))
    return {
        "codec": material.kind,
        "channels": network.latent_channels,
        "factor": network.factor,
        "pixel_channels": network.pixel_channels,
        "scale": "by its stored statistics" if whitened else getattr(network.config, "scaling_factor", scale),
        "shift": "by its stored statistics" if whitened else shift or 0.0,
    }


def text_space(family: Family, materials: Materials, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Each encoder's width and length, and what the backbone reads of them together."""
    if family.text is None:
        return None
    encoders: dict[str, Any] = {}
    for part in (name for name in materials.parts if name.startswith("text_encoder")):
        config = materials.parts[part].config
        inner = {**config.get("text_config", {}), **config}
        kind = str(config.get("model_type", "clip"))
        width = next((int(inner[key]) for key in ("hidden_size", "d_model") if key in inner), None)
        length = next((tokens for name, tokens in LENGTHS.items() if kind.startswith(name)), None)
        encoders[part] = {"class": materials.kind(part), "width": width, "length": length}
        if kind in READ:
            encoders[part]["hidden_states"] = READ[kind]
    backbone = materials.parts[family.backbone].config
    pooled = backbone.get("pooled_projection_dim")
    if backbone.get("addition_embed_type") == "text_time":
        told = int(backbone.get("addition_time_embed_dim", 256)) * len(facts.get("picture", ()))
        pooled = int(backbone["projection_class_embeddings_input_dim"]) - told
    return {
        "encoders": encoders or "not in this file",
        "width": backbone.get("joint_attention_dim", backbone.get("cross_attention_dim")),
        "pooled": pooled,
    }


def missing(family: Family, materials: Materials) -> list[str]:
    """Parts without which this checkpoint cannot draw; a folder with them is given with --parts."""
    lacking = [part for part in (family.backbone, family.codec) if part and part not in materials.parts]
    if family.text is not None and not any(part.startswith("text_encoder") for part in materials.parts):
        lacking.append("text_encoder")
    return lacking


def addition(path: Path) -> dict[str, Any] | None:
    """What is added to a model: a LoRA, a control network or words of textual inversion; None for anything else."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (folder / "config.json").is_file():
        if read_json(folder / "config.json").get("_class_name") in CONTROLS:
            return control_facts(folder_part(folder))
        return None
    in_folder = [folder / f"{stem}.safetensors" for stem in LORA + WORDS]
    in_folder = [file for file in in_folder if file.is_file()]
    if path.is_dir() and not in_folder:
        return None
    file = in_folder[0] if path.is_dir() else find_weights(path)
    shapes = read_shapes(file)
    if is_adapter(shapes):
        metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
        if path.is_dir() and file.stem == PEFT and (folder / "adapter_config.json").is_file():
            metadata = {**metadata, "lora_adapter_metadata": (folder / "adapter_config.json").read_text()}
        facts = describe(open_tensors(file), metadata)
        found = {name: getattr(facts, name) for name in facts.__slots__}
        contract = AdapterContract.from_header(metadata)
        ours = {} if contract is None else {"contract": contract.model_dump(mode="json", exclude={"version", "kind"})}
        return {"kind": "LoRA", **found, **stored_facts(shapes), **ours}
    if any(name.startswith(("control_model.", "controlnet_blocks.", "input_hint_block.")) for name in shapes):
        return control_facts(single(path))
    return words_facts(file, shapes) if len(shapes) <= 8 else None


def words_facts(file: Path, shapes: Stored) -> dict[str, Any] | None:
    """Words of textual inversion, by our contract or by their vectors."""
    contract = AdapterContract.from_header(read_metadata(file) if file.suffix == ".safetensors" else {})
    name, said = file.stem, None
    if contract is not None and contract.words:
        name, said = contract.words[0], contract.family
    found = summary(open_tensors(file), name, said)
    ours = {} if contract is None else {"contract": contract.model_dump(mode="json", exclude={"version", "kind"})}
    return found and {"kind": "textual inversion", **found, **stored_facts(shapes), **ours}


def control_facts(material: Material) -> dict[str, Any]:
    """A control network: which backbones it fits, and what it is shown."""
    network: Any = built(material)
    config = getattr(network.config, "unet", network.config)
    fits = {
        name: getattr(config, name)
        for name in ("in_channels", "cross_attention_dim", "joint_attention_dim", "block_out_channels", "num_layers")
        if getattr(config, name, None) is not None
    }
    follows = {"follows": material.config[FOLLOWS]} if FOLLOWS in material.config else {}
    contract = read_adapter_contract(material.at) if material.at.is_dir() else None
    ours = {} if contract is None else {"contract": contract.model_dump(mode="json", exclude={"version", "kind"})}
    return {
        "kind": "control network",
        **part_facts(material),
        "shown": network.hint,
        **follows,
        "made_for": fits,
        **ours,
    }


def stored_facts(shapes: Stored) -> dict[str, Any]:
    """Formats and bytes of a file's tensors."""
    return {
        "tensors": len(shapes),
        "dtype": sorted({str(dtype).removeprefix("torch.") for _, dtype in shapes.values()}),
        "bytes": sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values()),
    }
