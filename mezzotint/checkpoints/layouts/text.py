"""Text encoders in original single files: CLIP-L, OpenCLIP H and bigG, T5 and LDM's BERT against the folders' names.

Prefixes are the family's business: the tables speak of names behind `PREFIXES`. CLIP-L and T5 are stored under the
folder's names already, so their prefix is all that changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mezzotint.checkpoints.keymap import Entry, Fused, Transposed, entry
from mezzotint.errors import InputError

Shapes = Mapping[str, Sequence[int]]

# Where the encoders of a family stand in its single file, by the folder each has in a model folder.
PREFIXES = {
    "ldm": {"bert": "cond_stage_model."},
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl_refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
    "sd3": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
}

# Stored beside the weights of an encoder, but no part of it: a table of positions, CLIP's temperature, a causal mask.
NO_WEIGHTS = ("text_model.embeddings.position_ids", "logit_scale", "attn_mask")

LAYER = "text_model.encoder.layers"


def open_clip_entries(config: Mapping[str, Any], projection: bool = True) -> list[Entry]:
    """OpenCLIP's text tower (H, bigG): q, k and v in one matrix, the projection stored the other way round."""
    rows = [
        entry("token_embedding", "text_model.embeddings.token_embedding"),
        entry("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        entry("ln_final", "text_model.final_layer_norm"),
    ]
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"transformer.resblocks.{i}", f"{LAYER}.{i}"
        heads = [f"{ours}.self_attn.{part}_proj" for part in "qkv"]
        rows += [
            entry(f"{theirs}.attn.in_proj_weight", *(f"{name}.weight" for name in heads), change=Fused((1, 1, 1))),
            entry(f"{theirs}.attn.in_proj_bias", *(f"{name}.bias" for name in heads), change=Fused((1, 1, 1))),
            entry(f"{theirs}.attn.out_proj", f"{ours}.self_attn.out_proj"),
            entry(f"{theirs}.ln_1", f"{ours}.layer_norm1"),
            entry(f"{theirs}.ln_2", f"{ours}.layer_norm2"),
            entry(f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1"),
            entry(f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2"),
        ]
    return [*rows, *([entry("text_projection", "text_projection.weight", change=Transposed())] if projection else [])]


def bert_entries(config: Mapping[str, Any]) -> list[Entry]:
    """LDM's BERT: attention and feed-forward are layers of their own, each a norm and a block."""
    rows = [
        entry("transformer.token_emb", "model.embed_tokens"),
        entry("transformer.pos_emb.emb", "model.embed_positions"),
        entry("transformer.norm", "model.layer_norm"),
        entry("transformer.to_logits", "to_logits"),
    ]
    for i in range(config["encoder_layers"]):
        attends, thinks = (f"transformer.attn_layers.layers.{2 * i + k}" for k in (0, 1))
        ours = f"model.layers.{i}"
        rows += [
            entry(f"{attends}.0", f"{ours}.self_attn_layer_norm"),
            *(entry(f"{attends}.1.to_{part}", f"{ours}.self_attn.{part}_proj") for part in "qkv"),
            entry(f"{attends}.1.to_out", f"{ours}.self_attn.out_proj"),
            entry(f"{thinks}.0", f"{ours}.final_layer_norm"),
            entry(f"{thinks}.1.net.0.0", f"{ours}.fc1"),
            entry(f"{thinks}.1.net.2", f"{ours}.fc2"),
        ]
    return rows


def clip_config(shapes: Shapes, hidden_act: str | None = None) -> dict[str, Any]:
    """config.json of a CLIP from the shapes of its tensors under the folder's names.

    Heads are 64 wide in every published one. `hidden_act` is told by no shape: CLIP-L (768 wide) has quick_gelu, the
    OpenCLIPs gelu, unless it is given.
    """
    vocabulary, width = _shape(shapes, "text_model.embeddings.token_embedding.weight")
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, f"{LAYER}.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _layers(shapes, LAYER),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": _shape(shapes, "text_model.embeddings.position_embedding.weight")[0],
        "projection_dim": width if projection is None else projection[0],
        "hidden_act": hidden_act or ("quick_gelu" if width == 768 else "gelu"),
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def open_clip_config(shapes: Shapes, keep: int | None = None, projection: bool = True) -> dict[str, Any]:
    """config.json of an OpenCLIP from the shapes under its own names; `keep` layers of it (SD 2.x: 23 of 24)."""
    vocabulary, width = _shape(shapes, "token_embedding.weight")
    layers = _layers(shapes, "transformer.resblocks")
    projected = projection and "text_projection" in shapes
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": layers if keep is None else min(keep, layers),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": _shape(shapes, "positional_embedding")[0],
        "projection_dim": shapes["text_projection"][1] if "text_projection" in shapes else width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of a T5 v1.1 encoder from the shapes of its tensors."""
    vocabulary, width = _shape(shapes, "shared.weight")
    block = "encoder.block.0.layer"
    buckets, heads = _shape(shapes, f"{block}.0.SelfAttention.relative_attention_bias.weight")
    gated = f"{block}.1.DenseReluDense.wi_0.weight" in shapes
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _shape(shapes, f"{block}.0.SelfAttention.q.weight")[0] // heads,
        "d_ff": _shape(shapes, f"{block}.1.DenseReluDense.wo.weight")[1],
        "num_layers": _layers(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    }


def bert_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of LDM's BERT from the shapes of its tensors under the original names; heads are 64 wide."""
    vocabulary, width = _shape(shapes, "transformer.token_emb.weight")
    inner = _shape(shapes, "transformer.attn_layers.layers.0.1.to_q.weight")[0]
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": vocabulary,
        "max_position_embeddings": _shape(shapes, "transformer.pos_emb.emb.weight")[0],
        "encoder_layers": _layers(shapes, "transformer.attn_layers.layers") // 2,
        "encoder_ffn_dim": _shape(shapes, "transformer.attn_layers.layers.1.1.net.0.0.weight")[0],
        "encoder_attention_heads": max(1, inner // 64),
        "head_dim": min(64, inner),
        "d_model": width,
        "activation_function": "gelu",
        "pad_token_id": 0,
    }


def without_tail(tensors: Mapping[str, Tensor], layers: int, projection: bool) -> dict[str, Tensor]:
    """OpenCLIP's tensors without the layers from `layers` on, without what is no weight, and perhaps the projection.

    What is left out cannot be given back: a single file written again lacks it.
    """
    late = re.compile(r"transformer\.resblocks\.(\d+)\.")
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = late.match(name)
        if (found and int(found[1]) >= layers) or name in NO_WEIGHTS or (name == "text_projection" and not projection):
            continue
        kept[name] = tensor
    return kept


def behind(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shape(shapes: Shapes, name: str) -> Sequence[int]:
    if name not in shapes or len(shapes[name]) != 2:
        raise InputError(f"no text encoder of the expected kind: {name} is missing or no matrix")
    return shapes[name]


def _layers(shapes: Shapes, stem: str) -> int:
    numbers = {int(found[1]) for name in shapes if (found := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise InputError(f"the layers {stem}.* are not numbered from 0 without a gap")
    return len(numbers)
