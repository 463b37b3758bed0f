"""What a user asks for and what comes back: plain data, the same for Python, command line and server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One wish; what is left at None is answered by the model's contract.

    Image i of `count` is drawn with seed + i, whatever else is in the batch. For a model with classes `label` is an
    index or a name, and `negative` a name too (empty: the null class). InputError for values that no model could serve.
    """

    prompt: str = ""
    negative: str = ""
    label: int | str | None = None
    count: int = 1
    seed: int = 0
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None  # share of fresh noise, for samplers that have it
    guidance: float | None = None  # scale; 1 means no guidance
    guidance_rescale: float = 0.0  # 0..1, Lin et al. 2023
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # part of the path that is guided, 0 = first step
    image: Image | None = None  # start from this picture, brought to the size asked for
    strength: float | None = None  # 0..1: share of the path walked from `image`; None: 0.8, with a mask 1
    mask: Image | None = None  # white = repaint; black stays the image, to the bit
    start_noise: Tensor | None = None  # (count, C, h, w) in backbone units, unit variance, before any start scale

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("steps", 1), ("width", 1), ("height", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.seed + self.count > 2**63:
            raise InputError(f"seed {self.seed} is too large: seed + count must stay below 2**63")
        for name, low, high in (("guidance", 0.0, math.inf), ("guidance_rescale", 0.0, 1.0), ("eta", 0.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                span = f"from {low:g} to {high:g}" if high < math.inf else "at least 0"
                raise InputError(f"{name} must be {span}, not {value!r}")
        first, last = self.guidance_interval
        if not 0 <= first <= last <= 1:
            raise InputError(f"guidance_interval must be two rising fractions of the path, not {first!r}, {last!r}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"strength must be above 0 and at most 1, not {self.strength!r}")
        if self.image is None and self.mask is not None:
            raise InputError("a mask says what to repaint of an image, and there is no image: give one (--image)")
        if self.image is not None and self.mask is not None:
            (width, height), (across, down) = self.image.size, self.mask.size
            if width * down != height * across:
                raise InputError(f"the mask is {across}x{down} and the image {width}x{height}: give both one shape")
        if self.image is None and self.strength is not None:
            raise InputError("strength says how far to leave an image, and there is no image: give one (--image)")
        if (self.width is None) != (self.height is None):
            raise InputError("width and height go together: give both or neither")


@dataclass(frozen=True, slots=True)
class Result:
    """What `generate` returns, before governance."""

    images: list[Image]
    latents: Tensor  # (count, C, h, w) in backbone units, before decoding and before unmasked pixels are put back


@dataclass(frozen=True, slots=True)
class Artifact:
    """One picture with the record of how it came to be; the record is plain JSON data."""

    image: Image
    record: dict[str, Any] = field(default_factory=dict)
