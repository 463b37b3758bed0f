"""Captions for training: every distinct one encoded once, and kept with the digests of the encoders that did it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.conditioning import Conditioning
from mezzotint.contract import TextFacts
from mezzotint.data import cache
from mezzotint.files import sha256_json
from mezzotint.text import TextEncoder
from mezzotint.training.steered import spoken


class Captions:
    """The distinct captions of a run in order, row 0 being no prompt; encoded where the encoders do not train."""

    def __init__(self, captions: Sequence[str]) -> None:
        self.distinct = tuple(cache.distinct(captions))
        self._place = {caption: row for row, caption in enumerate(self.distinct)}
        self.rows: Conditioning | None = None

    def places(self, captions: Sequence[str]) -> Tensor:
        """Rows (N,) of captions."""
        return torch.tensor([self._place[caption] for caption in captions], dtype=torch.long)

    def texts(self, rows: Tensor) -> list[str]:
        """The captions of rows (B,), "" for no prompt."""
        return [self.distinct[row] for row in rows.tolist()]

    @torch.no_grad()
    def encode(
        self, text: TextEncoder, facts: TextFacts, path: Path, at: Path, watch: Callable[[int, int], None]
    ) -> None:
        """Encode all captions, or read what `path` keeps of them; a cache that other encoders made is refused."""
        self.rows = cache.text(
            path, self.distinct, lambda prompts: spoken(text, prompts), encoders_digest(facts), at, watch=watch
        )

    def take(self, rows: Tensor) -> Conditioning:
        """The conditioning of rows (B,), on their device."""
        assert self.rows is not None
        return self.rows.map(lambda tensor: tensor[rows.to(tensor.device)].to(rows.device))


def encoders_digest(facts: TextFacts) -> str:
    """One digest for how captions become tokens: every encoder's weights and words, layers, lengths, padding."""
    return sha256_json(facts.model_dump(mode="json"))
