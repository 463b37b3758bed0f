"""The training images as the copy check needs them: thumbprints and small pixels, computed once and kept in a file.

python -m mezzotint.evaluate.reference MODEL TRAINING_FOLDER
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mezzotint import files, images
from mezzotint.backbones import features, thumbprints
from mezzotint.backbones.features import Features
from mezzotint.contract import read_contract
from mezzotint.errors import InputError
from mezzotint.evaluate.copies import Pixels


@dataclass(frozen=True, slots=True)
class Reference:
    """Training images by name, their thumbprints (T, 640) and grey pixels (T, H, W)."""

    digest: str  # SHA-256 over names and contents of the images
    names: tuple[str, ...]
    prints: Features
    pixels: Pixels


def grey(paths: Sequence[Path], width: int, height: int) -> Pixels:
    """Image files as grey pixels (N, H, W) at width x height."""
    tensors = (images.to_tensor(images.read(path), width, height, 1)[0, 0] for path in paths)
    return np.stack([((t + 1) * 127.5).round().byte().numpy() for t in tensors])


def digest(names: Sequence[str], pixels: Pixels) -> str:
    """The SHA-256 of a set of images: names and pixels, in order; how the files are packed does not matter."""
    return hashlib.sha256(files.sha256_json([*names]).encode() + pixels.tobytes()).hexdigest()


def reference(
    folder: Path,
    width: int,
    height: int,
    shipped: Path | None = None,
    kept: Path | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Reference:
    """The reference of a folder of training images; thumbprints come from the file `shipped` or `kept` that fits.

    Where none fits they are computed, and written to `kept`. A file that speaks of other images, another size or
    another feature is not used, and not an error.
    """
    paths = images.find(folder)
    names, pixels = tuple(path.name for path in paths), grey(paths, width, height)
    name = digest(names, pixels)
    for file in (shipped, kept):
        if file is not None and file.is_file() and (prints := thumbprints.read(file, name, width, height)) is not None:
            return Reference(name, names, prints, pixels)
    # Rounded as the file keeps them, so that a second look gives the same numbers.
    prints = features.of_images(paths, width, height, watch)[1].astype(np.float16).astype(np.float32)
    if kept is not None:
        thumbprints.write(kept, prints, name, width, height)
    return Reference(name, names, prints, pixels)


def ship(model: Path, folder: Path) -> Path:
    """Write the thumbprints of a model's training images beside the model, so that looking for copies is quick."""
    width, height = read_contract(model).size
    found = reference(folder, width, height)
    return thumbprints.write(model / thumbprints.FILE, found.prints, found.digest, width, height)


if __name__ == "__main__":
    try:
        print(ship(Path(sys.argv[1]), Path(sys.argv[2])))
    except IndexError:
        sys.exit("usage: python -m mezzotint.evaluate.reference MODEL TRAINING_FOLDER")
    except InputError as error:
        sys.exit(f"mezzotint: {error}")
