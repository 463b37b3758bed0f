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
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import published
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import flux2_text
from mezzotint.process import Prediction, Process, schedules

TRAINED = Process(schedules.flux2(), Prediction.FLOW)
PREFIX = "model.diffusion_model."
MOST = 1024**2  # pixels of a picture to look at


def told(materials: Materials) -> bool:
    """dev is told the guidance scale, klein is not; files that do not say are dev's, as the class's default is."""
    return bool(materials.config("transformer", "guidance_embeds", True))


def asks(materials: Materials) -> str | None:
    """klein's base and distilled models are the same network: a folder says which it is, a single file does not."""
    if told(materials) or materials.layout == "diffusers" or "is_distilled" in materials.index:
        return None
    return (
        "the file does not say whether this is klein distilled (4 steps, no guidance) or klein base (50 steps, "
        "guidance 4): add --distilled yes or --distilled no"
    )


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    distilled = asked.distilled if asked.distilled is not None else bool(materials.index.get("is_distilled", False))
    if told(materials):
        guidance = GuidanceFacts(distilled=True, embedded=True, scale=4.0)
    else:
        guidance = GuidanceFacts(distilled=True) if distilled else GuidanceFacts(dropout=0.1, scale=4.0)
    steps = 4 if distilled and not told(materials) else 50
    plain = SamplingFacts(sampler="flow_euler", steps=steps)
    process, sampling = published(materials, TRAINED, plain, asked, schedules.flux2())
    return {
        "process": process,
        "sampling": sampling,
        "guidance": guidance,
        "size": (1024, 1024),
        "references": MOST,
    }


def licence(materials: Materials) -> str:
    """klein 4B is free; dev and klein 9B, told by their width, are not."""
    heads = int(materials.config("transformer", "num_attention_heads", 0))
    width = heads * int(materials.config("transformer", "attention_head_dim", 128))
    if told(materials):
        return "FLUX [dev] Non-Commercial License v2.0"
    return "Apache-2.0" if width <= 3072 else "FLUX Non-Commercial License"


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
    pipeline=lambda materials: "Flux2Pipeline" if told(materials) else "Flux2KleinPipeline",
    fits=lambda materials: materials.kind("transformer") == "Flux2Transformer2DModel",
    facts=facts,
    licence=licence,
    backbone="transformer",
    text=flux2_text,
    original=Original(
        original, sections, companions={"vae": (("ae.safetensors", "flux2-vae.safetensors"), VAE_SECTION)}
    ),
    asks=asks,
)
