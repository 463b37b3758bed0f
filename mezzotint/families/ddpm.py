"""DDPM (Ho et al. 2020), improved DDPM (Nichol & Dhariwal 2021), ADM (Dhariwal & Nichol 2021): U-Nets on pixels.

Original files hold the U-Net alone and say nothing of the process; what was published under each shape is listed here.
For other shapes config.json and scheduler_config.json beside the file must say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.keymap import Entry
from mezzotint.checkpoints.layouts.adm import adm, adm_config
from mezzotint.checkpoints.layouts.ddpm import ddpm, ddpm_config
from mezzotint.contract import ClassFacts, GuidanceFacts, SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import published
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.process import Discrete, Prediction, Process, schedules

HO = Process(schedules.linear(), Prediction.EPSILON)
HO_SAMPLING = SamplingFacts(sampler="ddpm", steps=1000, variance="large", clip=1.0)
IMPROVED = SamplingFacts(sampler="ddpm", steps=250, clip=1.0)


def improved(betas: str, rescaled: bool) -> Discrete:
    """4000 steps; linear ends scale with 1000 / T, and so does what the network is told, where it was trained so."""
    tick = 0.25 if rescaled else 1.0
    if betas == "cosine":
        return Discrete("cosine", 0.0, 0.999, 4000, tick=tick)
    return Discrete("linear", 1e-4 / 4, 0.02 / 4, 4000, tick=tick)


@dataclass(frozen=True, slots=True)
class Known:
    """What was published under a shape: the side of its pictures, and its schedule."""

    side: int
    schedule: Discrete


# (widths, whether resolution changes in residual blocks, attention in the ADM or the plain order of blocks)
PUBLISHED = {
    ((192, 384, 576, 768), "resnet"): Known(64, schedules.cosine()),  # ADM
    ((256, 256, 512, 768, 1024), "resnet"): Known(128, schedules.linear()),
    ((256, 256, 512, 512, 1024, 1024), "resnet"): Known(256, schedules.linear()),
    ((128, 256, 256, 512, 512, 1024, 1024), "resnet"): Known(512, schedules.linear()),
    ((128, 256, 256, 256), "conv"): Known(32, improved("cosine", True)),  # improved DDPM
    ((128, 256, 384, 512), "conv"): Known(64, improved("cosine", True)),
    ((192, 384, 576, 768), "conv"): Known(64, improved("cosine", False)),
    ((128, 128, 256, 256, 512, 512), "conv"): Known(256, improved("linear", False)),
}
HO_SIDES = {(128, 256, 256, 256): 32, (128, 128, 256, 256, 512, 512): 256}


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    """From the scheduler file, else by shape; twice the channels out mean a learned variance."""
    backbone = materials.parts["unet"].config
    learned = backbone.get("out_channels", 3) == 2 * backbone.get("in_channels", 3)
    widths = tuple(backbone["block_out_channels"])
    port = backbone.get("freq_shift") == 1  # the port of Ho's networks
    process, sampling = HO, HO_SAMPLING
    sides = [HO_SIDES[widths]] if port and widths in HO_SIDES else []
    if not port:
        known = PUBLISHED.get((widths, backbone.get("downsample_type", "conv")))
        if known is None and materials.scheduler is None:
            raise InputError(
                f"{materials.path}: no network of these widths {widths} was published, so its schedule is not known. "
                f"Put its scheduler_config.json (and config.json with sample_size) beside it"
            )
        sampling = IMPROVED if learned else HO_SAMPLING
        if known:
            process, sides = Process(known.schedule, Prediction.EPSILON), [known.side]
    process, sampling = published(materials, process, sampling, asked)
    count = backbone.get("num_class_embeds")
    return {
        "process": process,
        "sampling": sampling,
        "size": square(backbone.get("sample_size"), sides, materials),
        "variance": "learned" if learned else "fixed",
        "classes": ClassFacts(names=tuple(map(str, range(count)))) if count else None,
        "guidance": GuidanceFacts(),  # never trained without its classes
    }


def square(sample: int | list[int] | None, sides: list[int], materials: Materials) -> tuple[int, int]:
    """Width and height from the configuration, else what was published."""
    if sample is None and not sides:
        raise InputError(
            f"{materials.path}: nothing says how large its pictures are: put a config.json with sample_size"
        )
    height, width = (sample or sides[0],) * 2 if not isinstance(sample, (list, tuple)) else sample
    return int(width), int(height)


def ported(shapes: Shapes) -> bool:
    return "temb.dense.0.weight" in shapes


def original(shapes: Shapes) -> bool:
    return ported(shapes) or ("time_embed.0.weight" in shapes and "input_blocks.0.0.weight" in shapes)


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    """`stated` is the config.json beside the file; its `_qkv_order` says how q, k and v are stacked, legacy or new."""

    def infer(shapes: Shapes) -> dict[str, Any]:
        if ported(shapes):
            return ddpm_config(shapes) | dict(stated)
        unknown = {"heads": 1} if stated else {}  # a shape that was never published: the file beside it says
        return adm_config(shapes, **unknown) | dict(stated)

    def rows(config: Mapping[str, Any]) -> list[Entry]:
        network = UNetConfig.from_config(config)
        return ddpm(network) if network.freq_shift == 1 else adm(network, config.get("_qkv_order"))

    return {"unet": Section("", infer, rows)}


FAMILY = Family(
    name="ddpm",
    title="DDPM, improved DDPM or ADM",
    pipeline=lambda materials: "DDPMPipeline",
    fits=lambda materials: materials.kind("unet") == "UNet2DModel" and "vae" not in materials.parts,
    facts=facts,
    licence=lambda materials: "MIT" if materials.parts["unet"].config.get("freq_shift") != 1 else "not stated",
    codec="",
    original=Original(original, sections),
)
