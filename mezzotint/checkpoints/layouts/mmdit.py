"""Stability's own layout of Stable Diffusion 3 and 3.5, and of their control networks for 3.5 Large."""

from __future__ import annotations

from math import isqrt

from mezzotint.backbones.mmdit import MMDiTConfig
from mezzotint.backbones.mmdit_controlnet import MMDiTControlNetConfig
from mezzotint.checkpoints.keymap import SAME, Entry, Fused, Swapped, entry, nested
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, size
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

HEAD = 64  # channels of a head, in every published size
EMBEDDERS = {
    "x_embedder.proj": "pos_embed.proj",
    "pos_embed": "pos_embed.pos_embed",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
# one stream of a block: the picture's, the text's
PICTURE = {
    "attn.ln_q": "attn.norm_q",
    "attn.ln_k": "attn.norm_k",
    "attn.proj": "attn.to_out.0",
    "attn2.ln_q": "attn2.norm_q",
    "attn2.ln_k": "attn2.norm_k",
    "attn2.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
TEXT = {
    "attn.ln_q": "attn.norm_added_q",
    "attn.ln_k": "attn.norm_added_k",
    "attn.proj": "attn.to_add_out",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
}


def mmdit(config: MMDiTConfig) -> list[Entry]:
    """Stability's names of an MMDiT, without the `model.diffusion_model.` of whole-model files."""
    entries = [entry(theirs, ours) for theirs, ours in EMBEDDERS.items()]
    # theirs is (shift, scale) in every modulation; ours (scale, shift) where there is no gate
    entries.append(entry("final_layer.adaLN_modulation.1", "norm_out.linear", change=Swapped()))
    for index in range(config.num_layers):
        theirs, ours = f"joint_blocks.{index}", f"transformer_blocks.{index}"
        swapped = Swapped() if index == config.num_layers - 1 else SAME
        entries += _picture(f"{theirs}.x_block", ours) + nested(f"{theirs}.context_block", ours, TEXT)
        entries += [
            _fused(f"{theirs}.context_block.attn", f"{ours}.attn", "add_{}_proj"),
            entry(f"{theirs}.context_block.adaLN_modulation.1", f"{ours}.norm1_context.linear", change=swapped),
        ]
    return entries


def mmdit_controlnet(config: MMDiTControlNetConfig) -> list[Entry]:
    """Stability's names of a control network for SD 3.5 Large: the folder's, but for the blocks.

    Their files also hold a bare number, `control_type` (0 blur, 1 canny, 2 depth), which belongs to no layer: the
    caller takes it out first. InputError for a network that reads text: those are published as folders only.
    """
    if config.reads_tokens:
        raise InputError("a control network that reads text has no original layout: keep it as a folder")
    same = [*(ours for ours in EMBEDDERS.values() if ours.startswith("time_text_embed")), "pos_embed_input.proj"]
    same += [f"controlnet_blocks.{index}" for index in range(config.num_layers)]
    entries = [entry(name, name) for name in same]
    for index in range(config.num_layers):
        entries += _picture(f"transformer_blocks.{index}", f"transformer_blocks.{index}")
    return entries


def _picture(theirs: str, ours: str) -> list[Entry]:
    """A block's picture stream, with or without a second attention."""
    fused = [_fused(f"{theirs}.{name}", f"{ours}.{name}", "to_{}") for name in ("attn", "attn2")]
    return fused + nested(theirs, ours, PICTURE)


def _fused(theirs: str, ours: str, name: str) -> Entry:
    return entry(f"{theirs}.qkv", *(f"{ours}.{name.format(letter)}" for letter in "qkv"), change=Fused((1, 1, 1)))


def mmdit_config(shapes: Shapes) -> dict[str, object]:
    """The config.json that an original file's shapes stand for; InputError names a tensor that is not there.

    `sample_size` leaves no trace in a file; all published sizes have 128, and it matters to fresh networks alone.
    """
    width, patch = size(shapes, "x_embedder.proj.weight", 0), size(shapes, "x_embedder.proj.weight", 2)
    layers, norm = counted(shapes, "joint_blocks."), "joint_blocks.0.x_block.attn.ln_q.weight"
    head = size(shapes, norm, 0) if norm in shapes else HEAD
    dual = (index for index in range(layers) if f"joint_blocks.{index}.x_block.attn2.qkv.weight" in shapes)
    config = MMDiTConfig(
        patch_size=patch,
        in_channels=size(shapes, "x_embedder.proj.weight", 1),
        num_layers=layers,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=size(shapes, "context_embedder.weight", 1),
        caption_projection_dim=size(shapes, "context_embedder.weight", 0),
        pooled_projection_dim=size(shapes, "y_embedder.mlp.0.weight", 1),
        out_channels=size(shapes, "final_layer.linear.weight", 0) // patch**2,
        pos_embed_max_size=isqrt(size(shapes, "pos_embed", 1)),
        dual_attention_layers=tuple(dual),
        qk_norm="rms_norm" if norm in shapes else None,
    )
    return write_config(config, "SD3Transformer2DModel")


def mmdit_controlnet_config(shapes: Shapes) -> dict[str, object]:
    """The config.json of a control network for SD 3.5 Large from its original file's shapes; InputError as above."""
    patches = "pos_embed_input.proj.weight"
    config = MMDiTControlNetConfig(
        patch_size=size(shapes, patches, 2),
        in_channels=size(shapes, patches, 1),
        out_channels=size(shapes, patches, 1),
        num_layers=counted(shapes, "transformer_blocks."),
        num_attention_heads=size(shapes, patches, 0) // HEAD,
        joint_attention_dim=None,
        caption_projection_dim=2048,  # of nothing here: what the published folders say
        pooled_projection_dim=size(shapes, "time_text_embed.text_embedder.linear_1.weight", 1),
        pos_embed_max_size=None,
        pos_embed_type=None,
        use_pos_embed=False,
        force_zeros_for_pooled_projection=False,
    )
    return write_config(config, "SD3ControlNetModel")
