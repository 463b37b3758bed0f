"""How a family's agreement with the reference library is reported: one row for each kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """Relative errors of a tiny random checkpoint against the reference; None where there is no such part."""

    model: str  # "Stable Diffusion 1.x", "Stable Diffusion 1.x inpainting"
    layouts: tuple[str, ...]  # opened: "folder", "single file"
    backbone: float | None  # largest difference / largest value
    text: float | None = None
    codec: float | None = None
    runs: Mapping[str, float] = field(default_factory=dict[str, float])  # "ddim 20, guidance 7.5" -> error of latents
    original: float | None = None  # the single file's latents against the folder's
