"""What may happen to a picture on its way. Nothing here is random: a picture is always changed in the same way."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue()))


def halved(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    small = picture.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    return small.resize((width, height), Image.Resampling.LANCZOS)


def cropped(picture: Image.Image) -> Image.Image:
    x, y = picture.width // 10, picture.height // 10
    return picture.crop((x, y, picture.width - x, picture.height - y))


def noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.float64)
    pixels = pixels + np.random.default_rng(0).normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8), picture.mode)


ATTACKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda p: p,
    "JPEG 80": lambda p: jpeg(p, 80),
    "JPEG 50": lambda p: jpeg(p, 50),
    "half size and back": halved,
    "noise, sigma 8": noisy,
    "10 % cropped from each side": cropped,
    "the same, and enlarged back": lambda p: cropped(p).resize(p.size, Image.Resampling.LANCZOS),
}
