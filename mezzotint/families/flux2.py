"""FLUX.2 (Black Forest Labs 2025): dev, and klein 4B and 9B, base and distilled.

Flux2Transformer2DModel on a rectified flow shifted by image size and steps, a 32-channel autoencoder folded 2x2 whose
batch-norm statistics are the latent space, and hidden states of an LLM: Mistral Small 3.2 (dev) or Qwen3 (klein).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mezzotint.backbones.flux2 import Flux2Config
from mezzotint.checkpoints.layouts.flux2 import flux2, flux2_config, flux2_vae, flux2_vae_config
from mezzotint.codec.flux2_vae import Flux2VAEConfig
from mezzotint.contract import GuidanceFacts, SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.family import Asked, Family, Question
from mezzotint.families.latent import published
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import flux2_text
from mezzotint.process import Prediction, Process, schedules

TRAINED = Process(schedules.flux2(), Prediction.FLOW)
PREFIX = "model.diffusion_model."
MOST = 1024**2  # pixels of a picture to look at
KEPT = "Flux2KleinKVPipeline"


def told(materials: Materials) -> bool:
    """dev is told the guidance scale, klein is not; files that do not say are dev's, as the class's default is."""
    return bool(materials.config("transformer", "guidance_embeds", True))


def cached(materials: Materials) -> bool:
    """klein 9B KV sees references at time 0 and apart from all else, so that their keys and values can be kept."""
    return materials.index.get("_class_name") == KEPT


def stated(materials: Materials) -> bool | None:
    """Whether a klein is distilled, as its folder's index or our own single file's header says."""
    if "is_distilled" in materials.index:
        return bool(materials.index["is_distilled"])
    return cached(materials) if "_class_name" in materials.index else None  # an index is silent at the default


def asks(materials: Materials) -> Question | None:
    """klein's base and distilled models are the same network: a folder says which it is, a single file does not."""
    if told(materials) or stated(materials) is not None:
        return None
    return Question(
        "distilled",
        "nothing says whether this is klein distilled (4 steps, no guidance) or klein base (50 steps, guidance 4): add "
        "--distilled yes or --distilled no",
    )


def distilled(materials: Materials, asked: Asked) -> bool:
    """Whether guidance was distilled so that few steps do; InputError where the user and a file contradict each other.

    False for dev, which is told its guidance and takes as many steps as a base model.
    """
    said = False if told(materials) else stated(materials)
    if asked.distilled is None or said is None or said is asked.distilled:
        return bool(said if asked.distilled is None else asked.distilled)
    what = "the base model" if not said else "distilled"
    what = "FLUX.2 dev, which has one kind" if told(materials) else f"klein, and its files say that it is {what}"
    raise InputError(f"{materials.path} is {what}: leave --distilled out, or mend the file")


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    quick = distilled(materials, asked)
    if told(materials):
        guidance = GuidanceFacts(distilled=True, embedded=True, scale=4.0)
    else:
        guidance = GuidanceFacts(distilled=True) if quick else GuidanceFacts(dropout=0.1, scale=4.0)
    plain = SamplingFacts(sampler="flow_euler", steps=4 if quick else 50)
    process, sampling = published(materials, TRAINED, plain, asked, schedules.flux2())
    return {
        "process": process,
        "sampling": sampling,
        "guidance": guidance,
        "size": (1024, 1024),
        "references": None if cached(materials) else MOST,
        "mask_cells": "any",  # it was never trained with masks: whatever the mask touches is repainted
    }


def licence(materials: Materials) -> str:
    """klein 4B is free; dev and klein 9B, told by their width, are not."""
    heads = int(materials.config("transformer", "num_attention_heads", 0))
    width = heads * int(materials.config("transformer", "attention_head_dim", 128))
    if told(materials):
        return "FLUX [dev] Non-Commercial License v2.0"
    return "Apache-2.0" if width <= 3072 else "FLUX Non-Commercial License"


def pipeline(materials: Materials) -> str:
    if told(materials):
        return "Flux2Pipeline"
    return KEPT if cached(materials) else "Flux2KleinPipeline"


def prefix(names: Iterable[str]) -> str:
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def original(shapes: Shapes) -> bool:
    return prefix(shapes) + "double_stream_modulation_img.lin.weight" in shapes


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    def infer(shapes: Shapes) -> dict[str, Any]:
        return flux2_config(shapes) | {"_class_name": "Flux2Transformer2DModel"}

    return {"transformer": Section(prefix(tensors), infer, lambda config: flux2(Flux2Config.from_config(config)))}


VAE_SECTION = Section(
    "",
    lambda shapes: flux2_vae_config(shapes) | {"_class_name": "AutoencoderKLFlux2"},
    lambda config: flux2_vae(Flux2VAEConfig.from_config(config)),
)
FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    pipeline=pipeline,
    fits=lambda materials: materials.kind("transformer") == "Flux2Transformer2DModel",
    facts=facts,
    licence=licence,
    backbone="transformer",
    text=flux2_text,
    original=Original(
        original, sections, companions={"vae": (("ae.safetensors", "flux2-vae.safetensors"), VAE_SECTION)}
    ),
    asks=asks,
    answers=("prediction", "distilled"),
    notes=lambda materials: (
        ("klein KV draws from text alone here: its way to see references is not built",) if cached(materials) else ()
    ),
)
