"""Stable Diffusion 2.x: linear projections, heads of 64, and OpenCLIP H read before its last layer.

2.1 and 2.0 predict velocity at 768 pixels, 2.x-base epsilon at 512; their single files look the same and do not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.contract import GuidanceFacts
from mezzotint.families.family import Asked, Family, Question
from mezzotint.families.latent import IGNORED, UNET, pipeline_of, published, side, stated, unet_section, vae_section
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import clip_text, open_clip_section
from mezzotint.families.sd1 import PLAIN, TRAINED, corrected, inpainting
from mezzotint.process import Prediction
from mezzotint.text import TextEncoder

TEXT = "cond_stage_model.model."


def fits(materials: Materials) -> bool:
    """One text encoder, and projections that are linear."""
    return (
        materials.kind("unet") == "UNet2DConditionModel"
        and materials.kind("text_encoder") == "CLIPTextModel"
        and materials.config("unet", "use_linear_projection", False) is True
        and materials.config("unet", "addition_embed_type") is None
    )


def text(materials: Materials, dtype: torch.dtype) -> TextEncoder:
    """Published folders keep the layers up to the one that is read, so the last one there is the last but one."""
    return clip_text(materials, "text_encoder", dtype, padding="!")


def asks(materials: Materials) -> Question | None:
    silent = stated(materials) is None and "prediction_type" not in (materials.scheduler or {})
    if materials.layout == "single-file" and silent:
        return Question(
            "prediction",
            "the file does not say whether it predicts velocity (Stable Diffusion 2.0 and 2.1, 768 pixels) or epsilon "
            "(2.x-base, 512 pixels): add --prediction velocity or --prediction epsilon",
        )
    return None


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    process, sampling = corrected(materials, *published(materials, TRAINED, PLAIN, asked))
    usual = 768 if process.prediction is Prediction.VELOCITY else 512
    return {
        "process": process,
        "sampling": sampling,
        "guidance": GuidanceFacts(dropout=0.1, scale=7.5),
        "size": side(materials, usual),
        **inpainting(materials),
    }


def original(shapes: Shapes) -> bool:
    return UNET + "input_blocks.0.0.weight" in shapes and any(name.startswith(TEXT) for name in shapes)


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    """Of the original text encoder the layer behind the one that is read is left out, as in published folders."""
    return {
        "unet": unet_section(stated, head_width=64),
        "vae": vae_section(),
        "text_encoder": open_clip_section(TEXT, tensors, whole=False),
    }


FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    pipeline=pipeline_of("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"),
    fits=fits,
    facts=facts,
    licence=lambda materials: "CreativeML Open RAIL++-M",
    text=text,
    original=Original(original, sections, IGNORED),
    asks=asks,
)
