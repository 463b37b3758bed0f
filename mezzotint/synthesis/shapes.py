"""Masks to paint under: drawn by a procedure, given by the user or derived from real images; where they may lie."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as pil

from mezzotint import files, images
from mezzotint.data import masks
from mezzotint.data.masks import Busbars, Mask
from mezzotint.errors import InputError

BANK = "masks.npz"  # beside the model: masks derived from its training images, packed bits by kind
DERIVED_SHARE = 0.5  # of masks that come from the bank where there is one
KEPT = 0.7  # share of a mask that must lie inside the thing
SMALLEST = 10 / 128**2  # of the image
TRIES = 100

Origin = Literal["procedural", "user", "derived"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A mask in its place, and where it comes from."""

    mask: Mask
    origin: Origin
    file: str | None  # of a user's mask


@dataclass(frozen=True, slots=True)
class Shapes:
    """What masks can be drawn from, all at the model's size."""

    width: int
    height: int
    user: dict[str, list[tuple[str, Mask]]] = field(default_factory=dict)  # by kind; "" serves every kind
    derived: dict[str, list[Mask]] = field(default_factory=dict)

    def check(self, kinds: list[str]) -> None:
        """InputError for a kind of defect that no mask can be had for."""
        for kind in kinds:
            if not (self.user.get(kind) or self.user.get("") or self.derived.get(kind) or kind in masks.MASKS):
                raise InputError(
                    f"no masks for '{kind}': shapes are drawn for {', '.join(masks.MASKS)} only. "
                    f"Put masks into a folder MASKS/{kind}/ and name it with --masks."
                )

    def draw(self, kind: str, inside: Mask, busbars: Busbars | None, rng: np.random.Generator) -> Drawn:
        """A mask for a defect of this kind. A user's mask is taken as it lies; others are placed inside the thing."""
        given = self.user.get(kind) or self.user.get("")
        if given:
            name, mask = given[int(rng.integers(len(given)))]
            return Drawn(mask, "user", name)
        bank, shape = self.derived.get(kind), masks.MASKS.get(kind)
        for _ in range(TRIES):
            if bank and (shape is None or rng.random() < DERIVED_SHARE):
                origin, mask = "derived", moved(bank[int(rng.integers(len(bank)))], rng)
            elif shape is not None:
                origin, mask = "procedural", shape(rng, self.width, self.height, busbars)
            else:
                break
            within = mask & inside
            if within.sum() >= max(KEPT * mask.sum(), SMALLEST * mask.size):
                return Drawn(within, origin, None)
        raise InputError(f"found no place for a mask of '{kind}' in {TRIES} tries; give masks with --masks")


def moved(mask: Mask, rng: np.random.Generator) -> Mask:
    """A derived mask mirrored at random and shifted by up to an eighth of the image; what leaves it is cut."""
    turned = mask[:: int(rng.choice((1, -1))), :: int(rng.choice((1, -1)))]
    height, width = mask.shape
    dy, dx = (int(rng.integers(-side // 8, side // 8 + 1)) for side in (height, width))
    result = np.zeros_like(mask)
    result[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = turned[
        max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return result


def shapes(model: Path, folder: Path | None, kinds: list[str], width: int, height: int) -> Shapes:
    """All masks at hand for a model and a user's folder of masks (MASKS/KIND/*.png, or *.png for every kind)."""
    user: dict[str, list[tuple[str, Mask]]] = {}
    if folder is not None:
        for path in images.find(folder):
            parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
            kind = next((kind for kind in kinds if kind.lower() in parts), "")
            user.setdefault(kind, []).append((str(path), read_mask(path, width, height)))
    found = Shapes(width, height, user, read_bank(model / BANK, width, height))
    found.check(kinds)
    return found


def read_mask(path: Path, width: int, height: int) -> Mask:
    """A user's mask, white where a defect is to be painted, at the model's size.

    A pixel counts where at least a quarter of it is white, so that thin lines survive shrinking. InputError for a mask
    of other proportions (it would not lie where it was drawn), and for one that is empty or all white.
    """
    picture = images.read(path).convert("L")
    if abs(picture.width * height - picture.height * width) > 0.02 * picture.width * height:
        raise InputError(
            f"{path} is {picture.width}x{picture.height}, but the model paints {width}x{height}: "
            f"give masks of these proportions"
        )
    if picture.size != (width, height):
        picture = picture.point([255 * (v >= 128) for v in range(256)]).resize((width, height), pil.Resampling.BOX)
        mask = np.asarray(picture) >= 64
    else:
        mask = np.asarray(picture) >= 128
    if not mask.any() or mask.all():
        raise InputError(f"{path} is {'all white' if mask.any() else 'empty'}: white says where to paint a defect")
    return mask


def read_bank(file: Path, width: int, height: int) -> dict[str, list[Mask]]:
    """Derived masks by kind from a model's bank; {} where it carries none."""
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as content:
            if tuple(content["size"].tolist()) != (width, height):
                raise InputError(f"{file} holds masks of another size than the model's {width}x{height}. Delete it.")
            return {
                kind: list(
                    np.unpackbits(content[kind], axis=1, count=width * height).astype(bool).reshape(-1, height, width)
                )
                for kind in content.files
                if kind != "size"
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {file}: {error}. Restore it from the original model folder.") from error


def write_bank(file: Path, bank: dict[str, list[Mask]], width: int, height: int) -> Path:
    """Write derived masks by kind, a bit a pixel."""
    packed = {
        kind: np.packbits(np.stack(found).reshape(len(found), -1), axis=1) for kind, found in bank.items() if found
    }

    def write(path: Path) -> None:
        with open(path, "wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, size=np.array((width, height)), **packed)

    return files.write_with(file, write)
