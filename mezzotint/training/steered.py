"""A backbone and the text encoders that train with it, as one network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.text import TextEncoder


class Steered(nn.Module):
    """raw = backbone(x, t, conditioning with the text of the prompts), the prompts read anew in every call.

    The parameters are `backbone.*` and `text.<folder of the encoder>.*`.
    """

    def __init__(self, backbone: nn.Module, text: TextEncoder) -> None:
        super().__init__()
        self.backbone = backbone
        self._modules["text"] = nn.ModuleDict(dict(text.networks))  # what `text` returns speaks for these

        def encoder(networks: nn.ModuleDict) -> TextEncoder:
            return text.with_networks(dict(networks.items()))

        self._encoder = encoder  # a function, so that a copy of this module shares vocabularies and copies networks

    @property
    def text(self) -> TextEncoder:
        """The encoder with the networks of this module."""
        networks = self._modules["text"]
        assert isinstance(networks, nn.ModuleDict)
        return self._encoder(networks)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, prompts: Sequence[str]) -> Tensor:
        """x (B, C, h, w), t (B,), B prompts, "" for none -> raw (B, C or 2C, h, w)."""
        dtype = next(self.backbone.parameters()).dtype
        said = spoken(self.text, prompts)
        told = replace(conditioning, tokens=said.tokens, mask=said.mask, pooled=said.pooled)
        # as generation does: everything that the backbone reads is in its own dtype
        told = told.map(lambda part: part.to(dtype) if part.is_floating_point() else part)
        return self.backbone(x.to(dtype), t, told)


def spoken(text: TextEncoder, prompts: Sequence[str]) -> Conditioning:
    """A row for every prompt, and for "" what the model was trained to read in its place: zeros (SDXL) or the encoding.

    Each distinct prompt is read once.
    """
    distinct = list(dict.fromkeys(prompts))
    encoded = text.encode(distinct)
    tokens = encoded.tokens
    assert tokens is not None  # every encoder returns them
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=tokens.device)
    if text.stands_for_nothing == "zeros":
        real = torch.tensor([prompt != "" for prompt in distinct], device=tokens.device)
        encoded = encoded.map(lambda part: torch.where(real.view(-1, *(1,) * (part.ndim - 1)), part, 0))
    return encoded.map(lambda part: part[rows])
