"""The published models by name, from their configurations alone: what their folders would say if they were here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mezzotint.backbones import published_unets as unets
from mezzotint.backbones.flux2_config import flux2_dev, klein_4b, klein_9b
from mezzotint.backbones.mmdit import sd3_medium, sd35_large, sd35_medium
from mezzotint.backbones.presets import dit
from mezzotint.codec.flux2_vae import Flux2VAEConfig
from mezzotint.codec.kl_vae import KLVAEConfig
from mezzotint.codec.vq import VQConfig
from mezzotint.errors import InputError
from mezzotint.families.family import Family
from mezzotint.families.materials import Material, Materials
from mezzotint.families.registry import FAMILIES
from mezzotint.layers.config import write_config

DOWN, UP = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768,
    "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_H = CLIP_L | {  # without the layer behind the one that is read, as the published folder stores it
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 1024, "num_hidden_layers": 23,
    "num_attention_heads": 16, "hidden_act": "gelu",
}  # fmt: skip
CLIP_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
    "projection_dim": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu",
}  # fmt: skip
CLIP_L_PROJECTED = CLIP_L | {"architectures": ["CLIPTextModelWithProjection"]}
T5_XXL: dict[str, Any] = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64,
    "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
MISTRAL: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "sliding_window": None,
    },
}  # fmt: skip
BERT: dict[str, Any] = {"architectures": ["LDMBertModel"], "model_type": "ldmbert"}
# Levels of noise that a folder's scheduler file states where names and shapes do not.
VELOCITY = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "prediction_type": "v_prediction", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
EULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A published model: its family, its parts and what its other files say."""

    family: str
    backbone: tuple[str, Callable[[], Any]]  # published class name, configuration
    codec: tuple[str, Callable[[], Any]] | None = None
    text: Mapping[str, Mapping[str, Any]] | None = None  # folder: config.json
    index: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None


def _kl(channels: int, widths: tuple[int, ...] = (128, 256, 512, 512), **more: Any) -> KLVAEConfig:
    levels = len(widths)
    return KLVAEConfig(
        down_block_types=DOWN * levels, up_block_types=UP * levels, block_out_channels=widths, layers_per_block=2,
        latent_channels=channels, **more,
    )  # fmt: skip


def _vq_f4() -> VQConfig:
    return VQConfig(
        down_block_types=DOWN * 3, up_block_types=UP * 3, block_out_channels=(128, 256, 512), layers_per_block=2,
        latent_channels=3, num_vq_embeddings=8192, vq_embed_dim=3,
    )  # fmt: skip


F8 = ("AutoencoderKL", partial(_kl, 4))
F8_XL = ("AutoencoderKL", partial(_kl, 4, scaling_factor=0.13025))
F8_3 = (
    "AutoencoderKL",
    partial(_kl, 16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
)  # fmt: skip
EARLY = 0.18215  # the scale of Stable Diffusion 1 and 2
VQ_F4, FLUX_VAE = ("VQModel", _vq_f4), ("AutoencoderKLFlux2", Flux2VAEConfig)
PLAIN, GUIDED = "UNet2DModel", "UNet2DConditionModel"
SD3_TEXT = {"text_encoder": CLIP_L_PROJECTED, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
XL_TEXT = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
KLEIN: dict[bool, dict[str, Any]] = {
    quick: {"_class_name": "Flux2KleinPipeline", "is_distilled": quick} for quick in (True, False)
}


def _sd3(config: Callable[[], Any]) -> Entry:
    return Entry("sd35", ("SD3Transformer2DModel", config), F8_3, SD3_TEXT)


def _klein(config: Callable[[], Any], encoder: Mapping[str, Any], distilled: bool) -> Entry:
    return Entry(
        "flux2", ("Flux2Transformer2DModel", config), FLUX_VAE, {"text_encoder": encoder}, KLEIN[distilled]
    )  # fmt: skip


def _dit(name: str, side: int) -> Entry:
    return Entry("dit", ("DiTTransformer2DModel", partial(dit, name, 4, 8, 1000, side)), F8)


def _pixels(config: Callable[[], Any]) -> Entry:
    return Entry("ddpm", (PLAIN, config))


ZOO: dict[str, Entry] = {
    "sd1.5": Entry("sd1", (GUIDED, unets.sd1), F8, {"text_encoder": CLIP_L}),
    "sd2.1": Entry("sd2", (GUIDED, unets.sd2), F8, {"text_encoder": CLIP_H}, scheduler=VELOCITY),
    "sd2.1-base": Entry("sd2", (GUIDED, partial(unets.sd2, sample_size=64)), F8, {"text_encoder": CLIP_H}),
    "sdxl": Entry("sdxl", (GUIDED, unets.sdxl), F8_XL, XL_TEXT, scheduler=EULER),
    "sdxl-refiner": Entry("sdxl-refiner", (GUIDED, unets.sdxl_refiner), F8_XL, {"text_encoder_2": CLIP_G},
                          {"force_zeros_for_empty_prompt": False}, EULER),
    "lcm-sd1.5": Entry("sd1", (GUIDED, unets.lcm_sd1), F8, {"text_encoder": CLIP_L}),
    "lcm-sdxl": Entry("sdxl", (GUIDED, unets.lcm_sdxl), F8_XL, XL_TEXT),
    "sd3-medium": _sd3(sd3_medium),
    "sd3.5-medium": _sd3(sd35_medium),
    "sd3.5-large": _sd3(sd35_large),
    "flux2-dev": Entry("flux2", ("Flux2Transformer2DModel", flux2_dev), FLUX_VAE, {"text_encoder": MISTRAL}),
    "flux2-klein-4b": _klein(klein_4b, QWEN3_4B, True),
    "flux2-klein-4b-base": _klein(klein_4b, QWEN3_4B, False),
    "flux2-klein-9b": _klein(klein_9b, QWEN3_8B, True),
    "flux2-klein-9b-base": _klein(klein_9b, QWEN3_8B, False),
    "dit-s/2": _dit("S/2", 32),
    "dit-b/2": _dit("B/2", 32),
    "dit-l/2": _dit("L/2", 32),
    "dit-xl/2": _dit("XL/2", 32),
    "dit-xl/2-512": _dit("XL/2", 64),
    "ldm-4": Entry("ldm", (PLAIN, unets.ldm4_uncond), VQ_F4),
    "ldm-4-classes": Entry("ldm-classes", ("ClassTokens", unets.ldm4_cin256), VQ_F4),
    "ldm-8-churches": Entry("ldm", (PLAIN, unets.ldm8_churches), F8),
    "ldm-8-text": Entry("ldm-text", (GUIDED, unets.ldm8_text2img), F8, {"text_encoder": BERT}),
    "ddpm-cifar10": _pixels(unets.ddpm_cifar10),
    "ddpm-256": _pixels(unets.ddpm_256),
    "iddpm-cifar10": _pixels(unets.iddpm_cifar10),
    "iddpm-imagenet64": _pixels(unets.iddpm_imagenet64),
    "iddpm-imagenet64-classes": _pixels(partial(unets.iddpm_imagenet64, 1000)),
    "iddpm-lsun256": _pixels(unets.iddpm_lsun256),
    "adm-64": _pixels(unets.adm_64),
    "adm-128": _pixels(unets.adm_128),
    "adm-256": _pixels(unets.adm_256),
    "adm-512": _pixels(unets.adm_512),
}  # fmt: skip


def find(name: str) -> tuple[Family, Materials]:
    """The family and the parts of a published model; InputError lists the known names and the nearest one."""
    key = name.lower().replace("_", "-")
    if key not in ZOO:
        near = difflib.get_close_matches(key, ZOO, n=1, cutoff=0.5)
        meant = f" (did you mean '{near[0]}'?)" if near else ""
        raise InputError(
            f"'{name}' is no file or folder here, and no published model of that name is known{meant}.\n"
            f"Known: {', '.join(ZOO)}."
        )
    return gathered(ZOO[key], Path(key))


def gathered(entry: Entry, at: Path) -> tuple[Family, Materials]:
    """The family of an entry and its parts, as if they had been found at a path."""
    family = FAMILIES[entry.family]
    parts = {family.backbone: _config(*entry.backbone)}
    if entry.codec:
        parts[family.codec] = _config(*entry.codec)
    parts |= dict(entry.text or {})
    materials = {part: Material(config, at, _nothing, dict) for part, config in parts.items()}
    scheduler_at = None if entry.scheduler is None else at
    return family, Materials(at, "diffusers", materials, {}, entry.scheduler, scheduler_at, entry.index or {})


def _config(kind: str, make: Callable[[], Any]) -> dict[str, Any]:
    config = make()
    if kind == "ClassTokens":
        return {"_class_name": kind, "unet": write_config(config.unet, GUIDED), "classes": config.classes}
    written = cast("dict[str, Any]", write_config(config, kind))
    if kind == "AutoencoderKL":  # the early files do not say whether it overflows in half precision
        written.pop("force_upcast", None)
        written |= {} if config.scaling_factor == EARLY else {"force_upcast": True}
    return written


def _nothing() -> dict[str, Tensor]:
    raise InputError("a published model's configuration alone is known here: no weights to read")
