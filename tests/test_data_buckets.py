"""Aspect-ratio buckets and the geometry of reading: scaled to cover, the centre cut, masks and controls alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import buckets, cache, folder
from mezzotint.data.folder import NO_LABEL
from mezzotint.errors import InputError

# Podell et al. 2023 (SDXL), appendix I, height x width from 512x2048 to 1024x1024; the rest are the same turned
SDXL = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
]  # fmt: skip


def test_sizes_are_the_largest_of_sdxls() -> None:
    found = buckets.sizes((1024, 1024), 64, 4)
    published = {*SDXL, *((b, a) for a, b in SDXL)}
    largest = {s for s in published if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in published)}
    assert set(found) == largest and len(found) == 17
    assert found == sorted(found, key=lambda s: s[0] / s[1])


@pytest.mark.parametrize(("size", "step", "ratio"), [((512, 512), 64, 2.0), ((96, 64), 8, 3.0), ((40, 40), 8, 1.0)])
def test_sizes_by_trying_all(size: tuple[int, int], step: int, ratio: float) -> None:
    area = size[0] * size[1]
    sides = range(step, area // step + 1, step)
    fit = {(w, h) for w in sides for h in sides if w * h <= area}
    full = {(w, h) for w, h in fit if (w + step, h) not in fit and (w, h + step) not in fit}
    expected = sorted((s for s in full if 1 / ratio <= s[0] / s[1] <= ratio), key=lambda s: s[0] / s[1])
    assert buckets.sizes(size, step, ratio) == expected and size in expected


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"100x64 must be multiples of data.bucket_step, which is 64"):
        buckets.sizes((100, 64), 64, 2)
    with pytest.raises(InputError, match=r"data.bucket_ratio is 2; for data.size 192x64 it must be at least 3"):
        buckets.sizes((192, 64), 64, 2)


def test_pictures_go_to_the_nearest_aspect_ratio() -> None:
    among = [(16, 64), (32, 32), (64, 16)]
    pictures = torch.tensor([[10, 40], [199, 100], [201, 100], [200, 100], [100, 200], [5, 5]])
    assert buckets.assign(pictures, among).tolist() == [0, 1, 2, 1, 0, 1]  # a tie goes to the earlier: log 2 of log 4


def disc(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """A smooth colour ramp with a bright disc of half the shorter side in the middle, and its mask.

    Nothing near black or white: what a filter overshoots is clipped there, and one order of axes clips unlike another.
    """
    y, x = np.mgrid[:height, :width]
    inside = (2 * x + 1 - width) ** 2 + (2 * y + 1 - height) ** 2 <= (min(width, height) / 2) ** 2
    ramp = 40 + 80 * np.stack((x / width, y / height, (x + y) / (width + height)), 2)
    picture = np.where(inside[..., None], 200, ramp).astype(np.uint8)
    return Image.fromarray(picture), Image.fromarray((inside * 255).astype(np.uint8))


def shaped_folder(path: Path, shapes: list[tuple[int, int]]) -> Path:
    """Pictures with a disc of these widths and heights, each with its mask, and every second one with a control."""
    path.mkdir(parents=True)
    rows = []
    for i, (width, height) in enumerate(shapes):
        picture, mask = disc(width, height)
        picture.save(path / f"{i}.png")
        mask.save(path / f"mask{i}.png")
        row: dict[str, object] = {"file_name": f"{i}.png", "text": f"disc {i}", "mask": f"mask{i}.png", "label": i}
        if i % 2:
            picture.transpose(Image.Transpose.ROTATE_180).save(path / f"edge{i}.png")
            row["control"] = f"edge{i}.png"
        rows.append(row)
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def extent(mask: torch.Tensor) -> tuple[int, int]:
    """Width and height of what is white in a mask (1, H, W)."""
    return int(mask[0].any(0).sum()), int(mask[0].any(1).sum())


def test_pain_08_pictures_of_other_shapes_are_cut_not_stretched(tmp_path: Path) -> None:
    data = shaped_folder(tmp_path / "train", [(96, 48), (48, 96), (64, 64), (50, 33)])
    images = folder.read(data, (32, 32), 3)
    for i in range(4):
        across, down = extent(images.masks[images.mask_of[i]])
        assert across in (15, 16, 17) and abs(across - down) <= 1  # half the height, and round
        bright = (images.bytes[i] > 160).all(0)
        assert (bright ^ images.masks[images.mask_of[i], 0]).float().mean() < 0.03  # but for the disc's soft rim
    assert images.original.tolist() == [[96, 48], [48, 96], [64, 64], [50, 33]]
    assert images.crop.tolist() == [[16, 0], [0, 16], [0, 0], [8, 0]]  # of 64x32, 32x64, 32x32, 48x32


@pytest.mark.parametrize(("shape", "size"), [((97, 48), (32, 32)), ((31, 90), (48, 40)), ((20, 12), (64, 64))])
def test_cuts_are_those_of_scaling_first(tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]) -> None:
    data = shaped_folder(tmp_path / "train", [(8, 8), shape])
    images = folder.read(data, size, 3)
    source = Image.open(data / "1.png")
    scale = max(size[0] / shape[0], size[1] / shape[1])
    scaled = max(round(shape[0] * scale), size[0]), max(round(shape[1] * scale), size[1])
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    assert images.crop[1].tolist() == [left, top]
    cut = (left, top, left + size[0], top + size[1])
    whole = np.array(source.resize(scaled, Image.Resampling.LANCZOS).crop(cut)).transpose(2, 0, 1)
    assert (images.bytes[1].int() - torch.from_numpy(whole).int()).abs().max() <= 2  # of 255: either axis rounds
    edge = np.array(Image.open(data / "edge1.png").resize(scaled, Image.Resampling.LANCZOS).crop(cut))
    assert (images.controls[0].int() - torch.from_numpy(edge.transpose(2, 0, 1)).int()).abs().max() <= 2
    mask = np.array(Image.open(data / "mask1.png").resize(scaled, Image.Resampling.BOX).crop(cut)) >= 128
    assert (images.masks[1, 0] == torch.from_numpy(mask)).float().mean() > 0.995


def test_pictures_of_the_same_shape_are_what_they_were(tmp_path: Path) -> None:
    """Resized as a whole, to the bit, also where the scaled size is no whole number of steps."""
    data = shaped_folder(tmp_path / "train", [(48, 72), (33, 50), (16, 24)])
    images = folder.read(data, (16, 24), 1)
    for i in range(3):
        whole = Image.open(data / f"{i}.png").convert("L").resize((16, 24), Image.Resampling.LANCZOS)
        assert np.array_equal(images.bytes[i, 0].numpy(), np.array(whole))
        mask = np.array(Image.open(data / f"mask{i}.png").resize((16, 24), Image.Resampling.BOX)) >= 128
        assert np.array_equal(images.masks[i, 0].numpy(), mask)
    assert images.crop.tolist() == [[0, 0]] * 3


def test_a_very_long_picture_is_not_blown_up(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "line.png"}\n')
    Image.new("L", (30_000, 2), 7).save(tmp_path / "line.png")  # covering 1024 means 15 million pixels across
    images = folder.read(tmp_path, (1024, 1024), 3)
    assert images.bytes.eq(7).all() and images.crop.tolist() == [[(15_360_000 - 1024) // 2, 0]]


def test_buckets_are_read_like_folders_of_their_own(tmp_path: Path) -> None:
    shapes = [(64, 64), (96, 48), (48, 90), (100, 50), (60, 64), (48, 96)]
    data = shaped_folder(tmp_path / "train", shapes)
    sizes = buckets.sizes((32, 32), 8, 2.0)
    assert sizes == [(24, 40), (32, 32), (40, 24)]
    found = folder.read_buckets(data, sizes, 3, classes=6)
    assert [images.names for images in found] == [("2.png", "5.png"), ("0.png", "4.png"), ("1.png", "3.png")]
    assert [tuple(images.bytes.shape[-2:]) for images in found] == [(40, 24), (32, 32), (24, 40)]
    for images, size in zip(found, sizes, strict=True):
        alone = folder.read(data, size, 3)
        rows = torch.tensor([int(name[0]) for name in images.names])
        assert images.manifest is found[0].manifest and images.manifest.digest == alone.manifest.digest
        assert images.labels.tolist() == rows.tolist() and images.captions == tuple(f"disc {i}" for i in rows.tolist())
        assert torch.equal(images.bytes, alone.bytes[rows])
        assert torch.equal(images.masks[images.mask_of], alone.masks[alone.mask_of[rows]])
        assert torch.equal(images.original, alone.original[rows]) and torch.equal(images.crop, alone.crop[rows])
        has = images.control_of != NO_LABEL
        assert has.tolist() == [bool(i % 2) for i in rows.tolist()] and len(images.controls) == int(has.sum())
        assert torch.equal(images.controls[images.control_of[has]], alone.controls[alone.control_of[rows[has]]])
    assert len(folder.read_buckets(data, [(8, 8), (80, 8)], 1)) == 1  # no picture is that long


def test_flips_go_with_controls_and_a_missing_one_is_named(tmp_path: Path) -> None:
    images = folder.read(shaped_folder(tmp_path / "train", [(16, 16), (16, 16)]), (16, 16), 3)
    hint = images.hints(torch.tensor([1]))
    assert torch.equal(
        hint[0], torch.from_numpy(np.array(Image.open(tmp_path / "train/edge1.png"))).permute(2, 0, 1) / 255
    )
    assert torch.equal(images.hints(torch.tensor([1]), (-1,)), hint.flip(-1))
    assert torch.equal(images.pixels(torch.tensor([1]), (-1,)), images.pixels(torch.tensor([1])).flip(-1))
    with pytest.raises(InputError, match=r'train/0.png has no condition picture: add "control"'):
        images.hints(torch.tensor([1, 0]))


@pytest.mark.parametrize("key", ["mask", "control"])
def test_a_mask_of_another_shape_than_its_image_is_refused(tmp_path: Path, key: str) -> None:
    """Half the size is fine, also rounded; another aspect ratio would lie somewhere else than its picture."""
    Image.new("RGB", (101, 51)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", key: "m.png"}) + "\n")
    for good in ((101, 51), (50, 25), (51, 26), (202, 102)):
        Image.new("L", good, 255).save(tmp_path / "m.png")
        assert len(folder.read(tmp_path, (32, 32), 3).names) == 1
    for wrong in ((51, 51), (101, 40)):
        Image.new("L", wrong).save(tmp_path / "m.png")
        with pytest.raises(InputError, match=rf"line 1: m.png is {wrong[0]}x{wrong[1]}, another shape than a.png"):
            folder.read(tmp_path, (32, 32), 3)


def test_a_bucket_knows_its_images(tmp_path: Path) -> None:
    """Two ways to divide one folder may have a size in common, but not the pictures of that size."""
    data = shaped_folder(tmp_path / "train", [(64, 64), (70, 48), (96, 48)])
    place = tmp_path / "32x32.safetensors"
    few = folder.read_buckets(data, [(32, 32), (40, 24)], 3)[0]
    more = folder.read_buckets(data, [(32, 32), (64, 16)], 3)[0]
    assert few.names != more.names and few.manifest.digest == more.manifest.digest
    cache.latents(place, few, [()], lambda x: x, "a", Path("vae"))
    with pytest.raises(InputError, match=rf"32x32.safetensors was made with images .* this run has .* of {data}"):
        cache.latents(place, more, [()], lambda x: x, "a", Path("vae"))
