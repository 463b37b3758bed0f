"""What a prompt encoder promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mezzotint.conditioning import Conditioning


@dataclass(frozen=True, slots=True)
class Reading:
    """How one network reads a prompt; a contract keeps these facts (EncoderFacts has the same fields)."""

    encoder: str
    digest: str
    layers: tuple[int, ...]
    length: int
    padding: str
    pooling: str
    width: int


class TextEncoder(Protocol):
    """Prompts to conditioning, by one network or by several that are joined."""

    width: int  # D of tokens
    pooled_width: int | None  # P of pooled; None where there is no such vector
    stands_for_nothing: Literal["encoded", "zeros"]  # what `empty` returns: the encoded empty prompt, or zeros

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks by the folder each has in a model folder: text_encoder, text_encoder_2, ..."""
        ...

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """The facts, a reading for each network in order; without digests where a pass over the weights is too much."""
        ...

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, D), mask (B, N) or None, pooled (B, P) or None.

        A prompt that is too long is cut, with a warning that quotes what was left out; `chunked` reads it in pieces
        instead, where the encoder can (CLIP), and all prompts of the call get the same N.
        """
        ...

    def empty(self, count: int = 1) -> Conditioning:
        """The unconditional prompt, `count` times: what guidance and caption dropout put in a prompt's place."""
        ...

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move to a device, in place."""
        ...

    def save(self, root: Path) -> None:
        """Write the networks and tokenizers into their folders under a model folder."""
        ...
