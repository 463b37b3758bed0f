"""The good images to paint on, and of what type each is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mezzotint import files, images
from mezzotint.backbones import features
from mezzotint.data import metadata
from mezzotint.errors import InputError
from mezzotint.synthesis.classes import Class, types

TYPES = "types.safetensors"  # beside the model: thumbprints of images whose type is known
NEIGHBOURS = 5
LOOKED_AT = 32


@dataclass(frozen=True, slots=True)
class Source:
    """A good image: its file, its type, and how the type is known."""

    path: Path
    type: str
    known_by: str  # "asked", "metadata", "measured", or "" where the model knows one type only


def sources(folder: Path, known: Sequence[Class], asked: str | None, model: Path) -> list[Source]:
    """The images of a folder with their types, for a model that knows the classes `known`.

    A type comes from the recipe, else from metadata.jsonl ("type", or a class "label"), else from the majority of the
    five nearest thumbprints that the model carries (on 200 solar cells held out from 500: 99.5 percent right).
    InputError where none of these says it.
    """
    paths, choices = images.find(folder), types(known)
    if asked is not None and asked not in choices:
        raise InputError(f"the model does not know the type '{asked}'; it knows: {', '.join(filter(None, choices))}")
    if len(choices) == 1:
        return [Source(path, choices[0], "") for path in paths]
    if asked is not None:
        return [Source(path, asked, "asked") for path in paths]
    said = _said(folder, known)
    unsaid = [path for path in paths if path not in said]
    measured: dict[Path, str] = {}
    if unsaid:
        if not (model / TYPES).is_file():
            raise InputError(
                f"nothing says of which type {unsaid[0]} is ({', '.join(choices)}). Name it with --type, or write "
                f'"type" into {Path(folder) / metadata.METADATA}.'
            )
        measured = dict(zip(unsaid, nearest_types(unsaid, model / TYPES), strict=True))
    return [
        Source(path, said[path], "metadata") if path in said else Source(path, measured[path], "measured")
        for path in paths
    ]


def _said(folder: Path, known: Sequence[Class]) -> dict[Path, str]:
    if not (Path(folder) / metadata.METADATA).is_file():
        return {}
    by_index, choices = {c.index: c.type for c in known}, types(known)
    found: dict[Path, str] = {}
    for row in metadata.rows(folder):
        named, label = row.get("type"), row.get("label")
        if named in choices:
            found[Path(folder) / str(row.get("file_name"))] = str(named)
        elif label in by_index:
            found[Path(folder) / str(row.get("file_name"))] = by_index[label]
    return found


@dataclass(frozen=True, slots=True)
class Examples:
    """Thumbprints of images whose type is known, as a model carries them."""

    prints: features.Features  # (T, 640)
    types: tuple[str, ...]  # of each
    width: int
    height: int

    def distances(self, prints: features.Features) -> NDArray[np.float64]:
        """Squared distances (N, T) to thumbprints (N, 640), in deviations of the examples per feature."""
        deviation = np.maximum(self.prints.std(0), 1e-6)
        a, b = (prints / deviation).astype(np.float64), (self.prints / deviation).astype(np.float64)
        return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clip(0)


def examples(file: Path) -> Examples:
    """Read a types file."""
    try:
        with safe_open(file, framework="pt") as content:
            facts = content.metadata() or {}
            prints, index = content.get_tensor("prints").float().numpy(), content.get_tensor("types").tolist()
        names, (width, height) = facts["names"].split(","), map(int, facts["size"].split("x"))
        return Examples(prints, tuple(names[i] for i in index), width, height)
    except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
        raise InputError(f"cannot read {file}: {error}. Restore it from the original model folder.") from error


def nearest_types(paths: Sequence[Path], file: Path) -> list[str]:
    """For each image the commonest type among the five nearest thumbprints of a types file."""
    known = examples(file)
    near = known.distances(features.of_images(paths, known.width, known.height)[1]).argsort(1)[:, :NEIGHBOURS]
    return [Counter(known.types[j] for j in row).most_common(1)[0][0] for row in near.tolist()]


def strangers(paths: Sequence[Path], file: Path) -> tuple[int, int]:
    """How many of up to 32 evenly chosen images are unlike all the model's examples, and how many were looked at.

    Unlike: further from the nearest example than 1.5 times what 99 percent of the examples are from each other. With
    120 examples of each type of solar cell: of 31 held-out good cells none, of noise textures and icons all.
    """
    known = examples(file)
    among = known.distances(known.prints)
    np.fill_diagonal(among, np.inf)
    limit = 1.5**2 * np.quantile(among.min(1), 0.99)  # squared
    chosen = [
        paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(LOOKED_AT, len(paths))).round().astype(int))
    ]
    far = known.distances(features.of_images(chosen, known.width, known.height)[1]).min(1) > limit
    return int(far.sum()), len(chosen)


def write_types(file: Path, found: dict[str, list[Path]], width: int, height: int) -> Path:
    """Write a types file from example images of each type."""
    prints = [features.of_images(paths, width, height)[1] for paths in found.values()]
    index = [i for i, part in enumerate(prints) for _ in range(len(part))]
    tensors = {"prints": torch.from_numpy(np.concatenate(prints)).half(), "types": torch.tensor(index)}
    facts = {"names": ",".join(found), "size": f"{width}x{height}"}
    return files.write_with(file, lambda temporary: save_file(tensors, temporary, metadata=facts))
