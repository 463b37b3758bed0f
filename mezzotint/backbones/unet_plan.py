"""What a U-Net is built from, and how the published names of blocks and heads are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mezzotint.errors import InputError
from mezzotint.layers.config import divides
from mezzotint.layers.stages import Attend, Common, Stage

ATTENDS = {"": Attend.NONE, "Resnet": Attend.NONE, "Attn": Attend.PIXELS, "CrossAttn": Attend.TEXT}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a U-Net is built from, whichever file described it."""

    common: Common
    down: tuple[Stage, ...]
    mid: Stage | None
    mid_scale: float
    up: tuple[Stage, ...]  # deepest first
    clock_channels: int  # of the sinusoid that the clock becomes
    time_channels: int  # of the embedding that residual blocks read

    @property
    def mid_common(self) -> Common:
        """The middle block may divide its output; everything else is shared."""
        return replace(self.common, output_scale=float(self.mid_scale))

    def skip_channels(self) -> list[int]:
        """The width of each skip connection in order: the first convolution, each block, each change of resolution."""
        skips, last = [self.down[0].channels], len(self.down) - 1
        for level, stage in enumerate(self.down):
            skips += [stage.channels] * (stage.layers + (level < last))
        return skips


def attention_of(block_type: str, suffix: str, allowed: Sequence[str]) -> Attend:
    """The attention that a block type such as 'AttnDownBlock2D' names."""
    # "ResnetDownsampleBlock2D" is spelled apart from its siblings
    plain = block_type.replace("DownsampleBlock2D", "DownBlock2D").replace("UpsampleBlock2D", "UpBlock2D")
    prefix = plain.removesuffix(suffix)
    if plain == prefix or prefix not in allowed:
        raise InputError(f"the block type '{block_type}' cannot be built here")
    return ATTENDS[prefix]


def heads_of(channels: int, head_dim: int | None, heads: int | None) -> int:
    """How many heads there are: a number fixed for all levels, or heads of one width, or one head."""
    if heads is not None:
        divides("num_attention_heads", channels, heads)
        return heads
    if head_dim is None:
        return 1
    divides("attention_head_dim", channels, head_dim)
    return channels // head_dim


def per_level(name: str, value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else value
    if len(values) != count:
        raise InputError(f"'{name}' has {len(values)} entries for {count} levels")
    return values
