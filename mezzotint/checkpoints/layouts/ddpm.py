"""The PyTorch port of Ho et al.'s DDPM, whose names the autoencoders of latent diffusion took over."""

from __future__ import annotations

from typing import Any

from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.keymap import Entry, Pointwise, entry, nested
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, only, size
from mezzotint.layers.stages import Attend

RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def ddpm(config: UNetConfig) -> list[Entry]:
    """The names of the DDPM port (`down.0.block.0.conv1`, `mid.attn_1.q`) for a UNet2DModel.

    Levels count from the finest on both ways; projections of attention are 1x1 convolutions.
    """
    plan = config.plan()
    rows = nested("temb.dense", "time_embedding", {"0": "linear_1", "1": "linear_2"})
    rows += [entry("conv_in", "conv_in"), entry("norm_out", "conv_norm_out"), entry("conv_out", "conv_out")]
    count = len(plan.down)
    for index, stage in enumerate(plan.down):
        rows += level(f"down.{index}", f"down_blocks.{index}", stage.layers, stage.attend is not Attend.NONE)
        rows.append(entry(f"down.{index}.downsample.conv", f"down_blocks.{index}.downsamplers.0.conv"))
    for index, stage in enumerate(plan.up):
        theirs = f"up.{count - 1 - index}"
        rows += level(theirs, f"up_blocks.{index}", stage.layers, stage.attend is not Attend.NONE)
        rows.append(entry(f"{theirs}.upsample.conv", f"up_blocks.{index}.upsamplers.0.conv"))
    return rows + middle("mid", "mid_block")


def level(theirs: str, ours: str, layers: int, attends: bool) -> list[Entry]:
    """The residual blocks of one resolution, and the attention behind each."""
    rows: list[Entry] = []
    for layer in range(layers):
        rows += nested(f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}", RESIDUAL)
        if attends:
            rows += attention(f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}")
    return rows


def middle(theirs: str, ours: str) -> list[Entry]:
    """Two residual blocks with attention between them."""
    return [
        *nested(f"{theirs}.block_1", f"{ours}.resnets.0", RESIDUAL),
        *attention(f"{theirs}.attn_1", f"{ours}.attentions.0"),
        *nested(f"{theirs}.block_2", f"{ours}.resnets.1", RESIDUAL),
    ]


def attention(theirs: str, ours: str) -> list[Entry]:
    """One head of attention over pixels, its projections 1x1 convolutions."""
    projections = nested(theirs, ours, PROJECTIONS, Pointwise(2))
    return [entry(f"{theirs}.norm", f"{ours}.group_norm"), *projections]


def ddpm_config(shapes: Shapes) -> dict[str, Any]:
    """A UNet2DModel's configuration from the names and shapes of the DDPM port.

    The rest is the port's own and the same in all its files: one head, sines before cosines (`freq_shift` 1),
    convolutions that halve with zeros at the far edges only, norms with epsilon 1e-6 and 32 groups. Shapes cannot say
    the size of the picture, dropout or the schedule.
    """
    count = counted(shapes, "down.")
    layers = only("numbers of residual blocks", {counted(shapes, f"down.{index}.block.") for index in range(count)})
    attends = [f"down.{index}.attn.0.q.weight" in shapes for index in range(count)]
    return {
        "_class_name": "UNet2DModel",
        "in_channels": size(shapes, "conv_in.weight", 1),
        "out_channels": size(shapes, "conv_out.weight", 0),
        "block_out_channels": tuple(size(shapes, f"down.{index}.block.0.conv1.weight", 0) for index in range(count)),
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if attending else "DownBlock2D" for attending in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attending else "UpBlock2D" for attending in reversed(attends)),
        "add_attention": "mid.attn_1.q.weight" in shapes,
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    }
