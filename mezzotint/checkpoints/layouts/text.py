"""Text encoders in original single files: CLIP-L, OpenCLIP H and bigG, T5 and LDM's BERT against the folders' names.

The tables speak of names behind `PREFIXES`. CLIP-L and T5 are stored under the folder's names, so their tables only say
what belongs to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mezzotint.checkpoints.keymap import Entry, Fused, Transposed, entry, nested
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, size

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


IN_OPEN_CLIP: dict[str, str] = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_entries(config: Mapping[str, Any], projection: bool = False) -> list[Entry]:
    """CLIP under the folder's own names (SD 1.x, SDXL's first, both of SD 3.x)."""
    names = [
        "text_model.embeddings.token_embedding",
        "text_model.embeddings.position_embedding",
        "text_model.final_layer_norm",
        *(["text_projection"] if projection else []),
    ]
    for i in range(config["num_hidden_layers"]):
        inside = (*(f"self_attn.{part}_proj" for part in "qkv"), *IN_OPEN_CLIP.values())
        names += [f"{LAYER}.{i}.{part}" for part in inside]
    return [entry(name, name) for name in names]


def open_clip_entries(config: Mapping[str, Any], projection: bool = True) -> list[Entry]:
    """OpenCLIP's text tower (H, bigG): q, k and v in one matrix, the projection stored the other way round."""
    rows = [
        entry("token_embedding", "text_model.embeddings.token_embedding"),
        entry("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        entry("ln_final", "text_model.final_layer_norm"),
    ]
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"transformer.resblocks.{i}", f"{LAYER}.{i}"
        for leaf in ("weight", "bias"):
            projections = [f"{ours}.self_attn.{part}_proj.{leaf}" for part in "qkv"]
            rows.append(entry(f"{theirs}.attn.in_proj_{leaf}", *projections, change=Fused((1, 1, 1))))
        rows += nested(theirs, ours, IN_OPEN_CLIP)
    return [*rows, *([entry("text_projection", "text_projection.weight", change=Transposed())] if projection else [])]


def t5_entries(config: Mapping[str, Any]) -> list[Entry]:
    """T5's encoder under the folder's own names (SD 3.x)."""
    names = ["shared", "encoder.final_layer_norm", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"]
    inner = ("wi_0", "wi_1", "wo") if config["feed_forward_proj"].startswith("gated") else ("wi", "wo")
    for i in range(config["num_layers"]):
        attends, thinks = (f"encoder.block.{i}.layer.{k}" for k in (0, 1))
        names += [f"{attends}.SelfAttention.{part}" for part in "qkvo"]
        names += [f"{thinks}.DenseReluDense.{part}" for part in inner]
        names += [f"{attends}.layer_norm", f"{thinks}.layer_norm"]
    return [entry(name, name) for name in names]


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
    tokens, positions = (f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
    inner = size(shapes, f"{LAYER}.0.mlp.fc1.weight", 0)
    projected = size(shapes, "text_projection.weight", 0) if "text_projection.weight" in shapes else None
    return _clip_config(shapes, tokens, positions, inner, counted(shapes, f"{LAYER}."), projected, hidden_act)


def open_clip_config(shapes: Shapes, keep: int | None = None, projection: bool = True) -> dict[str, Any]:
    """config.json of an OpenCLIP from the shapes under its own names; `keep` layers of it (SD 2.x: 23 of 24)."""
    layers = counted(shapes, "transformer.resblocks.")
    inner = size(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 0)
    projected = size(shapes, "text_projection", 1) if projection and "text_projection" in shapes else None
    layers = layers if keep is None else min(keep, layers)
    return _clip_config(shapes, "token_embedding.weight", "positional_embedding", inner, layers, projected, "gelu")


def _clip_config(
    shapes: Shapes, tokens: str, positions: str, inner: int, layers: int, projected: int | None, act: str | None
) -> dict[str, Any]:
    vocabulary, width = size(shapes, tokens, 0), size(shapes, tokens, 1)
    return {
        "architectures": ["CLIPTextModel" if projected is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": projected or width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": size(shapes, positions, 0),
        "hidden_act": act or ("quick_gelu" if width == 768 else "gelu"),
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of a T5 v1.1 encoder from the shapes of its tensors."""
    attends, thinks = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    heads = size(shapes, f"{attends}.relative_attention_bias.weight", 1)
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": size(shapes, "shared.weight", 0),
        "d_model": size(shapes, "shared.weight", 1),
        "d_kv": size(shapes, f"{attends}.q.weight", 0) // heads,
        "d_ff": size(shapes, f"{thinks}.wo.weight", 1),
        "num_layers": counted(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": size(shapes, f"{attends}.relative_attention_bias.weight", 0),
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if f"{thinks}.wi_0.weight" in shapes else "relu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    }


def bert_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of LDM's BERT from the shapes of its tensors under the original names; heads are 64 wide."""
    layers = "transformer.attn_layers.layers."
    inner = size(shapes, f"{layers}0.1.to_q.weight", 0)
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": size(shapes, "transformer.token_emb.weight", 0),
        "max_position_embeddings": size(shapes, "transformer.pos_emb.emb.weight", 0),
        "encoder_layers": counted(shapes, layers) // 2,
        "encoder_ffn_dim": size(shapes, f"{layers}1.1.net.0.0.weight", 0),
        "encoder_attention_heads": max(1, inner // 64),
        "head_dim": min(64, inner),
        "d_model": size(shapes, "transformer.token_emb.weight", 1),
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
