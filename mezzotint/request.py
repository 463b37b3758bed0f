"""What a user asks for and what comes back: plain data, the same for Python, command line and server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    Control = tuple[str | Path, Image, float]  # a control network, the picture it follows, how strongly


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
    references: Sequence[Image] = ()  # pictures to look at, for models that can (FLUX.2)
    control: Sequence[Control] = ()  # several add up
    lora: Sequence[tuple[str | Path, float]] = ()  # files with their weights
    embedding: Sequence[str | Path] = ()  # textual-inversion files
    long_prompt: Literal["cut", "chunk"] = "cut"  # what becomes of tokens beyond the encoder's length
    skip_layers: tuple[int, ...] = ()  # skip-layer guidance: blocks to do without in a second look (SD 3.5: 7, 8, 9)
    skip_scale: float = 2.8  # how strongly to move away from that second look
    skip_interval: tuple[float, float] = (0.01, 0.2)  # part of the path where it acts
    original_size: tuple[int, int] | None = None  # width, height SDXL is told the picture had; None: the size asked for
    crop: tuple[int, int] = (0, 0)  # left, top in pixels where SDXL is told the picture was cropped
    aesthetic: float = 6.0  # score the SDXL refiner is told
    negative_aesthetic: float = 2.5  # and for the negative prompt
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
        first, last = self.skip_interval
        if not 0 <= first <= last <= 1:
            raise InputError(f"skip_interval must be two rising fractions of the path, not {first!r}, {last!r}")
        for name in ("skip_scale", "aesthetic", "negative_aesthetic"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be a number, not {getattr(self, name)!r}")
        for name, weights in (("control", [s for _, _, s in self.control]), ("lora", [w for _, w in self.lora])):
            if not all(math.isfinite(weight) for weight in weights):
                raise InputError(f"the weights of {name} must be numbers, not {weights!r}")
        if self.long_prompt not in ("cut", "chunk"):
            raise InputError(f"long_prompt must be cut or chunk, not {self.long_prompt!r}")
        if self.original_size is not None and min(self.original_size) < 1:
            raise InputError(f"original_size must be a width and a height in pixels, not {self.original_size!r}")
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
    """One picture as the file that leaves, with the record of how it came to be; the record is plain JSON data."""

    image: Image
    record: dict[str, Any] = field(default_factory=dict)
    data: bytes = b""  # the file, signed where the policy says so
    media: str = "image/png"
