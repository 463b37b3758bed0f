"""The copy check catches what was copied, lets pass what was not, and says what it cannot say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.backbones import features
from mezzotint.backbones.thumbprints import nearest
from mezzotint.errors import InputError
from mezzotint.evaluate import reference
from mezzotint.evaluate.copies import check, likeness
from mezzotint.evaluate.judge import judge

SIDE = 48


def textures(rng: np.random.Generator, count: int) -> np.ndarray:
    """Smooth random patterns, no two alike, that share two horizontal bars."""
    noise = rng.standard_normal((count, SIDE, SIDE))
    for axis in (1, 2):
        for _ in range(2):
            noise = (noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)) / 3
    noise = 128 + 30 * noise / noise.std()
    noise[:, 10:13] = 20
    noise[:, 34:37] = 20
    return noise.clip(0, 255).astype(np.uint8)


def test_likeness_finds_faded_flipped_and_shifted_copies_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    training = textures(rng, 60)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[14:32, 8:30] = True
    assert likeness(training[7], mask, training).correlation == pytest.approx(1)
    faded = (0.5 * training[7].astype(float) + 60).astype(np.uint8)
    found = likeness(faded, mask, training)
    assert found.index == 7 and found.correlation > 0.99
    assert likeness(training[9][::-1, ::-1], mask, training).index == 9
    moved = likeness(np.roll(training[11], 1, 1), mask, training)
    assert moved.index == 11 and moved.correlation > 0.99
    fresh = [likeness(image, mask, training).correlation for image in textures(rng, 20)]
    assert max(fresh) < 0.9


def test_likeness_says_nothing_about_small_or_flat_areas() -> None:
    training = textures(np.random.default_rng(0), 5)
    small, large = np.zeros((SIDE, SIDE), dtype=bool), np.zeros((SIDE, SIDE), dtype=bool)
    small[20, 10:40] = True
    large[15:30] = True
    assert likeness(training[0], small, training) is None
    assert likeness(np.full((SIDE, SIDE), 7, dtype=np.uint8), large, training) is None


def test_check_names_the_seeded_copy_and_forgives_what_the_source_had() -> None:
    rng = np.random.default_rng(1)
    training, sources = textures(rng, 40), textures(rng, 6)
    masks = np.zeros((6, SIDE, SIDE), dtype=bool)
    masks[:5, 14:30, 5:40] = True
    masks[5, 8:15, :] = True  # mostly the bar, which every cell has at the same place
    painted = sources.copy()
    painted[:, 14:30, 5:40] = textures(rng, 6)[:, 14:30, 5:40]
    painted[2, 14:30, 5:40] = training[17, 14:30, 5:40]
    painted[5] = sources[5]
    prints = rng.standard_normal((86, 12)).astype(np.float32)
    prints[2] = prints[46 + 17] + 0.001
    result = check(
        [f"{i}.png" for i in range(6)], painted, sources, masks, training, prints[:6], prints[6:46], prints[46:]
    )
    assert result.alike == ("2.png",)
    assert result.compared == 6
    assert result.painted_distance[0] < 0.01 < result.real_distance[0]
    assert result.closer_than_real == 1


def test_nearest_equals_the_plain_search() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((7, 5)).astype(np.float32), 3 * rng.standard_normal((30, 5)).astype(np.float32)
    plain = (((a[:, None] - b[None]) / b.std(0)) ** 2).mean(2) ** 0.5
    found = nearest(a, b)
    assert found.index.tolist() == plain.argmin(1).tolist()
    assert found.distance == pytest.approx(plain.min(1), rel=1e-4)


def write_all(folder: Path, pictures: np.ndarray) -> list[Path]:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return sorted(folder.glob("*.png"))


def test_reference_is_kept_and_computed_anew_when_the_images_change(tmp_path: Path) -> None:
    write_all(tmp_path / "train", textures(np.random.default_rng(3), 5))
    kept = tmp_path / "reference.safetensors"
    calls: list[int] = []

    def again() -> reference.Reference:
        return reference.reference(tmp_path / "train", SIDE, SIDE, None, kept, lambda done, all: calls.append(done))

    first, second = again(), again()
    assert calls == [5] and second.digest == first.digest
    assert np.array_equal(second.prints, first.prints)
    direct = features.of_images(sorted((tmp_path / "train").glob("*.png")), SIDE, SIDE)[1]
    assert first.prints == pytest.approx(direct, rel=2e-3, abs=2e-3) and first.prints.shape == (5, 640)
    Image.new("L", (SIDE, SIDE), 9).save(tmp_path / "train" / "000.png")
    assert again().digest != first.digest and calls == [5, 5]
    kept.write_bytes(b"broken")
    with pytest.raises(InputError, match="Delete it"):
        again()


def test_a_shipped_reference_is_used(tiny_folder: Path, tmp_path: Path) -> None:
    write_all(tmp_path / "train", textures(np.random.default_rng(3), 5))
    (tmp_path / "contract.json").write_bytes((tiny_folder / "contract.json").read_bytes())
    shipped = reference.ship(tmp_path, tmp_path / "train")
    calls: list[int] = []
    found = reference.reference(tmp_path / "train", 32, 32, shipped, None, lambda done, all: calls.append(done))
    assert not calls and np.array_equal(found.prints, reference.reference(tmp_path / "train", 32, 32).prints)


def test_judgement_tells_painted_from_unpainted(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    scar = np.zeros((SIDE, SIDE), dtype=bool)
    scar[4:44, 20:26] = True

    def scarred(count: int) -> np.ndarray:
        pictures = textures(rng, count)
        pictures[:, scar] = 5
        return pictures

    train = write_all(tmp_path / "train", scarred(12))
    real = write_all(tmp_path / "real", scarred(24))
    healthy = textures(rng, 12)
    sources = write_all(tmp_path / "good", healthy)
    healthy[:, scar] = 5
    painted = write_all(tmp_path / "painted", healthy)
    training = reference.reference(train[0].parent, SIDE, SIDE)
    found = judge(painted, sources, np.stack([scar] * 12), real, training, SIDE, SIDE)
    for measure in ("frechet", "mmd"):
        close, far = (found["distances"][name][measure] for name in ("painted", "unpainted"))
        assert close["distance"] < 2 * abs(close["floor"]) + 0.02
        assert far["distance"] > 5 * close["distance"]
        assert far["low"] > close["high"]
    assert found["copies"]["images"] == 12 and found["copies"]["compared"] == 0  # a black scar has no pattern
    few = judge(painted[:3], sources[:3], np.stack([scar] * 3), real, None, SIDE, SIDE)
    assert few["distances"] == {} and "copies" not in few
