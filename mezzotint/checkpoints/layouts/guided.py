"""The numbered blocks that guided diffusion, latent diffusion and all their descendants share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mezzotint.checkpoints.keymap import Entry, entry, nested
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, only, size
from mezzotint.errors import InputError
from mezzotint.layers.stages import Attend, Stage

EMBEDDINGS = [
    entry("time_embed.0", "time_embedding.linear_1"),
    entry("time_embed.2", "time_embedding.linear_2"),
]
ENDS = [
    entry("out.0", "conv_norm_out"),
    entry("out.2", "conv_out"),
]
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

AttentionRows = Callable[[str, str, Stage], list[Entry]]  # (original name, folder's name, level) -> rows


def down(stages: Sequence[Stage], attention: AttentionRows) -> list[Entry]:
    """Block 0 is the first convolution; then each residual block with its attention, and each halving, is one block."""
    rows, index = [entry("input_blocks.0.0", "conv_in")], 0
    for level, stage in enumerate(stages):
        ours = f"down_blocks.{level}"
        for layer in range(stage.layers):
            index += 1
            rows += _layer(f"input_blocks.{index}", ours, layer, stage, attention)
        if level < len(stages) - 1:
            index += 1
            rows += _resampler(f"input_blocks.{index}.0", "op", f"{ours}.downsamplers.0", stage)
    return rows


def middle(stage: Stage | None, attention: AttentionRows) -> list[Entry]:
    """Residual blocks and the attention between them, numbered in one row."""
    if stage is None:
        return []
    rows, index = nested("middle_block.0", "mid_block.resnets.0", RESIDUAL), 0
    for layer in range(stage.layers):
        if stage.attend is not Attend.NONE:
            index += 1
            rows += attention(f"middle_block.{index}", f"mid_block.attentions.{layer}", stage)
        index += 1
        rows += nested(f"middle_block.{index}", f"mid_block.resnets.{layer + 1}", RESIDUAL)
    return rows


def up(stages: Sequence[Stage], attention: AttentionRows) -> list[Entry]:
    """Each residual block is one block, with its attention and, at the end of a level, the doubling behind it."""
    rows: list[Entry] = []
    index = 0
    for level, stage in enumerate(stages):
        ours = f"up_blocks.{level}"
        for layer in range(stage.layers):
            rows += _layer(f"output_blocks.{index}", ours, layer, stage, attention)
            index += 1
        if level < len(stages) - 1:
            place = 1 if stage.attend is Attend.NONE else 2
            rows += _resampler(f"output_blocks.{index - 1}.{place}", "conv", f"{ours}.upsamplers.0", stage)
    return rows


def _layer(theirs: str, ours: str, layer: int, stage: Stage, attention: AttentionRows) -> list[Entry]:
    rows = nested(f"{theirs}.0", f"{ours}.resnets.{layer}", RESIDUAL)
    if stage.attend is not Attend.NONE:
        rows += attention(f"{theirs}.1", f"{ours}.attentions.{layer}", stage)
    return rows


def _resampler(theirs: str, leaf: str, ours: str, stage: Stage) -> list[Entry]:
    if stage.residual_resample:
        return nested(theirs, ours, RESIDUAL)
    return [entry(f"{theirs}.{leaf}", f"{ours}.conv")]


@dataclass(frozen=True, slots=True)
class Levels:
    """What the names and shapes of the numbered blocks say."""

    widths: tuple[int, ...]
    layers: int  # residual blocks a level, on the way down
    attending: tuple[bool, ...]
    residual: bool  # the resolution changes in residual blocks
    scale_shift: bool  # the embedding scales as well as shifts

    def types(self, attending: str, plain: str) -> tuple[str, ...]:
        """The published block type of each level, finest first."""
        return tuple(attending if attends else plain for attends in self.attending)


def read_levels(shapes: Shapes) -> Levels:
    """Widths, layers and attention from the numbered blocks; InputError where they do not follow the layout."""
    blocks = counted(shapes, "input_blocks.")
    shrinks = [i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in shapes]
    grows = [i for i in range(blocks) if any(f"output_blocks.{i}.{place}.{leaf}" in shapes for place, leaf in GROWS)]
    # a level of n layers takes n + 1 numbers on either way, whatever changes the resolution behind it
    step = shrinks[0] if shrinks else grows[0] + 1 if grows else blocks
    if step < 2 or blocks % step:
        raise InputError(
            f"{blocks} input blocks do not fall into levels of {step}; this is not the layout it looks like"
        )
    starts = range(1, blocks, step)
    firsts = [f"input_blocks.{start}.0" for start in starts]
    widths = tuple(size(shapes, f"{first}.out_layers.3.weight", 0) for first in firsts)
    shifts = {
        size(shapes, f"{first}.emb_layers.1.weight", 0) // width for first, width in zip(firsts, widths, strict=True)
    }
    return Levels(
        widths=widths,
        layers=step - 1,
        attending=tuple(f"input_blocks.{start}.1.norm.weight" in shapes for start in starts),
        residual=f"input_blocks.{step}.0.in_layers.0.weight" in shapes,
        scale_shift=only("residual blocks", shifts) == 2,
    )


GROWS = [(place, leaf) for place in (1, 2) for leaf in ("conv.weight", "in_layers.0.weight")]


def clock_widths(shapes: Shapes, widths: tuple[int, ...]) -> dict[str, int]:
    """The widths of the clock's sinusoid and embedding, where they are not the first level's and four times that."""
    usual = {"clock_channels": widths[0], "time_embedding_dim": 4 * widths[0]}
    embedding, sinusoid = (size(shapes, "time_embed.0.weight", axis) for axis in (0, 1))
    found = {"clock_channels": sinusoid, "time_embedding_dim": embedding}
    return {key: value for key, value in found.items() if value != usual[key]}
