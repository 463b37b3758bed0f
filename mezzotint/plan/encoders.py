"""Text encoders without numbers: built from config.json, run on tokens, joined as their family joins them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text import llm
from mezzotint.text.bert import BertConfig, LdmBert
from mezzotint.text.clip_network import ClipConfig, ClipText

LENGTHS = {"clip": 77, "t5": 256, "ldmbert": 77, "qwen3": 512, "mistral3": 512}  # tokens read of a prompt
LAYERS = {"qwen3": llm.QWEN3_LAYERS, "mistral3": llm.MISTRAL_LAYERS}


@dataclass(frozen=True, slots=True)
class Encoder:
    """One text encoder by its folder's config.json."""

    folder: str
    config: Mapping[str, Any]
    length: int  # tokens

    @property
    def kind(self) -> str:
        """clip, t5, ldmbert, bert, qwen3 or mistral3."""
        said = str(self.config.get("model_type") or "clip")
        return "clip" if said.startswith("clip") else said

    @property
    def title(self) -> str:
        """The published class name."""
        return str((self.config.get("architectures") or [self.kind])[0])

    @property
    def table(self) -> str:
        """Where its table of token vectors is."""
        places = {"clip": "text_model.embeddings.token_embedding", "ldmbert": "model.embed_tokens"}
        return places.get(self.kind, "embeddings.word_embeddings" if self.kind == "bert" else "embed_tokens")

    def build(self) -> nn.Module:
        """The network, without the layers that nothing reads; InputError for a kind that is not known."""
        config, kind = dict(self.config), self.kind
        if kind == "clip":
            return ClipText(ClipConfig.from_config(config), self.title.endswith("WithProjection"))
        if kind == "ldmbert":
            return LdmBert(BertConfig.from_config(config))
        if kind in LAYERS:
            decoder = {"model_type": "mistral", **config.get("text_config", {})} if kind == "mistral3" else config
            last = max(LAYERS[kind])
            decoder = {**decoder, "num_hidden_layers": last, "attention_dropout": 0.0}
            if isinstance(decoder.get("layer_types"), list):
                decoder["layer_types"] = decoder["layer_types"][:last]
            return _transformer(decoder, normed=False)
        if kind == "t5":
            return cast(nn.Module, _transformer({**config, "dropout_rate": 0.0}).encoder)
        if kind == "bert":
            network = _transformer({**config, "model_type": "bert"})
            network.pooler = None
            return network
        raise InputError(f"{self.folder}: '{self.config.get('model_type')}' is no text encoder known here")

    def read(self, network: Any, ids: Tensor) -> list[Tensor]:
        """ids (B, N) -> hidden states (B, N, D) that are read of it, the last one the last."""
        if self.kind == "clip":
            return network(ids)
        if self.kind == "ldmbert":
            return [network(ids)]
        if self.kind in LAYERS:
            states = network(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
            ).hidden_states
            return [torch.cat([states[layer] for layer in LAYERS[self.kind]], dim=-1)]
        if self.kind == "bert":
            return [network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state]
        return [network(input_ids=ids).last_hidden_state]


def _transformer(config: Mapping[str, Any], normed: bool = True) -> Any:
    return llm.build(config, normed)


def spoken(
    encoders: Sequence[Encoder], networks: Sequence[Any], count: int, width: int, pooled: int | None, behind: int = 0
) -> Conditioning:
    """`count` prompts through all encoders: CLIPs joined on channels, T5 behind them on the sequence, as families do.

    tokens (B, N, width), pooled (B, pooled) or None. `behind` are tokens of zeros where T5 is absent.
    """
    rows: list[Tensor] = []
    vectors: list[Tensor] = []
    after: list[Tensor] = []
    for encoder, network in zip(encoders, networks, strict=True):
        ids = torch.zeros(count, encoder.length, dtype=torch.long)
        states = encoder.read(network, ids)
        if encoder.kind == "t5":
            after.append(states[-1])
            continue
        rows.append(states[-1])
        if encoder.kind == "clip":
            last = network.norm(states[-1])
            vectors.append(network.text_projection(last[:, 0]) if hasattr(network, "text_projection") else last[:, 0])
    tokens = torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]
    if behind:
        after.append(tokens.new_zeros(count, behind, width))
    if after:
        tokens = torch.cat([F.pad(tokens, (0, width - tokens.shape[-1])), *(part.to(tokens) for part in after)], dim=1)
    whole = torch.cat(vectors, dim=-1)[:, :pooled] if pooled and vectors else None
    if pooled and (whole is None or whole.shape[-1] < pooled):
        whole = tokens.new_zeros(count, pooled)
    return Conditioning(tokens=tokens, pooled=whole)
