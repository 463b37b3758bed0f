"""ControlNets for Stable Diffusion (Zhang et al. 2023): the first half of a U-Net with zero convolutions."""

from __future__ import annotations

from typing import Any

from mezzotint.backbones.controlnet import ControlNetConfig
from mezzotint.checkpoints.keymap import Entry, entry
from mezzotint.checkpoints.layouts.guided import down, middle, read_levels
from mezzotint.checkpoints.layouts.shapes import Shapes, size
from mezzotint.checkpoints.layouts.unet import Vector, encoder_config, told, transformer


def controlnet(config: ControlNetConfig) -> list[Entry]:
    """The names of a ControlNet, as they follow `control_model.`.

    The convolutions that read the hint stand at even numbers, with activations between them.
    """
    plan = config.encoder.plan()
    rows = [*told(config.encoder), *down(plan.down, transformer), *middle(plan.mid, transformer)]
    rows += [entry(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(len(plan.skip_channels()))]
    rows.append(entry("middle_block_out.0", "controlnet_mid_block"))
    hint, between = "controlnet_cond_embedding", 2 * (len(config.conditioning_embedding_out_channels) - 1)
    rows.append(entry("input_hint_block.0", f"{hint}.conv_in"))
    rows += [entry(f"input_hint_block.{2 * i + 2}", f"{hint}.blocks.{i}") for i in range(between)]
    return [*rows, entry(f"input_hint_block.{2 * between + 2}", f"{hint}.conv_out")]


def controlnet_config(
    shapes: Shapes, *, heads: int | None = None, head_width: int | None = None, vector: Vector | None = None
) -> dict[str, Any]:
    """A ControlNetModel's configuration from an original file's names and shapes.

    Shapes cannot say what `unet_config` lists, nor the order of the hint's colours (RGB in all published files).
    """
    # each width but the last is a convolution that keeps it and one that halves the resolution and reaches the next
    hint: list[int] = []
    while f"input_hint_block.{4 * len(hint) + 2}.weight" in shapes:
        hint.append(size(shapes, f"input_hint_block.{4 * len(hint)}.weight", 0))
    return {
        "_class_name": "ControlNetModel",
        "conditioning_channels": size(shapes, "input_hint_block.0.weight", 1),
        "conditioning_embedding_out_channels": tuple(hint),
        **encoder_config(shapes, read_levels(shapes), heads, head_width, vector),
    }
