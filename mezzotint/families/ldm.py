"""Latent diffusion (Rombach et al. 2022): without condition, by class (cin256), by text (text2img-1p4B).

A U-Net on the latents of a VQ or KL first stage, f4 or f8, under a scaled-linear table whose ends differ from model to
model; original files do not state them, so they are listed here by the network's first widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.checkpoints.keymap import Entry
from mezzotint.checkpoints.layouts.unet import unet, unet_config
from mezzotint.contract import ClassFacts, GuidanceFacts, SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.ddpm import plain_config, square
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import IGNORED, UNET, factor_of, published, unet_section, vae_section
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import bert_section, bert_text
from mezzotint.process import Prediction, Process, schedules

CLASS_TABLE, BERT = "cond_stage_model.embedding", "cond_stage_model."
PLAIN = SamplingFacts(sampler="ddim", steps=50, spacing="leading", offset=1)
TEXT_ENDS = (0.00085, 0.012)
ENDS = {  # widths of the U-Net: beta at both ends, side of the pictures
    (224, 448, 672, 896): (0.0015, 0.0195, 256),  # faces and bedrooms, VQ f4
    (192, 384, 576, 960): (0.0015, 0.0195, 256),  # ImageNet by class (cin256-v2), VQ f4
    (192, 384, 384, 768, 768): (0.0015, 0.0155, 256),  # churches, KL f8
    (320, 640, 1280, 1280): (*TEXT_ENDS, 256),  # text to image, KL f8
}


def process_of(materials: Materials, backbone: Mapping[str, Any]) -> tuple[Process, tuple[int, int]]:
    """The table and the size by the network's widths, or by the files where the widths were never published."""
    widths, sample = tuple(backbone.get("block_out_channels", ())), backbone.get("sample_size")
    if widths not in ENDS and (materials.scheduler is None or sample is None):
        raise InputError(
            f"{materials.path}: no latent diffusion model of widths {widths} was published, so its schedule is not "
            f"known. Put its scheduler_config.json and its config.json (with sample_size) beside it"
        )
    start, end, side = ENDS.get(widths, (*TEXT_ENDS, 0))
    size = (side, side) if sample is None else square(sample, factor_of(materials))
    return Process(schedules.scaled_linear(start, end), Prediction.EPSILON), size


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    process, size = process_of(materials, materials.parts["unet"].config)
    process, sampling = published(materials, process, PLAIN, asked)
    return {"process": process, "sampling": sampling, "size": size, "guidance": GuidanceFacts()}


def class_facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    """The last row of the table of classes is "no class"."""
    backbone = materials.parts["unet"].config
    process, size = process_of(materials, backbone["unet"])
    process, sampling = published(materials, process, PLAIN, asked)
    names = tuple(map(str, range(backbone["classes"] - 1)))
    return {
        "process": process,
        "sampling": sampling,
        "size": size,
        "guidance": GuidanceFacts(dropout=0.1, scale=3.0),
        "classes": ClassFacts(names=names, null=len(names)),
    }


def text_facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    return facts(materials, asked) | {"guidance": GuidanceFacts(dropout=0.1, scale=5.0)}


def first_stage(tensors: Mapping[str, Tensor]) -> Section:
    """VQ latents are not scaled; KL latents are by 0.18215, or by the number that the file carries."""
    carried = tensors.get("scale_factor")
    return vae_section(None if carried is None else float(carried))


def plain_sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    network = Section(
        UNET, lambda shapes: plain_config(shapes, stated), lambda config: unet(UNetConfig.from_config(config))
    )
    return {"unet": network, "vae": first_stage(tensors)}


def class_sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    """The network and its table of classes are two places in the file and one backbone."""

    def infer(shapes: Shapes) -> dict[str, Any]:
        own = {name.removeprefix(UNET): shape for name, shape in shapes.items() if name.startswith(UNET)}
        config = unet_config(own)
        config.pop("_class_name")
        told = stated.get("unet", stated)  # of a network of ours, or of the U-Net alone
        classes = shapes[CLASS_TABLE + ".weight"][0]
        return {"_class_name": "ClassTokens", "unet": config | dict(told), "classes": classes}

    def rows(config: Mapping[str, Any]) -> list[Entry]:
        inner = unet(ConditionalUNetConfig.from_config(config["unet"]))
        table = [Entry(UNET + row.theirs, tuple(f"unet.{ours}" for ours in row.ours), row.change) for row in inner]
        return [*table, Entry(CLASS_TABLE, ("embedding",))]

    return {"unet": Section("", infer, rows), "vae": first_stage(tensors)}


def text_sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    return {"unet": unet_section(stated, heads=8), "vae": first_stage(tensors), "text_encoder": bert_section(BERT)}


def latent(shapes: Shapes) -> bool:
    return UNET + "input_blocks.0.0.weight" in shapes


LICENCE = "MIT (code); the weights' licence is not stated in the files"
FAMILY = Family(
    name="ldm",
    title="latent diffusion without condition",
    pipeline=lambda materials: "LDMPipeline",
    fits=lambda materials: materials.kind("unet") == "UNet2DModel" and "vae" in materials.parts,
    facts=facts,
    licence=lambda materials: LICENCE,
    original=Original(
        lambda shapes: latent(shapes) and not any(name.startswith("cond_stage_model.") for name in shapes),
        plain_sections, IGNORED,
    ),
    folders={"vae": "vqvae"},
)  # fmt: skip
CLASSES = Family(
    name="ldm-classes",
    title="latent diffusion by class",
    pipeline=lambda materials: "",
    fits=lambda materials: materials.kind("unet") == "ClassTokens",
    facts=class_facts,
    licence=lambda materials: LICENCE,
    original=Original(lambda shapes: latent(shapes) and CLASS_TABLE + ".weight" in shapes, class_sections, IGNORED),
)
TEXT = Family(
    name="ldm-text",
    title="latent diffusion by text",
    pipeline=lambda materials: "LDMTextToImagePipeline",
    fits=lambda materials: (
        materials.kind("unet") == "UNet2DConditionModel" and materials.kind("text_encoder") == "LDMBertModel"
    ),
    facts=text_facts,
    licence=lambda materials: LICENCE,
    text=bert_text,
    original=Original(
        lambda shapes: latent(shapes) and BERT + "transformer.token_emb.weight" in shapes, text_sections, IGNORED
    ),
    folders={"vae": "vqvae", "text_encoder": "bert"},
)
