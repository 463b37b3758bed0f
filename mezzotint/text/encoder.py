"""What a prompt encoder promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from mezzotint.conditioning import Conditioning


class TextEncoder(Protocol):
    """Prompts to conditioning, with the facts that a contract keeps about it."""

    name: str
    layer: int  # which hidden state is read, -1 the last
    length: int  # tokens, a longer prompt is cut with a warning
    width: int  # D of tokens and of the pooled vector
    padding: Literal["max_length"]
    pooling: Literal["mean"]

    def digest(self) -> str:
        """SHA-256 of configuration, weights and tokenizer."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """tokens (B, N, D), mask (B, N), pooled (B, D)."""
        ...

    def empty(self, count: int = 1) -> Conditioning:
        """The unconditional prompt, `count` times: what guidance and caption dropout put in a prompt's place."""
        ...

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move to a device, in place."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load` needs to make the same encoder again."""
        ...
