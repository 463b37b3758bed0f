"""The diffusion transformer's own files (Peebles & Xie 2023)."""

from __future__ import annotations

from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor

from mezzotint.backbones.dit import DiTConfig, position_table
from mezzotint.checkpoints.keymap import Computed, Copied, Entry, Fused, entry, nested
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, size
from mezzotint.errors import InputError

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: S, B, L, XL (table 1)
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def dit(config: DiTConfig) -> list[Entry]:
    """The names of the original DiT for a DiTTransformer2DModel.

    The original has one embedder of clock and label, the folder a copy of it in every block; the original stores the
    table of positions, which the folder's network computes.
    """
    blocks = range(config.num_layers)
    rows = [
        entry("x_embedder.proj", "pos_embed.proj"),
        entry("pos_embed", change=Computed(partial(_positions, config))),
        entry("final_layer.adaLN_modulation.1", "proj_out_1"),
        entry("final_layer.linear", "proj_out_2"),
    ]
    for theirs, ours in EMBEDDERS.items():
        copies = [f"transformer_blocks.{block}.norm1.emb.{ours}" for block in blocks]
        rows.append(entry(theirs, *copies, change=Copied(config.num_layers)))
    for block in blocks:
        theirs, ours = f"blocks.{block}", f"transformer_blocks.{block}"
        projections = [f"{ours}.attn1.to_{part}" for part in "qkv"]
        rows.append(entry(f"{theirs}.attn.qkv", *projections, change=Fused((1, 1, 1))))
        rows += nested(theirs, ours, BLOCK)
    return rows


def _positions(config: DiTConfig) -> Tensor:
    side = config.sample_size // config.patch_size
    return position_table(config.channels, side, side, side)[None]  # (1, N, D)


def dit_config(
    shapes: Shapes, *, heads: int | None = None, freq_shift: float = 1, norm_eps: float = 1e-5
) -> dict[str, Any]:
    """A DiTTransformer2DModel's configuration from an original file's names and shapes.

    Shapes cannot say: `heads`, None for the published 6, 12, 16 and 16 at widths 384, 768, 1024 and 1152; `freq_shift`
    of the clock and `norm_eps` of the norm before the perceptron, for which the reference library takes 1 and 1e-5 and
    the original code 0 and 1e-6: the defaults keep both layouts of the same weights one model. The schedule. The last
    row of the label table is "no class".
    """
    width, channels, patch = (size(shapes, "x_embedder.proj.weight", axis) for axis in (0, 1, 2))
    heads = HEADS.get(width) if heads is None else heads
    if heads is None or width % heads:
        raise InputError(f"no DiT of width {width} was published, and shapes do not show how many heads it has")
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": size(shapes, "final_layer.linear.weight", 0) // patch**2,
        "num_layers": counted(shapes, "blocks."),
        "sample_size": isqrt(size(shapes, "pos_embed", 1)) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": size(shapes, "y_embedder.embedding_table.weight", 0) - 1,
        "norm_eps": norm_eps,
        "freq_shift": freq_shift,
    }
