"""A training folder in memory: pixels, captions, labels and masks, decoded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint import images
from mezzotint.data import metadata
from mezzotint.data.manifest import Manifest, manifest
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

NO_LABEL = -1
FLIPS: dict[str, tuple[int, ...]] = {"horizontal": (-1,), "vertical": (-2,)}


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
    manifest: Manifest

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, indices: Tensor, flip: tuple[int, ...] = ()) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1], mirrored along the dimensions `flip`."""
        chosen = self.bytes[indices].float() / 127.5 - 1
        return chosen.flip(flip) if flip else chosen


def read(folder: Path, size: tuple[int, int], channels: int, classes: int | None = None) -> ImageFolder:
    """Decode a training folder at (width, height), `channels` 1 or 3; `classes` is how many labels there may be.

    InputError names the line of metadata.jsonl for a label out of range, a broken image or mask.
    """
    import torch

    folder = Path(folder)
    width, height = size
    rows = metadata.read(folder)
    pixels = torch.empty((len(rows), channels, height, width), dtype=torch.uint8)
    masks: list[Tensor] = []
    mask_of = torch.full((len(rows),), NO_LABEL)
    for i, row in enumerate(rows):
        where = f"{folder / metadata.METADATA}, line {row.line}"
        if classes is not None and row.label is not None and row.label >= classes:
            raise InputError(f"{where}: label {row.label} is out of range; the network has classes 0 to {classes - 1}.")
        try:
            picture = images.to_tensor(images.read(folder / row.file_name), width, height, channels)
            pixels[i] = ((picture[0] + 1) * 127.5).round().clamp(0, 255).byte()
            if row.mask is not None:
                mask_of[i] = len(masks)
                masks.append(images.mask_to_tensor(images.read(folder / row.mask), width, height)[0].bool())
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return ImageFolder(
        folder=folder,
        names=tuple(row.file_name for row in rows),
        captions=tuple(row.text for row in rows),
        labels=torch.tensor([NO_LABEL if row.label is None else row.label for row in rows]),
        bytes=pixels,
        masks=torch.stack(masks) if masks else torch.zeros((0, 1, height, width), dtype=torch.bool),
        mask_of=mask_of,
        manifest=manifest(folder, rows),
    )


def mirrorings(flips: list[str]) -> list[tuple[int, ...]]:
    """Every combination of the named flips as dimensions to mirror, the unchanged image first: 1, 2 or 4 of them."""
    found: list[tuple[int, ...]] = [()]
    for name in flips:
        found += [dims + FLIPS[name] for dims in found]
    return found
