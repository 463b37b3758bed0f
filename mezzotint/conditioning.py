"""What steers a network besides the noisy input and the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

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
    hints: tuple[Tensor, ...] | None = None  # what each control network sees: (B, 3, H, W) pixels or (B, C, h, w)
    control: tuple[Tensor, ...] | None = None  # what control networks add to the backbone's features, block by block
    references: tuple[Tensor, ...] | None = None  # (B, C, h_k, w_k) latents of pictures to look at
    skip: tuple[int, ...] = ()  # blocks left out, for skip-layer guidance

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same conditioning with `change` applied to every tensor that is present."""

        def changed(value: Any) -> Any:
            return tuple(map(change, value)) if isinstance(value, tuple) else change(value)

        present = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{name: changed(value) for name, value in present.items() if value is not None})


TENSORS = tuple(f.name for f in fields(Conditioning) if f.name != "skip")


def stack(parts: list[Conditioning]) -> Conditioning:
    """Join conditionings along the batch, so that guidance runs as one call; all must carry the same fields."""
    import torch

    joined: dict[str, Any] = {}
    for name in TENSORS:
        values: list[Any] = [getattr(part, name) for part in parts]
        missing = [value is None for value in values]
        if any(missing) and not all(missing):
            raise ValueError(f"conditionings disagree: some carry '{name}' and some do not")
        if all(missing):
            continue
        several = isinstance(values[0], tuple)
        joined[name] = tuple(torch.cat(rows) for rows in zip(*values, strict=True)) if several else torch.cat(values)
    return Conditioning(**joined)
