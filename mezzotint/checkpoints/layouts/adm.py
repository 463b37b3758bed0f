"""Improved diffusion, guided diffusion (ADM) and unconditional latent diffusion: bare U-Nets with pixel attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.keymap import Entry, Fused, HeadFused, Pointwise, entry
from mezzotint.checkpoints.layouts.guided import EMBEDDINGS, ENDS, clock_widths, down, middle, read_levels, up
from mezzotint.checkpoints.layouts.shapes import Shapes, size
from mezzotint.errors import InputError
from mezzotint.layers.stages import Stage

Order = Literal["legacy", "new"]


@dataclass(frozen=True, slots=True)
class Published:
    """What shapes cannot say about attention: how many heads, or how wide they are, and how q, k and v are stacked."""

    heads: int | None = None
    head_width: int | None = None
    order: Order = "legacy"


# (widths, whether the resolution changes in residual blocks): the same for every published file of that shape
PUBLISHED = {
    ((192, 384, 576, 768), True): Published(head_width=64, order="new"),  # ADM 64
    ((256, 256, 512, 768, 1024), True): Published(heads=4),  # ADM 128
    ((256, 256, 512, 512, 1024, 1024), True): Published(head_width=64),  # ADM 256
    ((128, 256, 256, 512, 512, 1024, 1024), True): Published(head_width=64),  # ADM 512
    ((192, 192, 384, 384, 768, 768), True): Published(heads=4),  # ADM 64 to 256
    ((96, 192, 192, 384, 384, 768, 768), True): Published(head_width=64),  # ADM 128 to 512
    ((128, 256, 256, 256), False): Published(heads=4),  # improved diffusion, CIFAR-10
    ((128, 256, 384, 512), False): Published(heads=4),  # improved diffusion, ImageNet 64
    ((192, 384, 576, 768), False): Published(heads=4),  # improved diffusion, ImageNet 64 by class
    ((128, 128, 256, 256, 512, 512), False): Published(heads=1),  # improved diffusion, LSUN 256
    ((192, 192, 384, 384, 768, 768), False): Published(heads=4),  # improved diffusion, 64 to 256
    ((224, 448, 672, 896), False): Published(head_width=32),  # LDM-4 faces and bedrooms
    ((192, 384, 384, 768, 768), True): Published(heads=8),  # LDM-8 churches
    ((160, 320, 320, 640), False): Published(head_width=32),  # LDM super-resolution
    ((256, 512, 768, 1024), True): Published(heads=8),  # LDM inpainting
    ((128, 512, 1024), False): Published(heads=8),  # LDM from segmentations
}
ATTENTION_GROUPS = 32  # every norm of these networks has 32 groups, which shapes do not show


def adm(config: UNetConfig, order: Order | None = None) -> list[Entry]:
    """The names of improved and guided diffusion, and of unconditional latent diffusion, for a UNet2DModel.

    q, k and v are one convolution of kernel 1 over one axis. Its rows are (heads, 3, width) in the `legacy` order and
    (3, heads, width) in the `new` one, and no shape tells them apart; None takes what was published at these widths,
    legacy for all but ADM 64.
    """
    plan = config.plan()
    if order is None:
        known = PUBLISHED.get((config.block_out_channels, any(stage.residual_resample for stage in plan.down[:-1])))
        order = known.order if known else "legacy"
    attention = partial(_attention, order)
    rows = [*EMBEDDINGS, *down(plan.down, attention), *middle(plan.mid, attention), *up(plan.up, attention), *ENDS]
    return [*rows, entry("label_emb", "class_embedding")] if config.num_class_embeds is not None else rows


def _attention(order: Order, theirs: str, ours: str, stage: Stage) -> list[Entry]:
    projections = [f"{ours}.to_{part}" for part in "qkv"]
    fused = HeadFused(stage.heads, axes=1) if order == "legacy" else Fused((1, 1, 1), axes=1)
    return [
        entry(f"{theirs}.norm", f"{ours}.group_norm"),
        entry(f"{theirs}.qkv", *projections, change=fused),
        entry(f"{theirs}.proj_out", f"{ours}.to_out.0", change=Pointwise(1)),
    ]


def adm_config(shapes: Shapes, *, heads: int | None = None, head_width: int | None = None) -> dict[str, Any]:
    """A UNet2DModel's configuration from an original file's names and shapes.

    Shapes cannot say: `heads` (as many at every level: 4 in improved diffusion but 1 for LSUN, 4 in ADM 128, 8 in LDM
    churches) or `head_width` (64 in ADM 64, 256 and 512, 32 in LDM-4): neither takes what was published at these
    widths, InputError where nothing was; the order of q, k and v (see `adm`); how many groups a norm has (32 in all of
    them); the size of the picture, dropout, the prediction and the schedule.
    """
    levels = read_levels(shapes)
    if heads is None and head_width is None:
        known = PUBLISHED.get((levels.widths, levels.residual))
        if known is None:
            raise InputError(
                f"no U-Net of widths {levels.widths} was published, and shapes do not show how many heads its "
                f"attention has; say so in a config.json beside it"
            )
        heads, head_width = known.heads, known.head_width
    plain_down, plain_up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if levels.residual else ("DownBlock2D", "UpBlock2D")
    )
    resampling = {"downsample_type": "resnet", "upsample_type": "resnet"} if levels.residual else {}
    norms = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": ATTENTION_GROUPS}
    return {
        "_class_name": "UNet2DModel",
        "in_channels": size(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": size(shapes, "out.2.weight", 0),
        "block_out_channels": levels.widths,
        "layers_per_block": levels.layers,
        "down_block_types": levels.types("AttnDownBlock2D", plain_down),
        "up_block_types": levels.types("AttnUpBlock2D", plain_up)[::-1],
        "attention_head_dim": head_width,
        **({"num_attention_heads": heads} if heads is not None else {}),
        **({"add_attention": False} if "middle_block.1.norm.weight" not in shapes else {}),
        **({"num_class_embeds": size(shapes, "label_emb.weight", 0)} if "label_emb.weight" in shapes else {}),
        **(norms if levels.scale_shift else {}),
        **resampling,
        **clock_widths(shapes, levels.widths),
    }
