"""Stable Diffusion 1.x (Rombach et al. 2022), its inpainting models, and latent consistency models made from it.

UNet2DConditionModel (convolutional projections, 8 heads), AutoencoderKL f8 with 4 channels, CLIP-L's last hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.contract import GuidanceFacts, SamplingFacts
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import IGNORED, UNET, pipeline_of, published, side, unet_section, vae_section
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import clip_section, clip_text
from mezzotint.process import Prediction, Process, schedules
from mezzotint.text import TextEncoder

TEXT = "cond_stage_model.transformer."
TRAINED = Process(schedules.scaled_linear(0.00085, 0.012), Prediction.EPSILON)
LEADING = ("DDIMScheduler", "DDPMScheduler")
CLIPPING = (*LEADING, "HeunDiscreteScheduler", "LCMScheduler")
PLAIN = SamplingFacts(sampler="ddim", steps=50, offset=1, last="lowest")  # as the published scheduler files say


def fits(materials: Materials) -> bool:
    """One text encoder, and projections that are convolutions."""
    return (
        materials.kind("unet") == "UNet2DConditionModel"
        and materials.kind("text_encoder") == "CLIPTextModel"
        and not materials.config("unet", "use_linear_projection", False)
        and materials.config("unet", "addition_embed_type") is None
    )


def text(materials: Materials, dtype: torch.dtype) -> TextEncoder:
    return clip_text(materials, "text_encoder", dtype)


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    """Epsilon on the scaled-linear table unless the scheduler file or the user says otherwise."""
    process, sampling = corrected(materials, *published(materials, TRAINED, PLAIN, asked))
    told = materials.config("unet", "time_cond_proj_dim") is not None  # a latent consistency model
    if told:
        sampling = SamplingFacts(sampler="lcm", steps=4, from_image="all")
    return {
        "process": process,
        "sampling": sampling,
        "guidance": GuidanceFacts(dropout=0.1, distilled=told, embedded=told, scale=8.5 if told else 7.5),
        "size": side(materials, 512),
        **inpainting(materials),
    }


def corrected(materials: Materials, process: Process, sampling: SamplingFacts) -> tuple[Process, SamplingFacts]:
    """A scheduler file as the pipelines correct it: latents are never clipped, leading timesteps start at 1.

    A file silent about the start is corrected where its own scheduler is a leading one.
    """
    scheduler = materials.scheduler or {}
    kind = scheduler.get("_class_name")
    clip = {"clip": None} if kind in CLIPPING else {}
    offset = {"offset": 1} if "steps_offset" in scheduler or kind in LEADING else {}
    return process, sampling.model_copy(update={**clip, **offset})


def inpainting(materials: Materials) -> dict[str, Any]:
    """Nine input channels: the noisy latents, a mask, the masked picture's latents."""
    return {"inpaint": 1} if materials.config("unet", "in_channels") == 9 else {}


def original(shapes: Shapes) -> bool:
    projection = next((shape for name, shape in shapes.items() if name.endswith("1.proj_in.weight")), ())
    convolutional = UNET + "input_blocks.0.0.weight" in shapes and len(projection) == 4
    return convolutional and any(name.startswith(TEXT + "text_model.") for name in shapes)


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    return {
        "unet": unet_section(stated, heads=8),
        "vae": vae_section(),
        "text_encoder": clip_section(TEXT, "quick_gelu"),
    }


FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    pipeline=pipeline_of("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"),
    fits=fits,
    facts=facts,
    licence=lambda materials: "CreativeML OpenRAIL-M",
    text=text,
    original=Original(original, sections, ignored=IGNORED),
)
