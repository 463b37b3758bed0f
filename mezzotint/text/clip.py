"""CLIP as a prompt encoder: CLIP-L of SD 1.x, OpenCLIP H of SD 2.x, both CLIPs of SDXL and SD 3.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text.clip_network import ClipConfig, ClipText
from mezzotint.text.encoder import Reading
from mezzotint.text.rows import Words, grown, size, vectors_at, whole
from mezzotint.text.vocabulary import Vocabulary, clip_framed, open_tokenizer
from mezzotint.text.weights import digest, fill, read_folder, write_folder

Pooling = Literal["end", "projection", "none"]
TABLE = "text_model.embeddings.token_embedding"  # of token vectors
MODEL = "text_model.embeddings."  # where the names of published files begin
OUTSIDE = (f"{MODEL}position_ids", "logit_scale")  # stored by some files, no part of the text network


@dataclass
class Clip:
    """One CLIP read at one layer.

    `layer` counts hidden states from the end: -1 is the last layer's, -2 the one before; `norm` puts the final norm
    behind it (SD 1.x and 2.x), or not (SDXL, SD 3.x). `pooling`: the normed last state at the end token, that through
    the projection, or none. `settings` is config.json as it was, for writing it back.
    """

    network: ClipText
    vocabulary: Vocabulary
    layer: int = -1
    norm: bool = True
    pooling: Pooling = "none"
    folder: str = "text_encoder"
    name: str = "clip"
    settings: Mapping[str, Any] | None = None
    stands_for_nothing: Literal["encoded", "zeros"] = "encoded"

    def __post_init__(self) -> None:
        config = self.network.config
        if not -config.num_hidden_layers - 1 <= self.layer <= -1:
            raise InputError(f"{self.name} has {config.num_hidden_layers} layers, so there is no layer {self.layer}")
        if self.pooling == "projection" and not hasattr(self.network, "text_projection"):
            raise InputError(f"{self.name} has no text_projection.weight, which the vector for the whole prompt needs")
        if self.vocabulary.length > config.max_position_embeddings:
            raise InputError(f"{self.name} reads {config.max_position_embeddings} tokens, not {self.vocabulary.length}")
        self.width: int = config.hidden_size
        widths = {"end": config.hidden_size, "projection": config.projection_dim, "none": None}
        self.pooled_width: int | None = widths[self.pooling]

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The one network, by its folder."""
        return {self.folder: self.network}

    def with_networks(self, networks: Mapping[str, nn.Module]) -> Clip:
        """The same encoder with another network in its place, where there is one for its folder."""
        return replace(self, network=cast("Any", networks.get(self.folder, self.network)))

    def tables(self) -> Mapping[str, Tensor]:
        """The one table of token vectors, by its folder."""
        return {self.folder: cast("Tensor", self.network.get_submodule(TABLE).weight)}

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """The vectors of the tokens of a text, by folder."""
        return {self.folder: vectors_at(self.network, TABLE, self.vocabulary.known(text))}

    def with_words(self, words: Words) -> Clip:
        """The same encoder with new words; this one stays as it is."""
        network, vocabulary = grown(self.network, TABLE, self.vocabulary, words, self.folder, self.name)
        return replace(self, network=network, vocabulary=vocabulary)

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """The layer, the length of a piece, the padding token, the pooling."""
        config = self.network.config
        settings = {key: getattr(config, key) for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
        found = digest(settings, whole(self.network), self.vocabulary.words()) if digests else ""
        padding = self.vocabulary.tokenizer.convert_ids_to_tokens(self.vocabulary.pad)
        return (Reading(self.name, found, (self.layer,), self.vocabulary.length, padding, self.pooling, self.width),)

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, D) and pooled (B, P) or None; N is 77, or that times the pieces of the longest prompt."""
        return self.encode_pieces(prompts, self.pieces(prompts) if chunked else 1)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes, start and end included, nothing cut."""
        return self.vocabulary.lengths(prompts)

    def pieces(self, prompts: Sequence[str]) -> int:
        """Pieces of 75 tokens that the longest prompt needs."""
        return self.vocabulary.pieces(prompts)

    def encode_pieces(self, prompts: Sequence[str], pieces: int) -> Conditioning:
        """The prompts in so many pieces, each with start and end of its own, joined on N; pooled from the first."""
        ids = self.vocabulary.rows(prompts, pieces)[0].to(self.network.text_model.final_layer_norm.weight.device)
        states = self.network(ids.flatten(0, 1))  # L + 1 times (B * pieces, 77, D)
        tokens = self.network.norm(states[self.layer]) if self.norm else states[self.layer]
        tokens = tokens.unflatten(0, (-1, pieces)).flatten(1, 2)  # (B, pieces * 77, D)
        return Conditioning(tokens=tokens, pooled=self._pooled(states[-1].unflatten(0, (-1, pieces))[:, 0], ids[:, 0]))

    def _pooled(self, last: Tensor, ids: Tensor) -> Tensor | None:
        """The state at the first end token (B, D), or its projection (B, P); padding may be the end token too."""
        if self.pooling == "none":
            return None
        at = (ids == self.vocabulary.end).int().argmax(1)  # (B,)
        pooled = self.network.norm(last[torch.arange(len(ids), device=ids.device), at])  # (B, D)
        return self.network.text_projection(pooled) if self.pooling == "projection" else pooled

    def empty(self, count: int = 1) -> Conditioning:
        """The unconditional prompt: the encoded "", or zeros of its shape where the model was trained so."""
        found = self.encode([""]).map(lambda tensor: tensor.repeat_interleave(count, 0))
        return found.map(torch.zeros_like) if self.stands_for_nothing == "zeros" else found

    def skipping(self, layers: int) -> Clip:
        """The same encoder read so many layers earlier ("clip skip"), weights shared."""
        return replace(self, layer=self.layer - layers)

    def to(self, device: str | torch.device) -> Clip:
        """Move the network, in place."""
        self.network.to(device=torch.device(device))
        return self

    def save(self, root: Path) -> None:
        """Write the network into its folder and the tokenizer beside it: text_encoder_2 and tokenizer_2."""
        projected = hasattr(self.network, "text_projection")
        kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        config = self.network.config
        own = {"architectures": [kind], "model_type": "clip_text_model"}
        ends = {"bos_token_id": self.vocabulary.start, "eos_token_id": self.vocabulary.end}
        write_folder(
            Path(root) / self.folder,
            {**ends, **(self.settings or {}), **own, **asdict(config), "vocab_size": size(self.network, TABLE)},
            whole(self.network),
        )
        self.vocabulary.save(Path(root) / self.folder.replace("text_encoder", "tokenizer"))


def load_folder(
    folder: Path,
    tokenizer_folder: Path,
    dtype: torch.dtype | None = torch.float32,
    layer: int = -1,
    norm: bool = True,
    pooling: Pooling = "none",
    padding: str | None = None,
    name: str | None = None,
    stands_for_nothing: Literal["encoded", "zeros"] = "encoded",
) -> Clip:
    """A CLIP from its folder and its tokenizer's in a model folder, whose names `save` uses again.

    `padding` overrides the tokenizer's own padding token (SD 2.x was trained with "!"); `dtype` None keeps the file's.
    """
    config, tensors = read_folder(folder)
    tokenizer = open_tokenizer("CLIPTokenizerFast", tokenizer_folder)
    return from_tensors(
        config, tensors, tokenizer, dtype, layer, norm, pooling, padding, Path(folder).name, name,
        stands_for_nothing, at=folder,
    )  # fmt: skip


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype | None = torch.float32,
    layer: int = -1,
    norm: bool = True,
    pooling: Pooling = "none",
    padding: str | None = None,
    folder: str = "text_encoder",
    name: str | None = None,
    stands_for_nothing: Literal["encoded", "zeros"] = "encoded",
    at: object = "the text encoder",
) -> Clip:
    """A CLIP from config.json's content, tensors under the published names, and a tokenizer (clip_vocabulary()).

    The projection is built where its tensor is there. `at` names the tensors' place in error messages.
    """
    prefix = "" if any(key.startswith("text_model.") for key in tensors) else "text_model."
    named = {key if key.startswith("text_projection") else f"{prefix}{key}": value for key, value in tensors.items()}
    named = {key: value for key, value in named.items() if key not in OUTSIDE}
    settings = ClipConfig.from_config(config)
    network = fill(
        lambda: ClipText(settings, "text_projection.weight" in named), settings.num_hidden_layers, named, dtype, at
    )
    largest = max(tokenizer.get_vocab().values())
    if largest >= settings.vocab_size:
        raise InputError(f"the tokenizer of {name or folder} knows token {largest}, the network {settings.vocab_size}")
    length = min(settings.max_position_embeddings, 77)
    kept = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    return Clip(
        network, clip_framed(tokenizer, length, padding), layer, norm, pooling, folder, name or folder, kept,
        stands_for_nothing,
    )  # fmt: skip
