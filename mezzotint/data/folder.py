"""A training folder in memory: pixels, captions, labels, masks and condition pictures, decoded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint import images
from mezzotint.data import buckets, metadata
from mezzotint.data.buckets import Size
from mezzotint.data.manifest import Manifest, manifest
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

NO_LABEL = -1
FLIPS: dict[str, tuple[int, ...]] = {"horizontal": (-1,), "vertical": (-2,)}
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes and resizes outside of Python's lock


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """N images of one size as bytes (a quarter of what floats take), with everything their rows say."""

    folder: Path
    names: tuple[str, ...]
    captions: tuple[str, ...]
    labels: Tensor  # (N,) int64, NO_LABEL where the row gives none
    bytes: Tensor  # (N, C, H, W) uint8
    masks: Tensor  # (M, 1, H, W) bool, the masks that exist
    mask_of: Tensor  # (N,) int64 index into masks, NO_LABEL where an image has none
    controls: Tensor  # (M, 3, H, W) uint8, the condition pictures that exist
    control_of: Tensor  # (N,) int64 index into controls, NO_LABEL where an image has none
    original: Tensor  # (N, 2) int64 width and height of the file
    crop: Tensor  # (N, 2) int64 left and top of what was cut out of the picture, in pixels of its scaled copy
    manifest: Manifest  # of the whole folder, also where these images are one bucket of it

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, indices: Tensor, flip: tuple[int, ...] = ()) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1], mirrored along the dimensions `flip`."""
        chosen = self.bytes[indices].float() / 127.5 - 1
        return chosen.flip(flip) if flip else chosen

    def hints(self, indices: Tensor, flip: tuple[int, ...] = ()) -> Tensor:
        """Condition pictures (B, 3, H, W) float32 in [0, 1], mirrored alike; InputError names an image without one."""
        places = self.control_of[indices]
        if bool((places == NO_LABEL).any()):
            name = self.names[int(indices[places == NO_LABEL][0])]
            raise InputError(f'{self.folder / name} has no condition picture: add "control" to its line.')
        chosen = self.controls[places].float() / 255
        return chosen.flip(flip) if flip else chosen


def read(folder: Path, size: Size, channels: int, classes: int | None = None) -> ImageFolder:
    """Decode a training folder at (width, height), `channels` 1 or 3; `classes` is how many labels there may be.

    A picture of another shape is scaled until it covers the size, and its centre cut out; its mask and its condition
    picture go with it. InputError names the line of metadata.jsonl for a label out of range, a broken image or mask.
    """
    return read_buckets(folder, [size], channels, classes)[0]


def read_buckets(
    folder: Path, sizes: Sequence[Size], channels: int, classes: int | None = None
) -> tuple[ImageFolder, ...]:
    """The same with every picture at that of the sizes whose aspect ratio is nearest: one ImageFolder a size in use.

    They come in the order of `sizes`, their images in that of metadata.jsonl, and share the manifest of the folder.
    """
    import torch

    folder = Path(folder)
    rows = metadata.read(folder)
    for row in rows:
        if classes is not None and row.label is not None and row.label >= classes:
            where = f"{folder / metadata.METADATA}, line {row.line}"
            raise InputError(f"{where}: label {row.label} is out of range; the network has classes 0 to {classes - 1}.")
    original = torch.tensor(_each(lambda i: _size(folder, rows[i]), len(rows)))
    bucket = buckets.assign(original, sizes)
    whole = manifest(folder, rows)
    found: list[ImageFolder] = []
    for place, size in enumerate(sizes):
        members = (bucket == place).nonzero().flatten()
        if len(members):
            chosen = [rows[i] for i in members.tolist()]
            found.append(_decoded(folder, chosen, original[members], size, channels, whole))
    return tuple(found)


def mirrorings(flips: list[str]) -> list[tuple[int, ...]]:
    """Every combination of the named flips as dimensions to mirror, the unchanged image first: 1, 2 or 4 of them."""
    found: list[tuple[int, ...]] = [()]
    for name in flips:
        found += [dims + FLIPS[name] for dims in found]
    return found


def covering(original: Size, size: Size) -> tuple[Size, Size]:
    """Width and height of a picture scaled to cover `size`, and the left and top of the centre to cut, in its pixels.

    Only a difference that is left after rounding to whole pixels is cut: the same aspect ratio is never cut.
    """
    (width, height), (across, down) = original, size
    if width * down >= height * across:
        scaled = max(across, round(width * down / height)), down
    else:
        scaled = across, max(down, round(height * across / width))
    return scaled, ((scaled[0] - across) // 2, (scaled[1] - down) // 2)


def _decoded(
    folder: Path, rows: list[metadata.Row], original: Tensor, size: Size, channels: int, whole: Manifest
) -> ImageFolder:
    import torch

    width, height = size
    mask_of, control_of = _numbered([row.mask for row in rows]), _numbered([row.control for row in rows])
    pixels = torch.empty((len(rows), channels, height, width), dtype=torch.uint8)
    masks = torch.empty((int(mask_of.max()) + 1, 1, height, width), dtype=torch.bool)
    controls = torch.empty((int(control_of.max()) + 1, 3, height, width), dtype=torch.uint8)
    cuts = [covering((w, h), size) for w, h in original.tolist()]

    def decode(i: int) -> None:
        row, cut = rows[i], cuts[i]
        with _naming(folder, row):
            picture = images.read(folder / row.file_name)
            pixels[i] = _bytes(picture, channels, size, cut)
            if row.mask is not None:
                masks[mask_of[i]] = _bytes(_like(picture, folder, row, row.mask), 1, size, cut, mask=True) >= 128
            if row.control is not None:
                controls[control_of[i]] = _bytes(_like(picture, folder, row, row.control), 3, size, cut)

    _each(decode, len(rows))
    return ImageFolder(
        folder=folder,
        names=tuple(row.file_name for row in rows),
        captions=tuple(row.text for row in rows),
        labels=torch.tensor([NO_LABEL if row.label is None else row.label for row in rows]),
        bytes=pixels,
        masks=masks,
        mask_of=mask_of,
        controls=controls,
        control_of=control_of,
        original=original,
        crop=torch.tensor([corner for _, corner in cuts]),
        manifest=whole,
    )


def _bytes(picture: Image, channels: int, size: Size, cut: tuple[Size, Size], mask: bool = False) -> Tensor:
    """(channels, H, W) uint8 of what `cut` leaves; only that is computed, however long the picture."""
    import numpy as np
    import torch
    from PIL import Image as pil

    (across, down), (left, top) = cut
    x, y = picture.width / across, picture.height / down  # pixels of the file for one of the scaled picture
    right, bottom = min((left + size[0]) * x, picture.width), min((top + size[1]) * y, picture.height)
    converted = picture.convert("L" if channels == 1 else "RGB")
    rule = pil.Resampling.BOX if mask else pil.Resampling.LANCZOS
    array = np.array(converted.resize(size, rule, box=(left * x, top * y, right, bottom)))
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1))


def _like(picture: Image, folder: Path, row: metadata.Row, name: str) -> Image:
    """A mask or condition picture: of any size, but of its image's shape to within a pixel."""
    other = images.read(folder / name)
    (width, height), (across, down) = picture.size, other.size
    if abs(across * height - down * width) > max(width, height):
        raise InputError(
            f"{name} is {across}x{down}, another shape than {row.file_name} with {width}x{height}: it cannot say where."
        )
    return other


def _size(folder: Path, row: metadata.Row) -> Size:
    from PIL import Image as pil

    path = folder / row.file_name
    with _naming(folder, row):
        try:
            with pil.open(path) as opened:
                return opened.size
        except (OSError, ValueError, SyntaxError, pil.DecompressionBombError):
            return images.read(path).size  # which says what is wrong


def _numbered(names: list[str | None]) -> Tensor:
    import torch

    there = torch.tensor([name is not None for name in names])
    return torch.where(there, there.cumsum(0) - 1, NO_LABEL)


def _each(work: Callable[[int], Any], count: int) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(count)))


@contextmanager
def _naming(folder: Path, row: metadata.Row) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{folder / metadata.METADATA}, line {row.line}: {error}") from error
