"""What a prompt encoder promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mezzotint.conditioning import Conditioning
    from mezzotint.text.rows import Words


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

    def with_networks(self, networks: Mapping[str, nn.Module]) -> TextEncoder:
        """The same encoder with other networks in the places of its own, by folder."""
        ...

    def tables(self) -> Mapping[str, Tensor]:
        """The tables of token vectors (V, D), by folder: where new words get their rows."""
        ...

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """The vectors (k, D) of the tokens of a text in each table, without start and end.

        InputError where a token is unknown, or there is none.
        """
        ...

    def with_words(self, words: Words) -> TextEncoder:
        """The same encoder with new words, each with rows (n, D) by folder; this one stays as it is.

        InputError where a word is known already, or has no rows for an encoder that needs them.
        """
        ...

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes, nothing cut, to compare with the `length` of the first reading."""
        ...

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, D), mask (B, N) or None, pooled (B, P) or None.

        A prompt that is too long is cut, with a warning that quotes what was left out; `chunked` reads it in pieces
        instead, where the encoder can (CLIP), and all prompts of the call get the same N. Gradients reach whatever
        parameters of the networks ask for them.
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
