"""What steers a network besides the noisy input and the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Everything a backbone may be steered with; a backbone reads what it was built for and refuses to miss it."""

    tokens: Tensor | None = None  # (B, N, D) text states for cross- or joint attention
    mask: Tensor | None = None  # (B, N) True where a token counts
    pooled: Tensor | None = None  # (B, P) one vector for the whole prompt
    time_ids: Tensor | None = None  # (B, K) SDXL's numbers about the picture: original size, crop, target size
    label: Tensor | None = None  # (B,) class index, the last one meaning "no class"
    guidance: Tensor | None = None  # (B,) guidance scale a distilled network was told
    concat: Tensor | None = None  # (B, K, h, w) maps joined to the input channels: mask, masked latents

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same conditioning with `change` applied to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: change(value) for name, value in present.items()})


def stack(parts: list[Conditioning]) -> Conditioning:
    """Join conditionings along the batch, so that guidance runs as one call; all must carry the same fields."""
    import torch

    joined: dict[str, Tensor | None] = {}
    for f in fields(Conditioning):
        values = [getattr(part, f.name) for part in parts]
        missing = [value is None for value in values]
        if any(missing) and not all(missing):
            raise ValueError(f"conditionings disagree: some carry '{f.name}' and some do not")
        joined[f.name] = None if all(missing) else torch.cat(values)
    return Conditioning(**joined)
