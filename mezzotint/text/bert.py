"""The transformer that latent diffusion's text-to-image model trained for itself (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text.encoder import Reading
from mezzotint.text.rows import Words, grown, size, vectors_at, whole
from mezzotint.text.vocabulary import Vocabulary, open_tokenizer
from mezzotint.text.weights import digest, fill, read_folder, write_folder

TABLE = "model.embed_tokens"  # of token vectors


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The settings of config.json that the numbers depend on; BERT's words, but neither its training nor its norms."""

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    d_model: int = 1280

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> BertConfig:
        """From config.json; training settings and the like are passed over."""
        config = cls(**{key: data[key] for key in cls.__slots__ if key in data})
        wrong = [key for key in cls.__slots__ if type(getattr(config, key)) is not int or getattr(config, key) < 1]
        if wrong:
            raise InputError(f"LDM's BERT: '{wrong[0]}' = {getattr(config, wrong[0])!r} is not a number of anything")
        if data.get("activation_function", "gelu") != "gelu":
            raise InputError(f"LDM's BERT: 'activation_function' = {data['activation_function']!r}; known: gelu")
        return config


class LdmBert(nn.Module):
    """A transformer with the norms in front, parameters named as in diffusers' files."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Model(config)
        self.to_logits = nn.Linear(config.d_model, config.vocab_size)  # in the files; nothing reads it

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) -> states after the last layer and its norm (B, N, D)."""
        model = self.model
        x = model.embed_tokens(ids) + model.embed_positions.weight[: ids.shape[1]]  # (B, N, D)
        for layer in model.layers:
            x = layer(x)
        return model.layer_norm(x)


class _Model(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)


class _Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))  # (B, N, D)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))  # (B, N, D)


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        inner = config.head_dim * config.encoder_attention_heads
        self.heads = config.encoder_attention_heads
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


@dataclass
class Bert:
    """LDM's transformer read behind its last norm; it sees its padding, as it was trained."""

    network: LdmBert
    vocabulary: Vocabulary
    folder: str = "bert"
    name: str = "ldmbert"
    settings: Mapping[str, Any] | None = None

    pooled_width: int | None = None
    stands_for_nothing: Literal["encoded", "zeros"] = "encoded"

    def __post_init__(self) -> None:
        self.width: int = self.network.config.d_model

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The one network, by its folder."""
        return {self.folder: self.network}

    def with_networks(self, networks: Mapping[str, nn.Module]) -> Bert:
        """The same encoder with another network in its place, where there is one for its folder."""
        return replace(self, network=cast("Any", networks.get(self.folder, self.network)))

    def tables(self) -> Mapping[str, Tensor]:
        """The one table of token vectors, by its folder."""
        return {self.folder: cast("Tensor", self.network.get_submodule(TABLE).weight)}

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """The vectors of the tokens of a text, by folder."""
        return {self.folder: vectors_at(self.network, TABLE, self.vocabulary.known(text))}

    def with_words(self, words: Words) -> Bert:
        """The same encoder with new words; this one stays as it is."""
        network, vocabulary = grown(self.network, TABLE, self.vocabulary, words, self.folder, self.name)
        return replace(self, network=network, vocabulary=vocabulary)

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """The last layer, 77 tokens, the padding token."""
        settings = {"encoder_attention_heads": self.network.config.encoder_attention_heads}
        found = digest(settings, whole(self.network), self.vocabulary.words()) if digests else ""
        padding = self.vocabulary.tokenizer.convert_ids_to_tokens(self.vocabulary.pad)
        return (Reading(self.name, found, (-1,), self.vocabulary.length, padding, "none", self.width),)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes, start and end included, nothing cut."""
        return self.vocabulary.lengths(prompts)

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, 77, D); a longer prompt is cut with a warning, never read in pieces."""
        if chunked:
            raise InputError(f"{self.name} reads one row of {self.vocabulary.length} tokens, not pieces")
        ids = self.vocabulary.rows(prompts)[0][:, 0].to(self.network.model.embed_tokens.weight.device)  # (B, N)
        return Conditioning(tokens=self.network(ids))

    def empty(self, count: int = 1) -> Conditioning:
        """The encoded "", `count` times."""
        return self.encode([""]).map(lambda tensor: tensor.repeat_interleave(count, 0))

    def to(self, device: str | torch.device) -> Bert:
        """Move the network, in place."""
        self.network.to(device=torch.device(device))
        return self

    def save(self, root: Path) -> None:
        """Write bert and tokenizer."""
        own = {"architectures": ["LDMBertModel"], "model_type": "ldmbert", "activation_function": "gelu"}
        config = {**(self.settings or {}), **own, **asdict(self.network.config)}
        config["vocab_size"] = size(self.network, TABLE)
        write_folder(Path(root) / self.folder, config, whole(self.network))
        self.vocabulary.save(Path(root) / "tokenizer")


def load_folder(
    folder: Path, tokenizer_folder: Path, dtype: torch.dtype | None = torch.float32, name: str | None = None
) -> Bert:
    """LDM's BERT from its folder and its tokenizer's; `dtype` None keeps the file's."""
    config, tensors = read_folder(folder)
    tokenizer = open_tokenizer("BertTokenizerFast", tokenizer_folder)
    return from_tensors(config, tensors, tokenizer, dtype, Path(folder).name, name, at=folder)


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype | None = torch.float32,
    folder: str = "bert",
    name: str | None = None,
    at: object = "the text encoder",
) -> Bert:
    """LDM's BERT from config.json's content and tensors under diffusers' names."""
    settings = BertConfig.from_config(config)
    network = fill(lambda: LdmBert(settings), settings.encoder_layers, tensors, dtype, at)
    vocabulary = Vocabulary(
        tokenizer, settings.max_position_embeddings, tokenizer.pad_token_id, tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    )  # fmt: skip
    return Bert(network, vocabulary, folder, name or folder, dict(config))
