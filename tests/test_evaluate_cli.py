"""The verbs demo and evaluate on small folders: what they prepare, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.cli.demo import prepare
from mezzotint.cli.main import main
from mezzotint.data import masks, metadata


def cells(folder: Path, count: int, seed: int, probability: float) -> list[dict[str, object]]:
    """Small cells with a busbar, scarred where defective; returns their metadata rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for i in range(count):
        picture = 160 + rng.normal(0, 8, (32, 32))
        picture[15:17] = 50
        if probability:
            picture[masks.dilate(masks.crack(rng, 32, 32), 1)] = 10
        name = f"cell{seed}{i:02d}.png"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name)
        rows.append({"file_name": name, "type": ("mono", "poly")[i % 2], "probability": probability})
    return rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What the export of the solar-cell package leaves, in small."""
    root = tmp_path / "data"
    rows = cells(root / "test", 10, 1, 0.0) + cells(root / "test", 18, 2, 1.0) + cells(root / "test", 3, 3, 1 / 3)
    metadata.write(root / "test", rows)
    metadata.write(root / "train", cells(root / "train", 9, 4, 1.0))
    (root / "dataset.json").write_text("{}")
    return root


def test_demo_paints_on_good_cells_and_compares_with_defective_ones(
    data: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    args = ["demo", "--model", str(tiny_folder), "--data", str(data), "--out", str(out), "--count", "9"]
    assert main(args) == 0
    said = capsys.readouterr()
    assert f"Open {out / 'report.html'}" in said.out and "CC-BY-NC-SA-4.0" in said.out
    assert "painting: 6 of 6, done" in said.err  # two batches of three steps; lines, for there is no terminal
    manifest = json.loads((out / "manifest.json").read_text())
    names = {row["file_name"]: row["type"] for row in metadata.rows(data / "test")}
    for record in manifest["images"]:
        source = Path(record["source"]["file"])
        assert source.parent == data / "demo" / "good" and source.name.startswith("cell1")
        assert record["class"]["type"] == names[source.name]
        assert record["class"]["type_known_by"] == "metadata"
    assert manifest["judgement"]["distances"]["real"] == 18
    assert manifest["judgement"]["copies"]["training"] == 9
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_prepared_folders_are_made_once_and_mended(data: Path) -> None:
    good, defects, training = prepare(data, quiet=True)
    assert (len(list(good.glob("*.png"))), len(list(defects.glob("*.png")))) == (10, 18)
    assert training == data / "train"
    when = (good / "metadata.jsonl").stat().st_mtime_ns
    prepare(data, quiet=True)
    assert (good / "metadata.jsonl").stat().st_mtime_ns == when
    next(good.glob("*.png")).unlink()
    prepare(data, quiet=True)
    assert len(list(good.glob("*.png"))) == 10


def test_evaluate_reads_folders_and_sets(
    data: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, defects, _ = prepare(data, quiet=True)
    args = ["evaluate", "--real", str(defects), "--size", "32x32", "--json"]
    cells(tmp_path / "more", 12, 9, 1.0)
    found = {}
    for name, folder in (("same", tmp_path / "more"), ("good", good)):
        assert main([*args, "--synthetic", str(folder)]) == 0
        found[name] = json.loads(capsys.readouterr().out)["distances"]["painted"]["frechet"]
    assert found["good"]["distance"] > 2 * found["same"]["distance"]  # cells without a crack are further from cracks
    assert found["same"]["distance"] < 2 * found["same"]["floor_high"]

    out = tmp_path / "set"
    usual = ["--model", str(tiny_folder), "--good", str(good), "--out", str(out), "--count", "8"]
    assert main(["synth", *usual, "--json"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--real", str(defects), "--synthetic", str(out), "--training", str(data / "train")]) == 0
    said = capsys.readouterr().out
    assert "Frechet distance" in said and "before painting" in said and "painted areas look like" in said

    for wrong, message in (
        (["--synthetic", str(good), "--training", str(good)], "needs masks and sources"),
        (["--synthetic", str(tmp_path / "gone")], "no such folder"),
        (["--synthetic", str(out), "--size", "64x64"], "its own size"),
    ):
        assert main(["evaluate", "--real", str(defects), *wrong]) == 2
        assert message in capsys.readouterr().err
    few = tmp_path / "few"
    cells(few, 3, 5, 1.0)
    assert main([*args, "--synthetic", str(few)]) == 2
    assert "at least 16 real and 8 synthetic" in capsys.readouterr().err


def test_demo_without_a_starter_model_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mezzotint.cli import demo

    monkeypatch.setattr(demo, "STARTER", Path("models") / "no-such-model")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "make starter" in capsys.readouterr().err
