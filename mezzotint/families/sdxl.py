"""Stable Diffusion XL (Podell et al. 2023): base and refiner.

UNet2DConditionModel told the picture's sizes, AutoencoderKL f8 scaled by 0.13025, CLIP-L and OpenCLIP bigG read at
their last but one layer and joined on channels; the refiner reads bigG alone and is told an aesthetic score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.contract import DtypeFacts, GuidanceFacts, SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.assemble import HALVES
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import IGNORED, UNET, pipeline_of, published, side, unet_section, vae_section
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import clip_section, clip_text, open_clip_section
from mezzotint.families.sd1 import TRAINED, inpainting
from mezzotint.text import TextEncoder
from mezzotint.text.clip import Clip
from mezzotint.text.joint import Joint

FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
PLAIN = SamplingFacts(sampler="euler", steps=50, spacing="leading", offset=1, last="lowest")
CROP = ("original_height", "original_width", "crop_top", "crop_left")


def sized(materials: Materials) -> bool:
    """A U-Net that is told numbers about the picture."""
    return (
        materials.kind("unet") == "UNet2DConditionModel"
        and materials.config("unet", "addition_embed_type") == "text_time"
    )


def text(materials: Materials, dtype: torch.dtype) -> TextEncoder:
    """Without a prompt the base is told zeros, where its files say so."""
    nothing = "zeros" if materials.index.get("force_zeros_for_empty_prompt", True) else "encoded"
    first = clip_text(materials, "text_encoder", dtype, -2, False)
    return Joint((first, big(materials, dtype)), stands_for_nothing=nothing)


def refiner_text(materials: Materials, dtype: torch.dtype) -> TextEncoder:
    return big(materials, dtype)


def big(materials: Materials, dtype: torch.dtype) -> Clip:
    """OpenCLIP bigG before its last layer, its projection the vector for the whole prompt."""
    return clip_text(materials, "text_encoder_2", dtype, -2, False, "projection", "!")


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    """Epsilon on the scaled-linear table unless the scheduler file, marks in a single file or the user say otherwise.

    The autoencoder overflows in half precision unless its own file says that it does not; an original file cannot say.
    InputError for files that were trained on other levels of noise (EDM's), which their marks tell.
    """
    other = [name for name in materials.left_out if name.startswith("edm_")]
    if other:
        raise InputError(
            f"{materials.path} was trained on EDM's levels of noise ({other[0]} is in it), which are not known here: "
            f"use a model on Stable Diffusion XL's own"
        )
    process, sampling = published(materials, TRAINED, PLAIN, asked)
    told = materials.config("unet", "time_cond_proj_dim") is not None  # a latent consistency model
    if told:
        sampling = sampling.model_copy(update={"sampler": "lcm", "steps": 4})
    overflows = materials.config("vae", "force_upcast", True)
    return {
        "process": process,
        "sampling": sampling,
        "guidance": GuidanceFacts(dropout=0.1, distilled=told, embedded=told, scale=8.0 if told else 5.0),
        "size": side(materials, 1024),
        "picture": (*CROP, "target_height", "target_width"),
        "dtypes": DtypeFacts(backbone=HALVES, codec=HALVES[:2] if overflows else HALVES),
        **inpainting(materials),
    }


def refiner_facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    return facts(materials, asked) | {"picture": (*CROP, "aesthetic")}


def original(shapes: Shapes) -> bool:
    return UNET + "label_emb.0.0.weight" in shapes and any(name.startswith(FIRST + "transformer.") for name in shapes)


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    return {
        "unet": unet_section(stated, head_width=64),
        "vae": vae_section(scaling_factor=0.13025),
        "text_encoder": clip_section(FIRST + "transformer.", "quick_gelu"),
        "text_encoder_2": open_clip_section(SECOND + "model.", tensors, whole=True),
    }


def refiner_original(shapes: Shapes) -> bool:
    return UNET + "label_emb.0.0.weight" in shapes and any(name.startswith(FIRST + "model.") for name in shapes)


def refiner_sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    return {
        "unet": unet_section(stated, head_width=64),
        "vae": vae_section(scaling_factor=0.13025),
        "text_encoder_2": open_clip_section(FIRST + "model.", tensors, whole=True),
    }


LICENCE = "CreativeML Open RAIL++-M"
FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline=pipeline_of("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPipeline"),
    fits=lambda materials: sized(materials) and "text_encoder" in materials.parts,
    facts=facts,
    licence=lambda materials: LICENCE,
    text=text,
    original=Original(original, sections, IGNORED),
    index={"force_zeros_for_empty_prompt": True},
)
REFINER = Family(
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    pipeline=lambda materials: "StableDiffusionXLImg2ImgPipeline",
    fits=lambda materials: sized(materials) and "text_encoder" not in materials.parts,
    facts=refiner_facts,
    licence=lambda materials: LICENCE,
    text=refiner_text,
    original=Original(refiner_original, refiner_sections, IGNORED),
    index={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
)
