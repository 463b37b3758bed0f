"""The solar-cell package as training folders: the split is fixed, complete, stratified, and keeps sisters together."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.data import folder, metadata, solar_cells
from mezzotint.data.solar_cells import Cell
from mezzotint.errors import InputError

installed = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs elpv-dataset")


@installed
def test_the_package_holds_what_its_paper_says() -> None:
    cells = solar_cells.cells()
    assert len(cells) == 2624
    counts = [sum(round(3 * c.probability) == p for c in cells) for p in range(4)]
    assert counts == [1508, 295, 106, 715]
    assert sum(c.type == "mono" for c in cells) == 588 + 117 + 56 + 313
    assert solar_cells.CLASSES[4] == "poly healthy" and solar_cells.CLASSES.index("mono finger") == 3


def test_an_absent_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install elpv-dataset"):
        solar_cells.cells()


def test_sisters_are_found_through_defects_and_brightness() -> None:
    rng = np.random.default_rng(0)
    grains = [np.kron(rng.integers(90, 160, (20, 20)), np.ones((15, 15))) for _ in range(3)]
    darker, cracked = grains[0] * 0.8 + 5, grains[0].copy()
    cracked[100:110, 40:260] = 0
    pictures = [Image.fromarray(a.astype(np.uint8)) for a in (*grains, darker, cracked)]
    groups = solar_cells.sisters(pictures)
    assert sorted(sorted(group) for group in groups) == [[0, 3, 4], [1], [2]]


def test_the_split_keeps_groups_whole_and_proportions_close() -> None:
    rng = np.random.default_rng(1)
    kinds = [(str(rng.choice(["mono", "poly"])), int(rng.integers(4)) / 3) for _ in range(600)]
    found = [Cell(Path(f"cell{i:04d}.png"), p, t) for i, (t, p) in enumerate(kinds)]
    groups = [list(range(0, 12)), list(range(12, 15)), *[[i] for i in range(15, 600)]]
    parts = solar_cells.split(found, groups)
    assert sorted(i for part in parts.values() for i in part) == list(range(600))
    for group in groups:
        assert sum(bool(set(group) & set(part)) for part in parts.values()) == 1
    for name, share in solar_cells.SPLITS.items():
        for kind in set(kinds):
            there = sum(kinds[i] == kind for i in parts[name])
            assert abs(there - share * kinds.count(kind)) <= 4, (name, kind)
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    assert solar_cells.split(found, shuffled) == parts  # the order of discovery does not matter


@installed
def test_export_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solar_cells.cells()
    chosen = whole[::150]
    monkeypatch.setattr(solar_cells, "cells", lambda: chosen)
    folders = solar_cells.export(tmp_path, size=64)
    rows = {name: metadata.rows(path) for name, path in folders.items()}
    names = [row["file_name"] for part in rows.values() for row in part]
    assert sorted(names) == sorted(cell.path.name for cell in chosen)
    by_name = {cell.path.name: cell for cell in chosen}
    for part in rows.values():
        for row in part:
            cell = by_name[row["file_name"]]
            assert (row["type"], row["probability"]) == (cell.type, cell.probability)
            assert row.get("label") == ({"mono": 0, "poly": 4}[cell.type] if cell.probability == 0 else None)
    first = rows["train"][0]["file_name"]
    expected = Image.open(by_name[first].path).convert("L").resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(Image.open(folders["train"] / first)), np.asarray(expected))
    images = folder.read(folders["train"], (64, 64), 1, classes=len(solar_cells.CLASSES))
    again = solar_cells.export(tmp_path / "again", size=64)
    rows_again = metadata.read(again["train"])
    assert [row.file_name for row in rows_again] == list(images.names)
    for name in images.names:
        digests = {hashlib.sha256((where["train"] / name).read_bytes()).hexdigest() for where in (folders, again)}
        assert len(digests) == 1
