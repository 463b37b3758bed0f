"""A painted set end to end on a tiny model: pixels, masks, labels, manifest, report, and going on after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mezzotint.cli.main import main
from mezzotint.data import masks
from mezzotint.families import load
from mezzotint.files import sha256_file
from mezzotint.generate import generate
from mezzotint.request import Request
from mezzotint.synthesis import recipe, region

COUNT = 12


def cells(folder: Path, count: int, seed: int, side: int = 32, scar: bool = False) -> Path:
    """Bright squares on a dark ground with two busbars and some texture; with a dark line where asked for."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        picture = 40 + rng.normal(0, 2, (side, side))
        picture[2:-2, 2:-2] = 170 + rng.normal(0, 6, (side - 4, side - 4))
        picture[[side // 3, 2 * side // 3], 2:-2] = 60
        if scar:
            picture[masks.crack(rng, side, side)] = 15
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"cell{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of twelve images with everything that can be measured."""
    root = tmp_path_factory.mktemp("made")
    good = cells(root / "good", 9, 1, side=48)
    out = root / "set"
    args = [
        "--model",
        str(tiny_folder),
        "--good",
        str(good),
        "--out",
        str(out),
        "--count",
        str(COUNT),
        "--type",
        "poly",
    ]
    real = ["--defects", str(cells(root / "bad", 20, 2, scar=True))]
    training = ["--training", str(cells(root / "train", 12, 3, scar=True))]
    assert main(["synth", *args, *real, *training, "--seed", "4", "--json"]) == 0
    return out


def records(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "manifest.json").read_text())["images"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_outside_the_mask_is_the_source_and_inside_is_what_generate_draws(made: Path, tiny_folder: Path) -> None:
    model = load(tiny_folder)
    assert len(records(made)) == COUNT
    for record in records(made):
        painted, mask = pixels(made / record["file"]), pixels(made / record["mask"]["file"]) == 255
        original = Image.open(record["source"]["file"]).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        assert np.array_equal(painted[~mask], np.asarray(original)[~mask])
        assert (painted[mask] != np.asarray(original)[mask]).mean() > 0.5
        request = Request(
            label=record["class"]["name"], seed=record["seed"], image=original, mask=Image.fromarray(mask),
            sampler=record["sampler"], steps=record["steps"], guidance=record["guidance"],
        )  # fmt: skip
        again = np.asarray(generate(model, request).images[0]).astype(int)
        assert np.abs(again - painted).max() <= 1  # drawn alone, not in a batch: equal up to float rounding
        assert record["mask"]["pixels"] == mask.sum() > 0
        assert not (mask & ~region.inside(np.asarray(original))).any()


def test_the_manifest_leads_back_to_everything(made: Path, tiny_folder: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["model"]["weights"] == load(tiny_folder).contract.weights
    kinds = [record["class"]["kind"] for record in manifest["images"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"crack": 4, "inactive": 4, "finger": 4}
    for record in manifest["images"]:
        assert sha256_file(made / record["file"]) == record["sha256"]
        assert sha256_file(made / record["mask"]["file"]) == record["mask"]["sha256"]
        assert sha256_file(Path(record["source"]["file"])) == record["source"]["sha256"]
        assert record["class"]["name"] == f"poly {record['class']['kind']}"
        assert record["mask"]["origin"] == "procedural"
    assert len({record["seed"] for record in manifest["images"]}) == COUNT
    assert len({record["source"]["file"] for record in manifest["images"]}) == 9  # every good image is used
    assert recipe.read(made / "recipe.toml").model_dump(mode="json") == manifest["recipe"]


def test_coco_is_read_by_pycocotools_and_equals_the_masks(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(made / "annotations" / "coco.json")
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert sorted(names.values()) == ["crack", "finger", "inactive"]
    by_file = {Path(record["file"]).name: record for record in records(made)}
    assert len(coco.getImgIds()) == COUNT
    for image in coco.loadImgs(coco.getImgIds()):
        record = by_file[image["file_name"]]
        union = np.zeros((image["height"], image["width"]), dtype=int)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            decoded = coco.annToMask(annotation)
            rows, columns = np.nonzero(decoded)
            assert annotation["area"] == decoded.sum()
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
            assert names[annotation["category_id"]] == record["class"]["kind"]
            union += decoded
        assert np.array_equal(union, pixels(made / record["mask"]["file"]) // 255)  # parts do not overlap
    capsys.readouterr()


def test_yolo_labels_cover_the_masks(made: Path) -> None:
    names = dict(re.findall(r"^  (\d+): (\w+)$", (made / "data.yaml").read_text(), re.M))
    for record in records(made):
        mask = pixels(made / record["mask"]["file"]) == 255
        covered = np.zeros_like(mask)
        for line in (made / "labels" / f"{Path(record['file']).stem}.txt").read_text().splitlines():
            category, *numbers = line.split()
            assert names[category] == record["class"]["kind"]
            points = np.array(numbers, dtype=float).reshape(-1, 2)
            assert points.min() >= 0 and points.max() <= 1
            corners = (points * (32, 32)).round().astype(int).tolist()
            filled = np.zeros_like(mask)
            for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
                if x0 == x1:
                    filled[min(y0, y1) : max(y0, y1), x0:] ^= True
            covered |= filled
        assert not (mask & ~covered).any()
        assert covered.sum() - mask.sum() <= 0.2 * mask.sum()  # holes are filled, nothing else is added


class Links(HTMLParser):
    """Everything a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_report_is_one_file_with_the_measured_numbers(made: Path) -> None:
    page = (made / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.loaded) == 2 and all(link.startswith("data:image/png;base64,") for link in links.loaded)
    assert "http" not in page.replace("base64", "")[:2000] and "@import" not in page and "url(" not in page
    judgement = json.loads((made / "manifest.json").read_text())["judgement"]
    painted = judgement["distances"]["painted"]["frechet"]
    assert f"{painted['distance']:.3g}" in page and f"{painted['floor']:.3g}" in page
    assert judgement["copies"]["training"] == 12 and judgement["copies"]["images"] == COUNT
    assert f"mezzotint synth {made / 'recipe.toml'}" in page
    for name in ("contact_sheet.png", "real_and_synthetic.png"):
        assert min(pixels(made / name).shape[:2]) > 300


def args_of(made: Path, out: Path) -> list[str]:
    return ["synth", str(made / "recipe.toml"), "--out", str(out), "--json"]


def test_the_recipe_makes_the_same_set_again_and_a_larger_count_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    assert main([*args_of(made, out), "--count", "8"]) == 0
    first = {path.name: (sha256_file(path), path.stat().st_mtime_ns) for path in (out / "images").iterdir()}
    assert main([*args_of(made, out), "--count", str(COUNT)]) == 0
    for name, (digest, when) in first.items():
        path = out / "images" / name
        assert (sha256_file(path), path.stat().st_mtime_ns) == (digest, when)  # finished images are left alone
    ours, theirs = records(out), records(made)
    assert [record["pixels"] for record in ours] == [record["pixels"] for record in theirs]
    assert [record["mask"]["sha256"] for record in ours] == [record["mask"]["sha256"] for record in theirs]
    capsys.readouterr()
    assert main([*args_of(made, out), "--seed", "5"]) == 2
    assert "seed was 4, now 5" in capsys.readouterr().err


def test_a_damaged_image_is_painted_again(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(made, out)
    whole = pixels(out / "images" / "000003.png")
    (out / "images" / "000003.png").write_bytes(b"half")
    (out / "records" / "000005.json").write_text("{")
    assert main(args_of(made, out)) == 0
    assert np.array_equal(pixels(out / "images" / "000003.png"), whole)
    for ours, theirs in zip(records(out), records(made), strict=True):
        again = Path(ours["file"]).stem in ("000003", "000005")  # signed again, which no two times gives the same bytes
        assert (ours["sha256"] == theirs["sha256"]) is not again
        assert {**ours, "sha256": ""} == {**theirs, "sha256": ""}


def test_killed_and_started_again_it_gives_the_same_set(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "mezzotint", *args_of(made, out), "--count", str(COUNT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while process.poll() is None and not list(out.glob("records/*.json")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob("records/*.json")) and not (out / "manifest.json").exists()
    for path in out.glob("*/0*.png"):
        Image.open(path).load()  # whatever is there under its own name is whole
    (out / "images" / ".000001.png.a1b2c3d4.png").write_bytes(b"half")
    assert main(args_of(made, out)) == 0
    assert not [path for path in out.glob("*/.*")]
    assert [record["pixels"] for record in records(out)] == [record["pixels"] for record in records(made)]
