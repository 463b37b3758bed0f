"""What the latent diffusion families share: sections of their original files, sizes, what a scheduler file adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.checkpoints.keymap import Entry
from mezzotint.checkpoints.layouts.unet import unet, unet_config
from mezzotint.checkpoints.layouts.vae import vae, vae_config
from mezzotint.codec.kl_vae import KLVAEConfig
from mezzotint.codec.vq import VQConfig
from mezzotint.contract import SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.family import Asked
from mezzotint.families.materials import Materials, Section, Shapes
from mezzotint.families.scheduler import read_scheduler
from mezzotint.process import Discrete, Prediction, Process, RectifiedFlow, schedules

UNET, VAE = "model.diffusion_model.", "first_stage_model."

# Names in original files that carry no weights of the published model: tables of the schedule, averages, the loss.
IGNORED = (
    "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", "scale_factor",
    "model_ema.", "denoiser.", "global_step", "v_pred", "ztsnr", "edm_",
)  # fmt: skip
VAE_IGNORED = ("loss.", "model_ema.")
WORDS = {word.value: word for word in Prediction}  # in the headers of single files, ours and others'
WORDS |= {"eps": Prediction.EPSILON, "v": Prediction.VELOCITY, "v_prediction": Prediction.VELOCITY}


def unet_section(stated: Mapping[str, Any], heads: int | None = None, head_width: int | None = None) -> Section:
    """The conditional U-Net under its usual prefix; shapes do not tell heads from their width, so one is given.

    `stated`, a config.json beside the file, has the last word where it is a U-Net's.
    """
    known = stated if stated.get("_class_name") == "UNet2DConditionModel" else {}

    def infer(shapes: Shapes) -> dict[str, Any]:
        return unet_config(shapes, heads=heads, head_width=head_width) | dict(known)

    return Section(UNET, infer, lambda config: unet(ConditionalUNetConfig.from_config(config)))


def vae_section(scaling_factor: float | None = 0.18215, shift_factor: float | None = None) -> Section:
    """The convolutional autoencoder under its usual prefix, with the scale that only its family knows; None: 1 where
    there is a codebook, 0.18215 elsewhere.
    """

    def infer(shapes: Shapes) -> dict[str, Any]:
        return vae_config(shapes, scaling_factor=scaling_factor, shift_factor=shift_factor)

    def rows(config: Mapping[str, Any]) -> list[Entry]:
        kind = VQConfig if config["_class_name"] == "VQModel" else KLVAEConfig
        return vae(kind.from_config(config))

    return Section(VAE, infer, rows, VAE_IGNORED)


def published(
    materials: Materials, process: Process, sampling: SamplingFacts, asked: Asked, flow: RectifiedFlow | None = None
) -> tuple[Process, SamplingFacts]:
    """What the scheduler file says, the family's own facts where there is none; the user's word for the prediction.

    InputError where two of the user, the scheduler file and the weights' own file contradict each other.
    """
    if materials.scheduler is not None:
        process, found = read_scheduler(materials.scheduler, materials.scheduler_at or materials.path, flow)
        sampling = found.sampling(sampling.sampler, sampling.steps)
    elif "ztsnr" in materials.marks and isinstance(process.schedule, Discrete):
        process = Process(schedules.zero_terminal_snr(process.schedule), stated(materials) or Prediction.VELOCITY)
        sampling = sampling.model_copy(update={"spacing": "trailing", "offset": 0})
    words = [*told(materials, process).items()]
    for (at, said), (other, another) in pairwise(words):
        if said is not another:
            raise InputError(
                f"prediction is {said} in {at} but {another} in {other}: mend the wrong one, or move it away"
            )
    if asked.prediction and words and asked.prediction is not words[0][1]:
        at, said = words[0]
        raise InputError(
            f"prediction is {said} in {at}, but {asked.prediction} was asked for: leave it out, or mend the file"
        )
    return replace(process, prediction=asked.prediction or (words[0][1] if words else process.prediction)), sampling


def told(materials: Materials, process: Process) -> dict[Path, Prediction]:
    """The prediction by the files that say it: the scheduler file whose process is given, the weights' own."""
    words: dict[Path, Prediction] = {}
    if "prediction_type" in (materials.scheduler or {}):
        words[materials.scheduler_at or materials.path] = process.prediction
    own = stated(materials)
    return words if own is None else {**words, materials.path: own}


def stated(materials: Materials) -> Prediction | None:
    """The prediction that a single file states: by a flag among its tensors, or in its header."""
    if "v_pred" in materials.marks:
        return Prediction.VELOCITY
    return WORDS.get(materials.metadata.get("modelspec.prediction_type", ""))


def side(materials: Materials, usual: int, factor: int | None = None) -> tuple[int, int]:
    """Width and height in pixels of the training images: as a header says, or the sample size in latents."""
    said = re.fullmatch(r"(\d+)x(\d+)", materials.metadata.get("modelspec.resolution", ""))
    if said:
        return int(said[1]), int(said[2])
    sample = materials.config("unet", "sample_size") or materials.config("transformer", "sample_size")
    if sample is None or materials.layout == "single-file":
        return usual, usual
    height, width = (sample, sample) if isinstance(sample, int) else sample
    factor = factor or factor_of(materials)
    return width * factor, height * factor


def factor_of(materials: Materials) -> int:
    """How many pixels a latent pixel spans, by the levels of the autoencoder: 8 where there is none to ask."""
    levels = materials.config("vae", "block_out_channels", (0, 0, 0, 0))
    return 2 ** (len(levels) - 1)


def pipeline_of(plain: str, inpainting: str, consistency: str) -> Callable[[Materials], str]:
    """The class name of the pipeline that fits a U-Net: nine channels repaint, a guidance embedding is consistency."""

    def name(materials: Materials) -> str:
        if materials.config("unet", "time_cond_proj_dim") is not None:
            return consistency
        return inpainting if materials.config("unet", "in_channels") == 9 else plain

    return name
