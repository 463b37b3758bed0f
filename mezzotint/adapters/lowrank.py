"""What an adapter is: for each module that it touches, a change of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

BACKBONE = "backbone"


@dataclass(frozen=True, slots=True)
class LowRank:
    """W' = W + scale up down (Hu et al. 2021, section 4.1), or with a magnitude m (Liu et al. 2024, eq. 5)

    W' = m (W + scale up down) / |W + scale up down|, where the norm is taken over each output's row.

    A convolution's `down` has the kernel of W, its `up` is pointwise.
    """

    module: str  # dotted name within its part
    down: Tensor  # (r, in) or (r, in, k, k)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float | None = None  # None: the file does not say, which means the rank
    stabilised: bool = False  # scale = alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)
    magnitude: Tensor | None = None  # (out,)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.stabilised else self.rank)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of itself before any model is at hand."""

    format: str  # peft, diffusers, kohya or original
    modules: int  # that the file names
    ranks: tuple[int, ...]  # every one that occurs, ascending
    scales: tuple[float, ...]  # every factor of up down that occurs, ascending
    parameters: int  # numbers stored, alphas apart
    magnitudes: bool  # DoRA
    family: str | None  # that the widths fit
    base: str | None = None  # what the trainer wrote about the model it started from
    prediction: str | None = None  # what the trainer wrote about the prediction: epsilon, v
    words: tuple[str, ...] = ()  # that call the adapter forth, or the most frequent ones of its captions


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank changes by part of a model: backbone, text_encoder, text_encoder_2, ..."""

    parts: Mapping[str, tuple[LowRank, ...]]
    facts: Facts
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
