"""What a caller may ask for: checked before it is accepted, and kept as plain JSON until it is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from mezzotint.errors import InputError
from mezzotint.request import Request
from mezzotint.sampling import SAMPLERS

MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
KINDS = ("PNG", "JPEG", "WEBP")  # that are decoded at all
BYTES, PIXELS = 20_000_000, 20_000_000  # of an uploaded picture

Text = Annotated[str, Field(max_length=4000)]
Side = Annotated[int, Field(ge=16, le=4096)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Scale = Annotated[float, Field(ge=-4.0, le=4.0)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]
Name = Annotated[str, Field(pattern=r"^[\w.-]{1,80}$")]


class Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Added(Plain):
    """An adapter or a control network by the name that the server has it under."""

    name: Name
    weight: Scale = 1.0


class Wish(Plain):
    """What every route asks for in the same words."""

    negative: Text = ""
    label: Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=200)] | None = None
    sampler: Annotated[str, Field(max_length=40, json_schema_extra={"enum": list(SAMPLERS)})] | None = None
    steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance: Annotated[float, Field(ge=0.0, le=50.0)] | None = None
    guidance_rescale: Share = 0.0
    strength: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    adapters: Annotated[tuple[Added, ...], Field(max_length=8)] = ()


class Asked(Wish):
    """A request that can be drawn. Files and folders are never named: the server has its models by name."""

    model: Name
    prompt: Text = ""
    seed: Seed
    count: Annotated[int, Field(ge=1, le=16)] = 1
    width: Side | None = None
    height: Side | None = None
    eta: Share | None = None
    control: Annotated[tuple[Added, ...], Field(max_length=4)] = ()
    format: Literal["png", "jpeg", "webp"] = "png"
    previews: bool = False  # show how it looks while it is drawn

    @property
    def media(self) -> str:
        return MEDIA[self.format]

    def request(
        self, files: Mapping[str, Path], image: Image.Image | None = None, mask: Image.Image | None = None,
        control: Sequence[Image.Image] = (),
    ) -> Request:  # fmt: skip
        """The same as `generate` takes it; `files` are the server's adapters and control networks by name."""
        if len(control) != len(self.control):
            raise InputError(f"{len(self.control)} control networks need as many pictures, not {len(control)}")
        return Request(
            prompt=self.prompt, negative=self.negative, label=self.label, count=self.count, seed=self.seed,
            width=self.width, height=self.height, sampler=self.sampler, steps=self.steps, eta=self.eta,
            guidance=self.guidance, guidance_rescale=self.guidance_rescale, image=image, mask=mask,
            strength=self.strength, lora=[(named(files, each.name), each.weight) for each in self.adapters],
            control=[(named(files, each.name), picture, each.weight)
                     for each, picture in zip(self.control, control, strict=True)],
        )  # fmt: skip


def named(files: Mapping[str, Path], name: str) -> Path:
    if name not in files:
        raise InputError(f"this server has no adapter {name!r}: it has {', '.join(sorted(files)) or 'none'}")
    return files[name]


def opened(data: bytes, what: str) -> Image.Image:
    """An uploaded picture, looked at before it is decoded; InputError where it is none, too large, or damaged."""
    if len(data) > BYTES:
        raise InputError(f"{what} has {len(data)} bytes: at most {BYTES} are taken")
    try:
        picture = Image.open(io.BytesIO(data), formats=KINDS)
        if picture.width * picture.height > PIXELS:
            raise InputError(f"{what} is {picture.width}x{picture.height}: at most {PIXELS} pixels are taken")
        picture.load()
    except Image.DecompressionBombError as error:
        raise InputError(f"{what} is too large: at most {PIXELS} pixels are taken") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{what} is no intact PNG, JPEG or WebP picture") from error
    return picture
