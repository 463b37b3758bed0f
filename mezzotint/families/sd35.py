"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): 3 Medium, 3.5 Medium (MMDiT-X) and 3.5 Large.

MMDiT on a rectified flow with static shift 3, AutoencoderKL f8 with 16 channels, scaled and shifted; CLIP-L and bigG at
their last but one layer, joined on channels and filled up to T5's width, then T5 on the sequence, which may be absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mezzotint.backbones.mmdit import MMDiTConfig
from mezzotint.checkpoints.layouts.mmdit import mmdit, mmdit_config
from mezzotint.checkpoints.layouts.text import NO_WEIGHTS, clip_config
from mezzotint.contract import GuidanceFacts, SamplingFacts
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import IGNORED, UNET, published, side, vae_section
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import clip_section, sd3_text, t5_section
from mezzotint.process import Prediction, Process, RectifiedFlow, schedules

TRAINED = Process(schedules.sd35(), Prediction.FLOW)
PROJECTION = "text_projection.weight"
PLACE = "text_encoders.{}.transformer."  # of a text encoder in a whole-model file


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    """3.5 Large asks for less guidance and fewer steps than the Mediums (the published defaults).

    It alone has norms on queries and keys and no block that attends twice.
    """
    dual = len(materials.config("transformer", "dual_attention_layers") or ()) > 0
    large = materials.config("transformer", "qk_norm") is not None and not dual
    plain = SamplingFacts(sampler="flow_euler", steps=40 if large else 50)
    process, sampling = published(materials, TRAINED, plain, asked, flow(materials))
    factor = 2 ** (len(materials.config("vae", "block_out_channels", range(4))) - 1)
    return {
        "process": process,
        "sampling": sampling,
        "guidance": GuidanceFacts(dropout=0.1, scale=4.5 if large else 5.0),
        "size": side(materials, 1024, factor),
    }


def flow(materials: Materials) -> RectifiedFlow:
    """The static shift, or the line that a scheduler file may ask for in its place, which bends the low end once."""
    moving = (materials.scheduler or {}).get("use_dynamic_shifting", False)
    return replace(schedules.sd35(), mu="linear", low_end="once") if moving else schedules.sd35()


def notes(materials: Materials) -> tuple[str, ...]:
    """T5 may be left out to save memory; pictures with much text in them suffer."""
    absent = "no T5 (text_encoder_3) was found: the network reads zeros in its place"
    return () if "text_encoder_3" in materials.parts else (absent,)


def clip_l(prefix: str) -> Section:
    """CLIP-L, which Stable Diffusion 3 reads without its projection.

    Folders store the identity in its place; original files store nothing, or what nobody reads: neither Stability's own
    code nor the reference library.
    """

    def infer(shapes: Shapes) -> dict[str, Any]:
        width = shapes["text_model.embeddings.token_embedding.weight"][1]
        return clip_config({**shapes, PROJECTION: (width, width)}, "quick_gelu")

    return Section(
        prefix, infer, None, (*NO_WEIGHTS, PROJECTION), lambda config: {PROJECTION: torch.eye(config["hidden_size"])}
    )


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    """Text encoders are in the file or not; the released files come both ways."""
    return {
        "transformer": Section(
            UNET,
            lambda shapes: mmdit_config(shapes) | {"_class_name": "SD3Transformer2DModel"},
            lambda config: mmdit(MMDiTConfig.from_config(config)),
        ),
        "vae": vae_section(scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": clip_l(PLACE.format("clip_l")),
        "text_encoder_2": clip_section(PLACE.format("clip_g"), "gelu"),
        "text_encoder_3": t5_section(PLACE.format("t5xxl")),
    }


def beside(file: str) -> tuple[str, ...]:
    """Where a text encoder's own file is published: in a folder beside the model's, or next to it."""
    return (f"text_encoders/{file}.safetensors", f"{file}.safetensors")


COMPANIONS = {
    "text_encoder": (beside("clip_l"), clip_l("")),
    "text_encoder_2": (beside("clip_g"), clip_section("", "gelu")),
    "text_encoder_3": ((*beside("t5xxl_fp16"), *beside("t5xxl"), *beside("t5xxl_fp8_e4m3fn")), t5_section("")),
}
# Temperatures, which no text encoder has.
TEMPERATURES = tuple(f"text_encoders.{name}.logit_scale" for name in ("clip_l", "clip_g", "t5xxl"))

FAMILY = Family(
    name="sd35",
    title="Stable Diffusion 3 and 3.5",
    pipeline=lambda materials: "StableDiffusion3Pipeline",
    fits=lambda materials: materials.kind("transformer") == "SD3Transformer2DModel",
    facts=facts,
    licence=lambda materials: "Stability AI Community License (free below 1 M USD yearly revenue)",
    backbone="transformer",
    text=sd3_text,
    notes=notes,
    original=Original(
        lambda shapes: UNET + "joint_blocks.0.x_block.attn.qkv.weight" in shapes,
        sections,
        (*IGNORED, *TEMPERATURES),
        COMPANIONS,
    ),
)
