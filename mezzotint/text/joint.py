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
from mezzotint.text.rows import Words
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

    def with_networks(self, networks: Mapping[str, nn.Module]) -> Joint:
        """The same encoders with other networks in the places of their own."""
        clips = tuple(clip.with_networks(networks) for clip in self.clips)
        return replace(self, clips=clips, t5=self.t5 and self.t5.with_networks(networks))

    def tables(self) -> Mapping[str, Tensor]:
        """Every encoder's table of token vectors, by its folder."""
        return {folder: table for part in self._parts() for folder, table in part.tables().items()}

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """The vectors of the tokens of a text in every table, by folder."""
        return {folder: rows for part in self._parts() for folder, rows in part.vectors(text).items()}

    def with_words(self, words: Words) -> Joint:
        """The same encoders with new words, as many rows of each for every CLIP; this one stays as it is.

        T5 learns those that have rows for it, and reads the letters of the others.
        """
        for word, rows in words.items():
            counts = [len(rows[clip.folder]) for clip in self.clips if clip.folder in rows]
            if len(counts) != len(self.clips) or len(set(counts)) != 1:
                raise InputError(f"the new word {word} needs as many vectors for each of {len(self.clips)} encoders")
        t5 = self.t5
        if isinstance(t5, T5) and (own := {word: rows for word, rows in words.items() if t5.folder in rows}):
            t5 = t5.with_words(own)
        return replace(self, clips=tuple(clip.with_words(words) for clip in self.clips), t5=t5)

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """A reading for each, in order."""
        return tuple(reading for part in self._parts() for reading in part.readings(digests))

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes in the first CLIP, start and end included, nothing cut; T5 has more room."""
        return self.clips[0].lengths(prompts)

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
