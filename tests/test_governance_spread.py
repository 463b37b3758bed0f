"""The watermark in pixels: how little it changes, what it survives, and that it is not found where it is not."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from mezzotint.errors import InputError
from mezzotint.governance import shading, spread
from mezzotint.governance.shading import Key

KEY, OTHER = Key.of(bytes(range(32))), Key.of(bytes(range(1, 33)))
PAYLOAD = shading.payload_of(KEY, b"abcd")


def texture(seed: int, width: int = 128, height: int = 128, mode: str = "L") -> Image.Image:
    """Grains of several sizes with an edge, about what a cell looks like."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width), 120.0)
    for grain in (2, 5, 11):
        coarse = Image.fromarray(rng.normal(0, 7, (height // grain + 1, width // grain + 1)).astype(np.float32))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[:, width // 3] -= 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def saved(picture: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return Image.open(io.BytesIO(stream.getvalue()))

    return saved


def noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture, dtype=float) + np.random.default_rng(1).normal(0, 8, np.asarray(picture).shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def half(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width // 2, picture.height // 2)).resize(picture.size)


def nonce(i: int) -> bytes:
    return shading.nonce_of(KEY, {}, i)


def test_the_mark_is_slight_and_the_waves_are_those_of_the_cosine_transform() -> None:
    grey = Image.new("L", (64, 48), 128)
    change = np.asarray(spread.marked(grey, KEY, nonce(0), PAYLOAD), dtype=float) - 128
    n = np.arange(8)
    for u, v in ((0, 1), (1, 0), (2, 2), (4, 0), (0, 0), (3, 3)):  # the orthonormal transform, written out
        scale = (1 if u else 0.5**0.5) * (1 if v else 0.5**0.5) / 4
        wave = scale * np.outer(np.cos((2 * n + 1) * u * np.pi / 16), np.cos((2 * n + 1) * v * np.pi / 16))
        found = (change[8:16, 16:24] * wave).sum()
        assert abs(found) == pytest.approx(spread.STRENGTH if (u, v) in spread.WAVES else 0.0, abs=1.2)  # of rounding
    error = np.mean([
        (np.asarray(texture(i), dtype=float) - np.asarray(spread.marked(texture(i), KEY, nonce(i), PAYLOAD))) ** 2
        for i in range(4)
    ])  # fmt: skip
    assert 10 * math.log10(255**2 / error) == pytest.approx(42.6, abs=0.5)


@pytest.mark.parametrize(
    "attack", [lambda p: p, jpeg(80), jpeg(50), half, noisy], ids=["none", "80", "50", "half", "noise"]
)
def test_the_mark_survives(attack: Callable[[Image.Image], Image.Image]) -> None:
    for i in range(6):
        found = spread.read(attack(spread.marked(texture(i), KEY, nonce(i), PAYLOAD)), KEY, nonce(i), PAYLOAD)
        assert found.found() and found.accuracy > 0.75


def test_a_piece_cut_out_is_found_with_its_place() -> None:
    for i, box in enumerate(((12, 12, 116, 116), (3, 40, 99, 128), (0, 0, 64, 64))):
        piece = spread.marked(texture(i), KEY, nonce(i), PAYLOAD).crop(box)
        found = spread.read(piece, KEY, nonce(i), PAYLOAD, size=(128, 128))
        assert found.found() and found.accuracy > 0.75
        plain = spread.read(texture(i).crop(box), KEY, nonce(i), PAYLOAD, size=(128, 128))
        assert not plain.found()


def test_unmarked_pictures_are_never_found_and_the_bound_on_chance_holds() -> None:
    picture = texture(0)
    readings = [spread.read(picture, KEY, nonce(i), PAYLOAD) for i in range(1500)]
    accuracy = np.array([each.accuracy for each in readings])
    assert abs(accuracy.mean() - 0.5) < 4 * 0.5 / (64 * 1500) ** 0.5
    chance = np.exp([each.log_chance for each in readings])
    for level in (0.3, 0.1, 0.01):
        assert (chance <= level).mean() <= level
    marked = spread.marked(picture, OTHER, nonce(0), PAYLOAD)
    assert not spread.read(marked, KEY, nonce(0), PAYLOAD).found()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_mask_keeps_what_is_black_to_the_bit(mode: str) -> None:
    picture = texture(2, 160, 120, mode)
    mask = Image.new("L", (160, 120), 0)
    mask.paste(255, (10, 6, 152, 114))
    marked = spread.marked(picture, KEY, nonce(2), PAYLOAD, mask)
    before, after = (np.asarray(each.convert("RGBA")).astype(int) for each in (picture, marked))
    outside = np.asarray(mask) == 0
    assert (before[outside] == after[outside]).all() and (before[..., 3] == after[..., 3]).all()
    assert (before[~outside] != after[~outside]).mean() > 0.4
    assert spread.read(marked, KEY, nonce(2), PAYLOAD).found()


def test_a_picture_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(InputError, match="too small for a watermark"):
        spread.marked(Image.new("L", (7, 100)), KEY, nonce(0), PAYLOAD)
