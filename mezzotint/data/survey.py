"""What the files of a training folder say of themselves, each decoded once; a broken one stops nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mezzotint import files, images
from mezzotint.data import metadata
from mezzotint.data.buckets import Size
from mezzotint.data.likeness import SIDE
from mezzotint.data.metadata import Row
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes and resizes outside of Python's lock
ORIENTATION = 0x0112  # the EXIF tag
TINT = 2  # levels between the channels of a small copy up to which it counts as grey

Part = Literal["row", "image", "mask", "control"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A line of metadata.jsonl, or a file that it names, which training cannot use."""

    part: Part
    name: str  # the file, or "metadata.jsonl, line 3"
    why: str  # what is wrong and what to do


@dataclass(frozen=True, slots=True)
class Mask:
    """What a mask covers."""

    size: Size
    area: float  # share of it that is white
    digest: str  # SHA-256 of what is white


@dataclass(frozen=True, slots=True)
class Picture:
    """One image that was decoded, with what training will not tell of it."""

    row: Row
    size: Size
    mode: str  # Pillow's name for how the file stores a pixel
    digest: str  # SHA-256 of the pixels: equal for equal pictures, whatever the format of their files
    file_digest: str
    small: NDArray[np.uint8]  # (SIDE, SIDE) grey copy
    grey: bool  # no colour to speak of
    blank: bool  # one colour everywhere
    transparent: bool  # some of it is not opaque
    turned: bool  # its EXIF data asks viewers to turn it, which training does not
    mask: Mask | None


@dataclass(frozen=True, slots=True)
class Survey:
    """A training folder: the pictures that can be used, and what is wrong with the rest."""

    folder: Path
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]


def survey(folder: Path, watch: Callable[[int, int], None] | None = None) -> Survey:
    """Read a whole training folder with several threads; `watch(done, all)` follows.

    InputError only where there is no folder, no metadata.jsonl or nothing in it.
    """
    folder = Path(folder)
    rows, unreadable = metadata.scan(folder)
    found = [Problem("row", f"{metadata.METADATA}, line {line}", why) for line, why in unreadable]
    pictures: list[Picture] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for done, (picture, wrong) in enumerate(pool.map(partial(_look, folder), rows), start=1):
            found += wrong
            if picture is not None:
                pictures.append(picture)
            if watch is not None:
                watch(done, len(rows))
    return Survey(folder, tuple(pictures), tuple(found))


def _look(folder: Path, row: Row) -> tuple[Picture | None, list[Problem]]:
    from PIL import Image as pil

    path = folder / row.file_name
    problems: list[Problem] = []
    try:
        image = images.read(path)
        with pil.open(path) as stored:  # only its header is read here
            mode = stored.mode
    except InputError as error:
        return None, [Problem("image", row.file_name, str(error))]
    mask = None
    beside: tuple[tuple[Part, str | None], ...] = (("mask", row.mask), ("control", row.control))
    for part, name in beside:
        try:
            other = None if name is None else _beside(image, row, folder, name)
        except InputError as error:
            problems.append(Problem(part, str(name), str(error)))
        else:
            mask = _covered(other) if part == "mask" and other is not None else mask
    colours = image.convert("L" if image.mode in ("1", "L", "LA", "La", "F") else "RGB")
    grey, extrema = colours.convert("L"), colours.getextrema()
    tint = np.asarray(colours.resize((SIDE, SIDE), pil.Resampling.BOX)).astype(np.int16).reshape(SIDE, SIDE, -1)
    picture = Picture(
        row=row,
        size=image.size,
        mode=mode,
        digest=_digest(colours),
        file_digest=files.sha256_file(path),
        small=np.asarray(grey.resize((SIDE, SIDE), pil.Resampling.BOX)),
        grey=int(np.ptp(tint, axis=2).max()) <= TINT,
        blank=all(low == high for low, high in np.reshape(extrema, (-1, 2))),
        transparent=_transparent(image),
        turned=image.getexif().get(ORIENTATION, 1) not in (0, 1),
        mask=mask,
    )
    return picture, problems


def _digest(colours: Image) -> str:
    """Of the size and the pixels; a grey picture has the same digest stored as grey or as colour."""
    pixels = np.asarray(colours)
    if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:]).all():
        pixels = np.ascontiguousarray(pixels[..., 0])
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _transparent(image: Image) -> bool:
    if not (image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info):
        return False
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _beside(image: Image, row: Row, folder: Path, name: str) -> Image:
    """A mask or condition picture; of any size, but of its image's shape to within a pixel."""
    other = images.read(folder / name)
    (width, height), (across, down) = image.size, other.size
    if abs(across * height - down * width) > max(width, height):
        raise InputError(
            f"{name} is {across}x{down}, another shape than {row.file_name} with {width}x{height}. Make it fit."
        )
    return other


def _covered(mask: Image) -> Mask:
    white = np.asarray(mask.convert("L")) >= 128
    return Mask(mask.size, float(white.mean()), hashlib.sha256(white.tobytes()).hexdigest())
