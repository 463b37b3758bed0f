"""DDPM (Ho et al. 2020), improved DDPM (Nichol & Dhariwal 2021), ADM (Dhariwal & Nichol 2021): U-Nets on pixels.

Original files hold the U-Net alone and say nothing of the process; what was published under each shape is listed here.
For other shapes config.json and scheduler_config.json beside the file must say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.keymap import Entry
from mezzotint.checkpoints.layouts.adm import PUBLISHED as HEADS
from mezzotint.checkpoints.layouts.adm import adm, adm_config
from mezzotint.checkpoints.layouts.ddpm import ddpm, ddpm_config
from mezzotint.checkpoints.layouts.guided import read_levels
from mezzotint.contract import ClassFacts, GuidanceFacts, SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import published
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.process import Discrete, Prediction, Process, schedules

HO = SamplingFacts(sampler="ddpm", steps=1000, variance="large", clip=1.0)
LEARNED = SamplingFacts(sampler="ddpm", steps=250, clip=1.0)
QUICKER = 50  # steps where a scheduler file names another sampler than DDPM

# What config.json may say beside the published class's options. How rows of q, k and v are stacked: legacy or new; and
# whether the network is told timesteps as if there were 1000 (`rescale_timesteps` of improved diffusion).
ORDER, RESCALED = "_qkv_order", "_rescale_timesteps"


@dataclass(frozen=True, slots=True)
class Known:
    """What was published under a shape: the side of its pictures, its schedule, whether timesteps are rescaled."""

    side: int
    schedule: Discrete
    rescaled: bool = False


# (widths, how resolution changes: in residual blocks or by convolutions)
PUBLISHED = {
    ((192, 384, 576, 768), "resnet"): Known(64, schedules.cosine()),  # ADM
    ((256, 256, 512, 768, 1024), "resnet"): Known(128, schedules.linear()),
    ((256, 256, 512, 512, 1024, 1024), "resnet"): Known(256, schedules.linear()),
    ((128, 256, 256, 512, 512, 1024, 1024), "resnet"): Known(512, schedules.linear()),
    ((128, 256, 256, 256), "conv"): Known(32, schedules.cosine(4000), rescaled=True),  # improved DDPM
    ((128, 256, 384, 512), "conv"): Known(64, schedules.cosine(4000), rescaled=True),
    ((192, 384, 576, 768), "conv"): Known(64, schedules.cosine(4000)),
    ((128, 128, 256, 256, 512, 512), "conv"): Known(256, schedules.linear()),
}
PORTED = {  # Ho's networks, whose schedule is one and the same
    (128, 256, 256, 256): Known(32, schedules.linear()),
    (128, 128, 256, 256, 512, 512): Known(256, schedules.linear()),
}


def known(backbone: Mapping[str, Any]) -> Known | None:
    """What was published under a network's shape."""
    widths = tuple(backbone.get("block_out_channels", ()))
    if backbone.get("freq_shift") == 1:
        return PORTED.get(widths)
    return PUBLISHED.get((widths, backbone.get("downsample_type", "conv")))


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    """From the scheduler file, else by shape; twice the channels out mean a learned variance."""
    backbone = materials.parts["unet"].config
    learned = backbone.get("out_channels", 3) == 2 * backbone.get("in_channels", 3)
    found, widths = known(backbone), tuple(backbone.get("block_out_channels", ()))
    if found is None and materials.scheduler is None:
        raise InputError(
            f"{materials.path}: no network of widths {widths} was published, so its schedule is not known: "
            f"put its scheduler_config.json beside it"
        )
    if backbone.get("sample_size") is None:
        raise InputError(f"{materials.path}: nothing says how large its pictures are: put sample_size in config.json")
    process = Process(found.schedule if found else schedules.linear(), Prediction.EPSILON)
    process, sampling = published(materials, process, LEARNED if learned else HO, asked)
    if sampling.sampler != "ddpm":
        sampling = sampling.model_copy(update={"steps": QUICKER})
    if backbone.get(RESCALED) and isinstance(process.schedule, Discrete):
        process = replace(process, schedule=replace(process.schedule, tick=1000 / process.schedule.timesteps))
    count = backbone.get("num_class_embeds")
    return {
        "process": process,
        "sampling": sampling,
        "size": square(backbone["sample_size"]),
        "variance": "learned" if learned else "fixed",
        "classes": ClassFacts(names=tuple(map(str, range(count)))) if count else None,
        "guidance": GuidanceFacts(),  # never trained without its classes
    }


def square(sample: int | list[int] | tuple[int, int], factor: int = 1) -> tuple[int, int]:
    """Width and height in pixels of a `sample_size`, which is one number or height and width, in latents."""
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return width * factor, height * factor


def ported(shapes: Shapes) -> bool:
    return "temb.dense.0.weight" in shapes


def original(shapes: Shapes) -> bool:
    return ported(shapes) or ("time_embed.0.weight" in shapes and "input_blocks.0.0.weight" in shapes)


def plain_config(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet2DModel's configuration from improved diffusion's names, and from what config.json beside them states.

    Shapes do not show heads. A shape that was published has its own; of another, config.json must tell them.
    """
    told = stated if stated.get("_class_name", "UNet2DModel") == "UNet2DModel" else {}
    own = {"num_attention_heads", "attention_head_dim"} & told.keys()
    if own or not any(name.endswith(".qkv.weight") for name in shapes):
        found = adm_config(shapes, heads=1)
        del found["num_attention_heads"]
        return found | dict(told)
    levels = read_levels(shapes)
    if (levels.widths, levels.residual) not in HEADS:
        raise InputError(
            f"no network of widths {levels.widths} was published, and shapes do not show its heads. Put a config.json "
            f"beside it with attention_head_dim or num_attention_heads, sample_size and, if new, {ORDER}"
        )
    return adm_config(shapes) | dict(told)


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    def infer(shapes: Shapes) -> dict[str, Any]:
        found = ddpm_config(shapes) | dict(stated) if ported(shapes) else plain_config(shapes, stated)
        shape = known(found)
        if shape:
            found = {"sample_size": shape.side, **({RESCALED: True} if shape.rescaled else {})} | found
        return found

    def rows(config: Mapping[str, Any]) -> list[Entry]:
        network, order = UNetConfig.from_config(config), config.get(ORDER)
        if order not in (None, "legacy", "new"):
            raise InputError(f"'{ORDER}' = {order!r} in config.json is neither legacy nor new")
        return ddpm(network) if network.freq_shift == 1 else adm(network, order)

    return {"unet": Section("", infer, rows)}


def licence(materials: Materials) -> str:
    """The authors' own files of improved diffusion and ADM are MIT; other files do not say."""
    backbone = materials.parts["unet"].config
    theirs = materials.layout == "single-file" and backbone.get("freq_shift") != 1 and known(backbone) is not None
    return "MIT" if theirs else "not stated"


FAMILY = Family(
    name="ddpm",
    title="DDPM, improved DDPM or ADM",
    pipeline=lambda materials: "DDPMPipeline",
    fits=lambda materials: materials.kind("unet") == "UNet2DModel" and "vae" not in materials.parts,
    facts=facts,
    licence=licence,
    codec="",
    original=Original(original, sections),
)
