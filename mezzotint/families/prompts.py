"""Text encoders of the published families, from parts in either layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.checkpoints import read_json
from mezzotint.checkpoints.layouts.text import (
    NO_WEIGHTS,
    bert_config,
    bert_entries,
    clip_config,
    open_clip_config,
    open_clip_entries,
    t5_config,
)
from mezzotint.errors import InputError
from mezzotint.families.materials import Materials, Section
from mezzotint.text import TextEncoder, bert, clip, llm, t5
from mezzotint.text.clip import Clip, Pooling
from mezzotint.text.joint import Joint
from mezzotint.text.t5 import T5, NoT5
from mezzotint.text.vocabulary import clip_vocabulary, open_tokenizer

H_READ = 23  # layers of OpenCLIP H, of its 24
REMEDY = "give a folder that has it (--parts), or put {part}/ beside the file"


def clip_text(
    materials: Materials,
    part: str,
    dtype: torch.dtype,
    layer: int = -1,
    norm: bool = True,
    pooling: Pooling = "none",
    padding: str | None = None,
) -> Clip:
    """A CLIP with the tokenizer of its folder; an original file has none, and CLIP's own vocabulary is the same.

    `padding` is what the family was trained with, where no tokenizer folder says it.
    """
    material = materials.material(part, REMEDY.format(part=part))
    folder = materials.tokenizers.get(part.replace("text_encoder", "tokenizer"))
    tokenizer = open_tokenizer("CLIPTokenizerFast", folder) if folder else clip_vocabulary()
    padding = padding_of(folder) if folder else padding
    return clip.from_tensors(
        material.config, material.tensors, tokenizer, dtype, layer, norm, pooling, padding, part, at=material.at
    )


def padding_of(folder: Path) -> str | None:
    """The padding token that special_tokens_map.json names; tokenizer_config.json may name another (SD 2.x)."""
    stated = folder / "special_tokens_map.json"
    token = read_json(stated).get("pad_token") if stated.is_file() else None
    return token.get("content") if isinstance(token, Mapping) else token


def sd3_text(materials: Materials, dtype: torch.dtype) -> TextEncoder:
    """Two CLIPs and T5; without T5 zeros stand in its place."""
    first = clip_text(materials, "text_encoder", dtype, -2, False, "projection")
    second = clip_text(materials, "text_encoder_2", dtype, -2, False, "projection", "!")
    return Joint((first, second), t5_text(materials, dtype))


def t5_text(materials: Materials, dtype: torch.dtype) -> T5 | NoT5:
    if "text_encoder_3" not in materials.parts:
        return NoT5(width=int(materials.config("transformer", "joint_attention_dim", 4096)), dtype=dtype)
    material = materials.parts["text_encoder_3"]
    return t5.from_tensors(
        material.config, material.tensors, tokenizer_of(materials, "tokenizer_3", "T5TokenizerFast"), dtype,
        at=material.at,
    )  # fmt: skip


def flux2_text(materials: Materials, dtype: torch.dtype) -> TextEncoder:
    """Hidden states of the language model; dev's tokenizer lives in its processor's folder."""
    material = materials.material("text_encoder", REMEDY.format(part="text_encoder"))
    tokenizer = tokenizer_of(materials, "tokenizer", "AutoTokenizer")
    return llm.from_tensors(material.config, material.tensors, tokenizer, dtype, at=material.at)


def bert_text(materials: Materials, dtype: torch.dtype) -> TextEncoder:
    material = materials.material("text_encoder", REMEDY.format(part="text_encoder"))
    tokenizer = tokenizer_of(materials, "tokenizer", "BertTokenizerFast")
    return bert.from_tensors(material.config, material.tensors, tokenizer, dtype, at=material.at)


def clip_section(prefix: str, activation: str | None = None) -> Section:
    """A CLIP under the folder's own names."""
    return Section(prefix, lambda shapes: clip_config(shapes, activation), None, NO_WEIGHTS)


def open_clip_section(prefix: str, tensors: Mapping[str, Tensor], whole: bool) -> Section:
    """An OpenCLIP under its own names; where it is not `whole`, without the last layer and the projection.

    Those are never read then (SD 2.x), and published folders lack them; so do files made from such folders, told by
    their 23 layers without a projection.
    """
    stem = f"{prefix}transformer.resblocks."
    numbers = {int(name[len(stem) :].partition(".")[0]) for name in tensors if name.startswith(stem)}
    cut = len(numbers) == H_READ and f"{prefix}text_projection" not in tensors
    unread = () if whole or cut or not numbers else (f"transformer.resblocks.{max(numbers)}.", "text_projection")
    return Section(
        prefix,
        lambda shapes: open_clip_config(shapes, projection=whole),
        lambda config: open_clip_entries(config, projection=whole),
        (*NO_WEIGHTS, *unread),
    )


def t5_section(prefix: str) -> Section:
    """A T5 encoder under the folder's own names."""
    return Section(prefix, t5_config, None)


def bert_section(prefix: str) -> Section:
    return Section(prefix, bert_config, bert_entries)


def tokenizer_of(materials: Materials, name: str, kind: str) -> Any:
    folder = materials.tokenizers.get(name)
    if folder is None:
        raise InputError(f"{materials.path} has no {name}: {REMEDY.format(part=name)}")
    return open_tokenizer(kind, folder)
