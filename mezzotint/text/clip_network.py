"""CLIP's text transformer (Radford et al. 2021, section 2.4), parameters named as in the published files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import InputError


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), as CLIP-L was trained."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """The settings of config.json that the text transformer depends on; what it leaves out is CLIP-B's."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> ClipConfig:
        """From config.json of a text model, or of a whole CLIP; training settings and the like are passed over."""
        data = data.get("text_config", data)
        config = cls(**{key: data[key] for key in cls.__slots__ if key in data})
        for key in cls.__slots__:
            kind, value = type(getattr(cls(), key)), getattr(config, key)
            if type(value) is not kind or (kind is int and value < 1):
                raise InputError(f"CLIP: '{key}' = {value!r} is not of the kind it must be: {kind.__name__}")
        if config.hidden_act not in ACTIVATIONS:
            raise InputError(f"CLIP: 'hidden_act' = {config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
        if config.hidden_size % config.num_attention_heads:
            raise InputError(f"CLIP: {config.num_attention_heads} heads do not divide {config.hidden_size} channels")
        return config


class ClipText(nn.Module):
    """The transformer and, where the file has one, the projection of the whole prompt's vector."""

    def __init__(self, config: ClipConfig, projection: bool) -> None:
        super().__init__()
        self.config = config
        self.text_model = _Model(config)
        if projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """ids (B, N) -> the embeddings and the state after each layer, L + 1 tensors (B, N, D), before the norm."""
        model = self.text_model
        states = [model.embeddings(ids)]  # (B, N, D)
        for layer in model.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def norm(self, state: Tensor) -> Tensor:
        """The norm that follows the last layer."""
        return self.text_model.final_layer_norm(state)


class _Model(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, N, D)


class _Encoder(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))  # (B, N, D)
        return x + self.mlp(self.layer_norm2(x))  # (B, N, D)


class _Attention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # a token sees itself and what precedes it
        return self.out_proj(seen.transpose(1, 2).flatten(2))  # (B, N, D)


class _FeedForward(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # (B, N, D)
