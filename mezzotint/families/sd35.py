"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): Medium (MMDiT-X) and Large.

MMDiT on a rectified flow with static shift 3, AutoencoderKL f8 with 16 channels, scaled and shifted; CLIP-L and bigG at
their last but one layer, joined on channels and filled up to T5's width, then T5 on the sequence, which may be absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mezzotint.backbones.mmdit import MMDiTConfig
from mezzotint.checkpoints.layouts.mmdit import mmdit, mmdit_config
from mezzotint.contract import GuidanceFacts, SamplingFacts
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import IGNORED, UNET, published, side, vae_section
from mezzotint.families.materials import Materials, Original, Section
from mezzotint.families.prompts import clip_section, sd3_text, t5_section
from mezzotint.process import Prediction, Process, schedules

TRAINED = Process(schedules.sd35(), Prediction.FLOW)


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    """Large asks for less guidance and fewer steps than Medium (the published defaults)."""
    large = len(materials.parts["transformer"].config.get("dual_attention_layers", ())) == 0
    plain = SamplingFacts(sampler="flow_euler", steps=40)
    process, sampling = published(materials, TRAINED, plain, asked, schedules.sd35())
    return {
        "process": process,
        "sampling": sampling,
        "guidance": GuidanceFacts(dropout=0.1, scale=4.5 if large else 5.0),
        "size": (1024, 1024) if materials.layout == "single-file" else side(materials, 1024),
    }


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    """Text encoders are in the file or not; the released files come both ways."""
    return {
        "transformer": Section(
            UNET,
            lambda shapes: mmdit_config(shapes) | {"_class_name": "SD3Transformer2DModel"},
            lambda config: mmdit(MMDiTConfig.from_config(config)),
        ),
        "vae": vae_section(scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": clip_section("text_encoders.clip_l.transformer.", "quick_gelu"),
        "text_encoder_2": clip_section("text_encoders.clip_g.transformer.", "gelu"),
        "text_encoder_3": t5_section("text_encoders.t5xxl.transformer."),
    }


FAMILY = Family(
    name="sd35",
    title="Stable Diffusion 3.5",
    pipeline=lambda materials: "StableDiffusion3Pipeline",
    fits=lambda materials: materials.kind("transformer") == "SD3Transformer2DModel",
    facts=facts,
    licence=lambda materials: "Stability AI Community License (free below 1 M USD yearly revenue)",
    backbone="transformer",
    text=sd3_text,
    original=Original(lambda shapes: UNET + "joint_blocks.0.x_block.attn.qkv.weight" in shapes, sections, IGNORED),
)
