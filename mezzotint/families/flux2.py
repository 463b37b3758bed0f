"""FLUX.2 (Black Forest Labs 2025): dev, and klein 4B and 9B, base and distilled.

Flux2Transformer2DModel on a rectified flow shifted by image size and steps, a 32-channel autoencoder folded 2x2 whose
batch-norm statistics are the latent space, and hidden states of an LLM: Mistral Small 3.2 (dev) or Qwen3 (klein).
"""

from __future__ import annotations

from typing import Any

from mezzotint.backbones.flux2 import Flux2Config
from mezzotint.checkpoints.layouts.flux2 import flux2, flux2_config, flux2_vae, flux2_vae_config
from mezzotint.codec.flux2_vae import Flux2VAEConfig
from mezzotint.contract import GuidanceFacts, SamplingFacts
from mezzotint.families.family import Asked, Family
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.families.prompts import flux2_text
from mezzotint.process import Prediction, Process, schedules

TRAINED = Process(schedules.flux2(), Prediction.FLOW)
PREFIX = "model.diffusion_model."
WIDTHS = {3072: "4B", 4096: "9B"}  # of klein


def told(materials: Materials) -> bool:
    """dev is told the guidance scale; klein is not. Files that do not say are dev's (the class's default)."""
    return bool(materials.config("transformer", "guidance_embeds", True))
