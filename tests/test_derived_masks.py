"""Derived masks on pictures whose defects are known: planted lines and areas are found, healthy pictures stay empty."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as pil

from mezzotint.data import derived_masks, masks, metadata, solar_cells
from mezzotint.data.derived_masks import HealthyModel, Judge, candidates, line_bank, line_response, normalised
from mezzotint.errors import InputError

SIZE = 64


def healthy(rng: np.random.Generator) -> np.ndarray:
    """A cell with busbars, shading of random slope and grain: rank four and noise."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    level = rng.uniform(140, 200)
    picture = level * (1 + rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.15, 0.15) * y)
    picture[14:16] *= rng.uniform(0.5, 0.7)
    picture[48:50] *= rng.uniform(0.5, 0.7)
    return np.clip(picture + rng.normal(0, 1.5, picture.shape), 0, 255).astype(np.uint8)


def cracked(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same with a dark diagonal line two pixels wide, and where it is."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    offset = rng.integers(-12, 12)
    line = (np.abs(x - y - offset) <= 1) & (x > 12) & (x < 52) & (y > 12) & (y < 52)
    return np.where(line, healthy(rng) * 0.7, healthy(rng)).astype(np.uint8), line


def shaded(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same with a dark corner triangle, and where it is."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    area = (x + y < rng.integers(30, 40)) & (x > 2) & (y > 2)
    return np.where(area, healthy(rng) * 0.3, healthy(rng)).astype(np.uint8), area


@pytest.fixture(scope="module")
def model() -> HealthyModel:
    rng = np.random.default_rng(0)
    return HealthyModel.fit(normalised(np.stack([healthy(rng) for _ in range(60)])), rank=6)


def test_a_line_of_unit_depth_answers_one() -> None:
    bank = line_bank()
    for i in (0, 8):  # along x, along y
        picture = torch.zeros(1, 1, 41, 41)
        (picture[..., 19:22, :] if i == 0 else picture[..., :, 19:22]).fill_(1.0)
        response = torch.nn.functional.conv2d(picture, bank[i : i + 1], padding=9)
        assert response[0, 0, 20, 20].item() == pytest.approx(1.0, abs=0.15)  # a sampled filter, a line of three pixels
    flat = torch.full((1, 41, 41), 0.7)
    assert line_response(flat).abs().max() < 1e-5


def test_counterfactual_is_healthy_where_the_defect_is(model: HealthyModel) -> None:
    picture, area = shaded(np.random.default_rng(1))
    residual = model.residual(normalised(picture[None]))[0].numpy()
    inner = area & (np.add(*np.mgrid[0:SIZE, 0:SIZE]) < 28)
    outside = ~area
    assert residual[inner].mean() < -0.5  # a fit that followed the defect would be near 0
    assert abs(residual[outside].mean()) < 0.02


def test_residual_of_the_full_rank_span_is_zero() -> None:
    rng = torch.Generator().manual_seed(0)
    pictures = torch.rand(5, 16, 16, generator=rng)
    fitted = HealthyModel.fit(pictures, rank=4)  # five pictures span four directions about their mean
    assert fitted.residual(pictures, iterations=1).abs().max() < 0.05


@pytest.mark.parametrize(("plant", "kind"), [(cracked, "crack"), (shaded, "inactive")])
def test_planted_defects_are_found(model: HealthyModel, plant, kind: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(4):
        picture, truth = plant(rng)
        (found,) = candidates(model, normalised(picture[None]))
        union = np.any([c.mask for c in found if c.kind == kind], axis=0)
        overlap = (union & truth).sum() / truth.sum()
        assert overlap > 0.6, f"only {overlap:.0%} of a planted {kind} found"
        stray = union & ~masks.dilate(truth, 4)  # the filters are 9 pixels long: they reach past a line's ends
        assert stray.sum() < 0.1 * truth.sum()


def test_judge_keeps_its_false_alarm_rate() -> None:
    rng = np.random.default_rng(3)
    sound = [[rng.normal(0, 1, 3).astype(np.float32) for _ in range(rng.integers(0, 4))] for _ in range(400)]
    broken = [[rng.normal(1.5, 1, 3).astype(np.float32) for _ in range(rng.integers(1, 4))] for _ in range(200)]
    judge = Judge.fit(sound, broken, 0.05)
    alarms = np.mean([any(judge.score(f) > judge.threshold for f in image) for image in sound])
    hits = np.mean([any(judge.score(f) > judge.threshold for f in image) for image in broken])
    assert alarms <= 0.05 and hits > 0.5


def test_derive_writes_a_training_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = []
    for i in range(60):
        picture = healthy(rng) if i < 40 else cracked(rng)[0] if i < 50 else shaded(rng)[0]
        pil.fromarray(picture).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a cell", "type": "mono", "probability": float(i >= 40)})
    metadata.write(tmp_path, rows)
    with pytest.raises(InputError, match="no poly"):
        derived_masks.derive(tmp_path, tmp_path / "none", types=("mono", "poly"))
    counts = derived_masks.derive(tmp_path, tmp_path / "out", types=("mono",))
    assert counts["mono healthy"] == 40 and counts["mono crack"] >= 8 and counts["mono inactive"] >= 8
    written = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    for row in written:
        kind = solar_cells.CLASSES[row["label"]].split()[1]
        assert ("mask" in row) == (kind != "healthy")
        if kind != "healthy":
            assert row["mask_origin"] == "derived" and (tmp_path / "out" / row["mask"]).is_file()


def test_a_folder_without_types_is_refused(tmp_path: Path) -> None:
    pil.new("L", (8, 8)).save(tmp_path / "a.png")
    metadata.write(tmp_path, [{"file_name": "a.png", "text": ""}])
    with pytest.raises(InputError, match="type"):
        derived_masks.derive(tmp_path, tmp_path / "out")
