"""Training folders, manifests, latent caches: what is read, and what is refused with file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_parts import image_folder

from mezzotint.data import cache, folder, manifest, metadata
from mezzotint.errors import InputError


def write_lines(path: Path, *lines: str) -> None:
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_a_folder_is_read_as_its_files_say(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", 4)
    images = folder.read(data, (16, 16), 1, classes=2)
    assert images.names == ("0.png", "1.png", "2.png", "3.png")
    assert images.captions == ("cell 0", "cell 1", "cell 0", "cell 1")
    assert images.labels.tolist() == [0, 1, 0, 1]
    assert images.mask_of.tolist() == [-1, 0, -1, 1]
    raw = np.asarray(Image.open(data / "3.png"))
    assert torch.equal(images.pixels(torch.tensor([3]))[0, 0], torch.from_numpy(raw.copy()).float() / 127.5 - 1)
    assert torch.equal(images.masks[1, 0], torch.from_numpy(np.asarray(Image.open(data / "mask3.png")) > 0))
    flipped = images.pixels(torch.tensor([3]), (-1,))[0, 0].numpy()
    assert np.array_equal(flipped, np.fliplr(images.pixels(torch.tensor([3]))[0, 0].numpy()))


def test_mirrorings_are_all_combinations() -> None:
    assert folder.mirrorings([]) == [()]
    assert folder.mirrorings(["vertical"]) == [(), (-2,)]
    assert {frozenset(m) for m in folder.mirrorings(["horizontal", "vertical"])} == {
        frozenset(), frozenset({-1}), frozenset({-2}), frozenset({-1, -2}),
    }  # fmt: skip


def test_metadata_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", 2)
    rows = metadata.rows(data)
    metadata.write(data, [{**row, "source": "ü"} for row in rows])
    assert [row["source"] for row in metadata.rows(data)] == ["ü", "ü"]
    assert "line" not in json.loads((data / "metadata.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{", '{"file_name": "0.png"}'], "line 1: not valid JSON"),
        (['{"file_name": "0.png"}', "", "[1]"], "line 3: expected a JSON object, found list"),
        (['{"text": "a"}'], 'line 1: "file_name" is missing'),
        (['{"file_name": "0.png"}', '{"file_name": "absent.png"}'], "line 2: no such file .*absent.png"),
        (['{"file_name": "0.png", "mask": "absent.png"}'], "line 1: no such file .*absent.png"),
        (['{"file_name": "0.png", "control": "absent.png"}'], "line 1: no such file .*absent.png"),
        (['{"file_name": "0.png", "control": 3}'], 'line 1: "control" must be a file name, found 3'),
        (['{"file_name": "0.png", "mask": ""}'], 'line 1: "mask" must be a file name'),
        (['{"file_name": "0.png", "control": "broken.png"}'], "line 1: cannot read image .*broken.png"),
        (['{"file_name": "0.png", "label": 2}'], "line 1: label 2 is out of range; the network has classes 0 to 1"),
        (['{"file_name": "0.png", "label": -1}'], 'line 1: "label" must be a class index'),
        (['{"file_name": "0.png", "label": true}'], 'line 1: "label" must be a class index'),
        (['{"file_name": "0.png", "text": 3}'], 'line 1: "text" must be a string'),
        (['{"file_name": "0.png"}', '{"file_name": "0.png"}'], "line 2: 0.png is listed already on line 1"),
        (['{"file_name": "broken.png"}'], "line 1: cannot read image .*broken.png"),
        ([""], "is empty"),
    ],
)
def test_mistakes_in_metadata_name_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    data = image_folder(tmp_path / "train", 1)
    (data / "broken.png").write_bytes((data / "0.png").read_bytes()[:40])
    write_lines(data, *lines)
    with pytest.raises(InputError, match=message) as caught:
        folder.read(data, (16, 16), 1, classes=2)
    assert str(data) in str(caught.value)


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such training folder"):
        folder.read(tmp_path / "absent", (16, 16), 1)
    with pytest.raises(InputError, match=r"has no metadata.jsonl"):
        folder.read(tmp_path, (16, 16), 1)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        folder.read(tmp_path, (16, 16), 1)


def test_the_manifest_is_of_contents_alone(tmp_path: Path) -> None:
    a, b = image_folder(tmp_path / "a", 2), image_folder(tmp_path / "b", 2)
    of = {name: manifest.manifest(path, metadata.read(path)) for name, path in (("a", a), ("b", b))}
    assert of["a"].digest == of["b"].digest
    assert of["a"].files["1.png"] == hashlib.sha256((a / "1.png").read_bytes()).hexdigest()
    assert set(of["a"].files) == {"0.png", "1.png", "mask1.png", "metadata.jsonl"}
    (b / "mask1.png").write_bytes((b / "0.png").read_bytes())
    assert manifest.manifest(b, metadata.read(b)).digest != of["a"].digest


def test_the_manifest_holds_condition_pictures(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", 1)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(data / "edges.png")
    write_lines(data, '{"file_name": "0.png", "control": "edges.png"}')
    before = folder.read(data, (16, 16), 1)
    assert set(before.manifest.files) == {"0.png", "edges.png", "metadata.jsonl"}
    assert before.control_of.tolist() == [0] and before.controls[0, :, 0, 0].tolist() == [1, 2, 3]
    Image.new("RGB", (16, 16), (1, 2, 4)).save(data / "edges.png")
    assert folder.read(data, (16, 16), 1).manifest.digest != before.manifest.digest


@dataclass
class Halves:
    """A codec that counts its calls."""

    calls: int = 0
    poison: float = 0.0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.avg_pool2d(pixels, 2) + (float("inf") if pixels.mean() == self.poison else 0)


def test_cached_latents_are_those_of_the_codec(tmp_path: Path) -> None:
    images = folder.read(image_folder(tmp_path / "train", 5), (16, 16), 1)
    encode, place = Halves(), tmp_path / "cache" / "train.safetensors"
    ask: Callable[[], torch.Tensor] = lambda: cache.latents(  # noqa: E731
        place, images, [(), (-1,)], encode, "codec-a", Path("vae"), batch=2
    )
    first = ask()
    assert first.shape == (5, 2, 1, 8, 8)
    expected = torch.nn.functional.avg_pool2d(images.pixels(torch.arange(5)), 2)
    assert torch.equal(first[:, 0], expected)
    assert torch.equal(first[:, 1], expected.flip(-1))
    calls = encode.calls
    assert torch.equal(ask(), first) and encode.calls == calls  # read, not computed
    assert torch.equal(load_file(place)["latents"], first)


def test_pain_04_a_cache_of_another_codec_or_data_is_refused(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", 3)
    images, place = folder.read(data, (16, 16), 1), tmp_path / "cache.safetensors"
    cache.latents(place, images, [()], Halves(), "a" * 64, Path("vae-a"))
    before = place.read_bytes()
    with pytest.raises(InputError, match=r"cache.safetensors was made with codec a{16}, this run has b{16} of vae-b"):
        cache.latents(place, images, [()], Halves(), "b" * 64, Path("vae-b"))
    with pytest.raises(InputError, match="was made with mirrorings"):
        cache.latents(place, images, [(), (-1,)], Halves(), "a" * 64, Path("vae-a"))
    small = folder.read(data, (8, 8), 1)
    with pytest.raises(InputError, match="was made with size 16x16, this run has 8x8"):
        cache.latents(place, small, [()], Halves(), "a" * 64, Path("vae-a"))
    (data / "0.png").write_bytes((data / "2.png").read_bytes())
    changed = folder.read(data, (16, 16), 1)
    found, expected = images.manifest.digest[:16], changed.manifest.digest[:16]
    with pytest.raises(InputError, match=f"was made with data {found}, this run has {expected} of .*train"):
        cache.latents(place, changed, [()], Halves(), "a" * 64, Path("vae-a"))
    assert place.read_bytes() == before
    place.write_bytes(before[:50])
    with pytest.raises(InputError, match="damaged"):
        cache.latents(place, images, [()], Halves(), "a" * 64, Path("vae-a"))


def test_pain_04_overflowing_latents_name_their_image(tmp_path: Path) -> None:
    images = folder.read(image_folder(tmp_path / "train", 4), (16, 16), 1)
    encode = Halves(poison=float(images.pixels(torch.tensor([2])).mean()))
    place = tmp_path / "cache.safetensors"
    with pytest.raises(InputError, match=r"overflows on .*2.png"):
        cache.latents(place, images, [()], encode, "a", Path("vae"), batch=1)
    assert not place.exists()
