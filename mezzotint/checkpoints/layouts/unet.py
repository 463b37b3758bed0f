"""The U-Nets of latent diffusion: Stable Diffusion 1, 2, XL and its refiner, and LDM with and without text."""

from __future__ import annotations

from typing import Any, Literal

from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.checkpoints.keymap import Entry, entry, nested
from mezzotint.checkpoints.layouts.adm import adm, adm_config
from mezzotint.checkpoints.layouts.guided import (
    EMBEDDINGS,
    ENDS,
    Levels,
    clock_widths,
    down,
    middle,
    read_levels,
    up,
)
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, only, size
from mezzotint.layers.stages import Stage

Vector = Literal["picture", "projection"]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER_BLOCK = (  # named alike in both layouts
    "norm1",
    *(f"attn1.{name}" for name in PROJECTIONS),
    "norm2",
    *(f"attn2.{name}" for name in PROJECTIONS),
    "norm3",
    "ff.net.0.proj",
    "ff.net.2",
)
PICTURE_WIDTHS = (2816, 2560)  # of the vector that SDXL and its refiner are told: pooled prompt and picture sizes
SIZE_WIDTH = 256  # of the sinusoid for each of those sizes
# LDMs with 1x1 convolutions and not 8 heads as Stable Diffusion 1: (width of the text, first width)
FEWER_HEADS: dict[tuple[int, int], dict[str, int]] = {
    (512, 192): {"heads": 1},  # ImageNet 256, version 2
    (512, 256): {"head_width": 32},  # ImageNet 256, first version
    (512, 128): {"head_width": 32},  # pictures from layouts
}


def unet(config: ConditionalUNetConfig | UNetConfig) -> list[Entry]:
    """The names of a latent diffusion U-Net, as they follow `model.diffusion_model.`.

    Those without text are named as guided diffusion's. What a distilled network is told about guidance
    (`time_embed.cond_proj`) has no original of its own; the name is ours.
    """
    if isinstance(config, UNetConfig):
        return adm(config)
    plan = config.plan()
    rows = [*told(config), *down(plan.down, transformer), *middle(plan.mid, transformer)]
    return [*rows, *up(plan.up, transformer), *ENDS]


def transformer(theirs: str, ours: str, stage: Stage) -> list[Entry]:
    """The rows of one spatial transformer."""
    names = [f"transformer_blocks.{block}.{name}" for block in range(stage.depth) for name in TRANSFORMER_BLOCK]
    return nested(theirs, ours, {name: name for name in ("norm", "proj_in", *names, "proj_out")})


def told(config: ConditionalUNetConfig) -> list[Entry]:
    """What a U-Net or a ControlNet is told in one vector: the clock, a class, the picture, the guidance scale."""
    rows = [*EMBEDDINGS]
    if config.time_cond_proj_dim is not None:
        rows.append(entry("time_embed.cond_proj", "time_embedding.cond_proj"))
    if config.class_embed_type is None and config.num_class_embeds is not None:
        rows.append(entry("label_emb", "class_embedding"))
    elif config.class_embed_type in ("timestep", "projection"):
        rows += nested("label_emb.0", "class_embedding", {"0": "linear_1", "2": "linear_2"})
    if config.addition_embed_type == "text_time":
        rows += nested("label_emb.0", "add_embedding", {"0": "linear_1", "2": "linear_2"})
    return rows


def unet_config(
    shapes: Shapes, *, heads: int | None = None, head_width: int | None = None, vector: Vector | None = None
) -> dict[str, Any]:
    """The configuration of a UNet2DConditionModel, or of a UNet2DModel, from an original file's names and shapes.

    Shapes cannot say: `heads` (as many at every level: 8 in Stable Diffusion 1 and text-to-image LDM) or `head_width`
    (64 in Stable Diffusion 2, XL and the refiner): neither takes 64 where the projections are linear and what was
    published where they are convolutions. `vector`: whether the vector is a pooled prompt with sizes of the `picture`
    (SDXL, taken at its widths 2816 and 2560) or a `projection` (unCLIP, taken at others). The size of the picture, the
    prediction and the schedule. For networks without text see `adm_config`.
    """
    if not any(".transformer_blocks." in name for name in shapes):
        return adm_config(shapes, heads=heads, head_width=head_width)
    levels = read_levels(shapes)
    return {
        "_class_name": "UNet2DConditionModel",
        "out_channels": size(shapes, "out.2.weight", 0),
        "up_block_types": levels.types("CrossAttnUpBlock2D", "UpBlock2D")[::-1],
        **encoder_config(shapes, levels, heads, head_width, vector),
    }


def encoder_config(
    shapes: Shapes, levels: Levels, heads: int | None, head_width: int | None, vector: Vector | None
) -> dict[str, Any]:
    """What the half down to the middle block says: a ControlNet has no other."""
    keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    context = only("widths of the text", {size(shapes, name, 1) for name in keys})
    linear = any(name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in shapes.items())
    return {
        "in_channels": size(shapes, "input_blocks.0.0.weight", 1),
        "block_out_channels": levels.widths,
        "layers_per_block": levels.layers,
        "down_block_types": levels.types("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": context,
        "transformer_layers_per_block": _depths(shapes, levels),
        "attention_head_dim": _heads(levels, context, linear, heads, head_width),
        "use_linear_projection": linear,
        **_vector(shapes, vector),
        **{key: value for key, value in clock_widths(shapes, levels.widths).items() if key == "time_embedding_dim"},
        **({"resnet_time_scale_shift": "scale_shift"} if levels.scale_shift else {}),
        **({"mid_block_type": "UNetMidBlock2D"} if "middle_block.1.norm.weight" not in shapes else {}),
    }


def _depths(shapes: Shapes, levels: Levels) -> int | tuple[int, ...]:
    """Transformer blocks in each attention: one number where all agree, else one a level (1 where there is none).

    The last level's number is also the middle block's.
    """
    starts = [1 + level * (levels.layers + 1) for level in range(len(levels.widths))]
    found = [counted(shapes, f"input_blocks.{start}.1.transformer_blocks.") for start in starts]
    deepest = counted(shapes, "middle_block.1.transformer_blocks.")
    if deepest:
        found[-1] = only("depths of the last level and the middle block", {deepest, found[-1] or deepest})
    used = {depth for depth in found if depth}
    return used.pop() if len(used) == 1 else tuple(depth or 1 for depth in found)


def _heads(
    levels: Levels, context: int, linear: bool, heads: int | None, head_width: int | None
) -> int | tuple[int, ...]:
    if heads is None and head_width is None:
        known = {"head_width": 64} if linear else FEWER_HEADS.get((context, levels.widths[0]), {"heads": 8})
        heads, head_width = known.get("heads"), known.get("head_width")
    if heads is not None:
        return heads
    return tuple(width // (head_width or width) for width in levels.widths)


def _vector(shapes: Shapes, vector: Vector | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "time_embed.cond_proj.weight" in shapes:
        found["time_cond_proj_dim"] = size(shapes, "time_embed.cond_proj.weight", 1)
    if "label_emb.weight" in shapes:
        found["num_class_embeds"] = size(shapes, "label_emb.weight", 0)
    if "label_emb.0.0.weight" not in shapes:
        return found
    width = size(shapes, "label_emb.0.0.weight", 1)
    picture = width in PICTURE_WIDTHS if vector is None else vector == "picture"
    kind = {"addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_WIDTH}
    return {
        **found,
        **(kind if picture else {"class_embed_type": "projection"}),
        "projection_class_embeddings_input_dim": width,
    }
