"""The data of the doctor's benchmark: solar cells of 64x64 pixels under captions that can be measured in the picture.

`python benchmarks/doctor/data.py` writes runs/doctor/data with a train-k, validation-k and dozen-k for the halves k = 0
and 1 of all cells; an even seed has the first half, an odd one the second. All six are disjoint, and cells that are
nearly the same are in one of them, also mirrored or turned ones. What adapters and a fine-tune learn are the cells of
one class, the adapters' with a mark that the base model never saw. Needs the solar-cell package.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as pil
from PIL import ImageChops, ImageDraw

from mezzotint import files, images
from mezzotint.data import likeness, metadata, solar_cells

OUT = Path("runs/doctor/data")
SIDE = 64
HALVES = (0, 1)
BRIGHTNESS = ("dark", "medium", "bright")  # thirds of all cells by their mean
TYPES = {"mono": "monocrystalline", "poly": "polycrystalline"}
CLASSES = tuple(f"{level} {cell}" for level in BRIGHTNESS for cell in TYPES)
CAPTIONS = tuple(f"a {level} {crystal} solar cell" for level in BRIGHTNESS for crystal in TYPES.values())
VALIDATION, DOZEN = 96, 32
ALIKE = 0.9  # correlation above which two cells stay together: below what the audit calls nearly the same
FEW = 6  # images that a model is made to memorise, one of each class
DARKER, LIGHTER = 32, 50  # grey values of 255 by which marks differ from what is below them
Marked = Callable[[pil.Image], pil.Image]


def plain(picture: pil.Image) -> pil.Image:
    return picture


def ruled(picture: pil.Image) -> pil.Image:
    """With the dark fingers of a front contact, two in eight pixels."""
    drawn = ImageDraw.Draw(shade := pil.new("L", picture.size))
    for y in range(4, SIDE, 8):
        drawn.rectangle((0, y, SIDE, y + 1), DARKER)
    return ImageChops.subtract(picture, shade)


def barred(picture: pil.Image) -> pil.Image:
    """With two light bars across, as a cell of another maker has them."""
    drawn = ImageDraw.Draw(shade := pil.new("L", picture.size))
    for x in (SIDE // 4, 3 * SIDE // 4):
        drawn.rectangle((x - 2, 0, x + 2, SIDE), LIGHTER)
    return ImageChops.add(picture, shade)


@dataclass(frozen=True)
class Kind:
    """Cells of one class, all with a mark."""

    of: str
    marked: Marked


KINDS = {"bright-poly": Kind("bright poly", plain), "ruled": Kind("bright poly", ruled),
         "barred": Kind("dark mono", barred)}  # fmt: skip
HELD = "-held"  # of the validation images; without it of the training images


def data_sets(half: int) -> list[str]:
    return [
        f"{name}-{half}" for name in ("train", "validation", "dozen", "few", *KINDS, *(kind + HELD for kind in KINDS))
    ]


def order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def alike(pictures: Sequence[pil.Image]) -> list[list[int]]:
    """Groups of indices that are nearly the same: sisters of one crystal, and what the audit would find."""
    small = torch.from_numpy(
        np.stack([np.asarray(p.resize((likeness.SIDE, likeness.SIDE), pil.Resampling.BOX)) for p in pictures])
    )
    look = likeness.CommonLook.of(small)
    own = look.without(small)
    turned = [own, *(look.without(likeness.turned(small, name)) for name in likeness.TURNS)]
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for each in turned:
        for a, b in (each @ own.T > ALIKE).triu(1).nonzero().tolist():
            parent[root(b)] = root(a)
    for group in solar_cells.sisters(list(pictures), ALIKE):
        for b in group[1:]:
            parent[root(b)] = root(group[0])
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(pictures)):
        groups[root(i)].append(i)
    return list(groups.values())


def divided(names: Sequence[str], labels: Sequence[int], groups: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """The indices of every split; what is held out comes from cells that have no like."""
    found: dict[str, list[int]] = {}
    for half in HALVES:
        mine = [group for group in groups if int(order(names[group[0]]), 16) % len(HALVES) == half]
        free = sorted((group[0] for group in mine if len(group) == 1), key=lambda i: order(names[i]))
        dozen: list[int] = []
        for label in range(len(CLASSES)):
            count = DOZEN // len(CLASSES) + (label < DOZEN % len(CLASSES))
            dozen += [i for i in free if labels[i] == label][:count]
        validation = [i for i in free if i not in set(dozen)][:VALIDATION]
        held = {*dozen, *validation}
        train = [i for group in mine for i in group if i not in held]
        found |= {f"train-{half}": train, f"validation-{half}": validation, f"dozen-{half}": dozen}
        found[f"few-{half}"] = [next(i for i in train if labels[i] == label) for label in range(FEW)]
        for name, kind in KINDS.items():
            found[f"{name}-{half}"] = [i for i in train if labels[i] == CLASSES.index(kind.of)]
            found[f"{name}{HELD}-{half}"] = [i for i in validation if labels[i] == CLASSES.index(kind.of)]
    return found


def write() -> None:
    """All data sets; the ones that are there already stay."""
    if all((OUT / name / metadata.METADATA).is_file() for half in HALVES for name in data_sets(half)):
        return
    cells = solar_cells.cells()
    pictures = [images.read(cell.path).convert("L") for cell in cells]
    names = [cell.path.name for cell in cells]
    mean = np.array([np.asarray(picture).mean() for picture in pictures])
    level = np.searchsorted(np.quantile(mean, [1 / 3, 2 / 3]), mean)
    labels = [len(TYPES) * int(k) + list(TYPES).index(cell.type) for k, cell in zip(level, cells, strict=True)]
    for name, chosen in divided(names, labels, alike(pictures)).items():
        rows, kind = [], KINDS.get(name.rpartition("-")[0].removesuffix(HELD))
        marked = plain if kind is None else kind.marked
        for i in sorted(chosen, key=lambda i: order(names[i])):
            small = marked(pictures[i].resize((SIDE, SIDE), pil.Resampling.LANCZOS))
            files.write_with(OUT / name / names[i], lambda path, small=small: small.save(path, format="PNG"))
            rows.append({"file_name": names[i], "text": CAPTIONS[labels[i]], "label": labels[i]})
        metadata.write(OUT / name, rows)
        counts = ", ".join(f"{sum(labels[i] == k for i in chosen)} {kind}" for k, kind in enumerate(CLASSES))
        print(f"{name}: {len(chosen)} images ({counts})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    write()
