"""Several encoders read side by side and joined: SDXL's two CLIPs, SD 3.x's two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text.clip import Clip
from mezzotint.text.encoder import Reading
from mezzotint.text.t5 import T5, NoT5


@dataclass
class Joint:
    """CLIPs joined on channels, and behind them on the sequence T5, to whose width they are filled with zeros.

    pooled is what those CLIPs that pool have, joined on channels.
    """

    clips: tuple[Clip, ...]
    t5: T5 | NoT5 | None = None
    stands_for_nothing: Literal["encoded", "zeros"] = "encoded"

    def __post_init__(self) -> None:
        joined = sum(clip.width for clip in self.clips)
        self.width: int = self.t5.width if self.t5 else joined
        self.pooled_width: int | None = sum(clip.pooled_width or 0 for clip in self.clips) or None
        if joined > self.width:
            raise InputError(f"the CLIPs are {joined} wide together, more than T5's {self.width}")

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Every encoder's network, by its folder."""
        return {folder: network for part in self._parts() for folder, network in part.networks.items()}

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """A reading for each, in order."""
        return tuple(reading for part in self._parts() for reading in part.readings(digests))

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, D) and pooled (B, P); `chunked` lets the CLIPs read in pieces, as many for each of them."""
        pieces = max(clip.pieces(prompts) for clip in self.clips) if chunked else 1
        found = [clip.encode_pieces(prompts, pieces) for clip in self.clips]
        tokens = torch.cat([_tokens(part) for part in found], dim=-1)  # (B, pieces * 77, D of all CLIPs)
        if self.t5:
            behind = _tokens(self.t5.encode(prompts)).to(tokens)
            tokens = torch.cat((F.pad(tokens, (0, self.width - tokens.shape[-1])), behind), dim=1)
        pooled = [part.pooled for part in found if part.pooled is not None]
        return Conditioning(tokens=tokens, pooled=torch.cat(pooled, dim=-1) if pooled else None)

    def empty(self, count: int = 1) -> Conditioning:
        """The unconditional prompt: the encoded "", or zeros of its shape where the model was trained so (SDXL)."""
        found = self.encode([""]).map(lambda tensor: tensor.repeat_interleave(count, 0))
        return found.map(torch.zeros_like) if self.stands_for_nothing == "zeros" else found

    def skipping(self, layers: int) -> Joint:
        """The same encoders with the CLIPs read so many layers earlier ("clip skip")."""
        return replace(self, clips=tuple(clip.skipping(layers) for clip in self.clips))

    def with_tokens(self, rows: Mapping[str, Sequence[Tensor]]) -> Joint:
        """The same encoders with new words, each with rows (n, D) for every CLIP in order; this one stays as it is."""
        for word, vectors in rows.items():
            if len(vectors) != len(self.clips) or len({len(part) for part in vectors}) != 1:
                raise InputError(f"the new token {word} needs as many vectors for each of {len(self.clips)} encoders")
        clips = tuple(
            clip.with_tokens({word: vectors[i] for word, vectors in rows.items()}) for i, clip in enumerate(self.clips)
        )
        return replace(self, clips=clips)

    def to(self, device: str | torch.device) -> Joint:
        """Move all networks, in place."""
        for part in self._parts():
            part.to(device)
        return self

    def save(self, root: Path) -> None:
        """Write every encoder's folders."""
        for part in self._parts():
            part.save(root)

    def _parts(self) -> tuple[Clip | T5 | NoT5, ...]:
        return (*self.clips, *((self.t5,) if self.t5 else ()))


def _tokens(found: Conditioning) -> Tensor:
    if found.tokens is None:
        raise ValueError("an encoder that returns no tokens cannot be joined")
    return found.tokens
