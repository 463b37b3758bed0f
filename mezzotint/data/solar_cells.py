"""The elpv-dataset package (2,624 electroluminescence images of solar cells) as training folders with a fixed split.

Data: CC-BY-NC-SA-4.0, Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in
Electroluminescence Imagery", EU PVSEC 2018; Deitsch et al., Solar Energy 185, 2019. Labels are of whole images:
a probability of being defective (0, 1/3, 2/3, 1) and a type (mono- or polycrystalline). Where a defect lies, and of
what kind, the data does not say: only certainly healthy cells get a class here, the others none until one is derived.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as pil

from mezzotint import files, images
from mezzotint.data import metadata
from mezzotint.errors import InputError

PACKAGE = "elpv-dataset==1.0.0.post1"
LICENCE = "CC-BY-NC-SA-4.0"
TYPES = ("mono", "poly")
KINDS = ("healthy", "crack", "inactive", "finger")
CLASSES = tuple(f"{cell} {kind}" for cell in TYPES for kind in KINDS)  # index = 4 * type + kind; "no class" is index 8
SPLITS = {"train": 0.80, "validation": 0.06, "test": 0.14}
SISTERS = 0.94  # correlation above which two cells count as one: neighbouring wafers share their crystal grains


@dataclass(frozen=True, slots=True)
class Cell:
    """One image of the package."""

    path: Path
    probability: float  # of being defective: 0, 1/3, 2/3 or 1
    type: str  # "mono" or "poly"

    @property
    def caption(self) -> str:
        crystal = {"mono": "monocrystalline", "poly": "polycrystalline"}[self.type]
        state = {0: "healthy", 1: "possibly defective", 2: "probably defective", 3: "defective"}
        return f"electroluminescence image of a {state[round(3 * self.probability)]} {crystal} solar cell"


def cells() -> list[Cell]:
    """All cells of the installed package, in its own order; the package itself is not imported."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the solar-cell images are not installed. Run: pip install {PACKAGE}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    table = folder / "labels.csv"
    if not table.is_file():
        raise InputError(f"{table} is missing. Run: pip install --force-reinstall {PACKAGE}")
    found: list[Cell] = []
    for number, line in enumerate(table.read_text().splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 3 or parts[2] not in TYPES:
            raise InputError(f"{table}, line {number}: expected file, probability, mono or poly; found {line!r}.")
        found.append(Cell(folder / parts[0], float(parts[1]), parts[2]))
    return found


def sisters(pictures: list[pil.Image], threshold: float = SISTERS) -> list[list[int]]:
    """Indices grouped so that near-duplicates, also over several steps of likeness, are together (union-find).

    Likeness is the correlation of 64x64 thumbnails after row and column medians (busbars, shading), the frame, and
    anything beyond three deviations (the defects themselves) are taken out: what remains is the crystal structure.
    """
    vectors = np.stack([_structure(picture) for picture in pictures])
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    alike = np.triu(vectors @ vectors.T, 1) > threshold
    for a, b in zip(*np.nonzero(alike), strict=True):
        parent[root(int(b))] = root(int(a))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(pictures)):
        groups[root(i)].append(i)
    return list(groups.values())


def _structure(picture: pil.Image) -> np.ndarray:
    a = np.asarray(picture.convert("L").resize((64, 64), pil.Resampling.BOX), dtype=np.float32)
    a = a - np.median(a, axis=1, keepdims=True)
    a = (a - np.median(a, axis=0, keepdims=True))[4:-4, 4:-4]
    a = a - a.mean()
    a = np.clip(a, -3 * a.std(), 3 * a.std()).ravel()
    return a / max(float(np.linalg.norm(a)), 1e-12)


def split(found: list[Cell], groups: list[list[int]]) -> dict[str, list[int]]:
    """Divide cells into train, validation and test, every group whole, each type and probability in proportion.

    Groups are taken largest first, equal sizes in the order of the SHA-256 of their first file name, and each goes to
    the split that is relatively furthest from its share of the group's strata. The same package gives the same split.
    """
    stratum = [(cell.type, round(3 * cell.probability)) for cell in found]
    share = {(name, s): SPLITS[name] * stratum.count(s) for name in SPLITS for s in set(stratum)}
    taken = dict.fromkeys(share, 0)
    result: dict[str, list[int]] = {name: [] for name in SPLITS}

    def order(group: list[int]) -> tuple[int, str]:
        return -len(group), hashlib.sha256(found[group[0]].path.name.encode()).hexdigest()

    def lack(name: str, group: list[int]) -> float:
        return sum(1 - taken[name, stratum[i]] / share[name, stratum[i]] for i in group)

    for group in sorted(groups, key=order):
        name = max(SPLITS, key=lambda name: lack(name, group))
        for i in group:
            taken[name, stratum[i]] += 1
        result[name].extend(group)
    return {name: sorted(indices) for name, indices in result.items()}


def export(out: Path, size: int = 128) -> dict[str, Path]:
    """Write out/train, out/validation and out/test as training folders of grey PNGs; returns the folder of each split.

    A metadata line holds file_name, text, label (certainly healthy cells only), and from the source: type, probability.
    """
    out = Path(out)
    found = cells()
    pictures = [images.read(cell.path).convert("L") for cell in found]
    groups = sisters(pictures)
    folders: dict[str, Path] = {}
    for name, indices in split(found, groups).items():
        folder = folders[name] = out / name
        rows = []
        for i in indices:
            cell, file = found[i], found[i].path.name
            small = pictures[i].resize((size, size), pil.Resampling.LANCZOS)
            files.write_with(folder / file, lambda path, small=small: small.save(path, format="PNG"))
            row = {"file_name": file, "text": cell.caption, "type": cell.type, "probability": cell.probability}
            if cell.probability == 0:
                row["label"] = CLASSES.index(f"{cell.type} healthy")
            rows.append(row)
        metadata.write(folder, rows)
    source = {"package": PACKAGE, "licence": LICENCE, "classes": list(CLASSES), "size": size, "fractions": SPLITS}
    files.write_json(
        out / "dataset.json",
        {**source, "sister groups": [[found[i].path.name for i in group] for group in groups if len(group) > 1]},
    )
    return folders
