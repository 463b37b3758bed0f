"""Condition pictures: edges against closed forms on shapes, and what each image of a folder shows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from training_parts import image_folder

from mezzotint.data import conditions, folder
from mezzotint.data.conditions import edges, gradient
from mezzotint.errors import InputError


def pair(grey: Tensor) -> Tensor:
    """(1, 1, H, W) in [-1, 1] from greys in [0, 1]."""
    return (grey * 2 - 1)[None, None]


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_gradient_of_a_step_and_a_ramp_is_the_closed_form(sigma: float) -> None:
    """A step of contrast c answers c at its two pixels and falls as the Gaussian does; a ramp answers its slope."""
    step = torch.zeros(24, 24).double()
    step[:, 12:] = 0.3
    across, down = (part.double()[0, 0] * conditions.GRID for part in gradient(pair(step), sigma))
    radius = math.ceil(4 * sigma)
    bell = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(radius + 2)]
    for distance in range(radius):  # pixels from the brighter side of the step
        expected = 0.3 * (bell[distance] + bell[distance + 1]) / (bell[0] + bell[1])
        found = [across[12, 12 + distance], across[12, 11 - distance]]
        assert all(abs(float(value) - expected) < 1e-7 for value in found)
    assert down.abs().max() < 1e-7
    ramp = torch.arange(24.0).double() / 100
    across, down = gradient(pair(ramp[:, None] + torch.zeros(24, 24)), sigma)
    total = 1 + 2 * sum(bell[1 : radius + 1])
    slope = 0.01 / ((bell[0] + bell[1]) / total / 2)
    assert abs(float(down[0, 0, 12, 12]) * conditions.GRID - slope) < 1e-7
    assert across.abs().max() <= 1


def test_straight_edges_are_one_pixel_wide_at_their_place() -> None:
    for turned in (False, True):
        step = torch.zeros(20, 20)
        step[:, 8:] = 1.0
        expected = torch.zeros(20, 20, dtype=torch.bool)
        expected[:, 8] = True  # the brighter side
        if turned:
            step, expected = step.T, expected.T
        assert torch.equal(edges(pair(step))[0, 0], expected)
        assert torch.equal(edges(pair(1 - step))[0, 0].roll(1, -2 if turned else -1), expected)
    diagonal = (torch.arange(20)[:, None] + torch.arange(20) >= 20).float()
    found = edges(pair(diagonal))[0, 0]
    rows, columns = found.nonzero().T
    inside = (rows > 1) & (rows < 18) & (columns > 1) & (columns < 18)
    assert set((rows + columns)[inside].tolist()) == {19, 20}  # on both sides: diagonal neighbours are two apart
    assert int(inside.sum()) == 15 + 16


def test_a_circle_is_found_where_it_is() -> None:
    """Every edge pixel within a pixel of the circle, every direction covered, nothing else."""
    place = torch.arange(64).double() - 31.5
    distance = (place[:, None] ** 2 + place**2).sqrt()
    disc = (20.5 - distance).clamp(0, 1)  # an edge that is one pixel soft, at radius 20
    found = edges(pair(disc))[0, 0]
    assert (distance[found] - 20).abs().max() < 1.0
    rows, columns = found.nonzero().T
    angle = torch.atan2(place[rows], place[columns])
    assert len(((angle + math.pi) / (2 * math.pi) * 72).long().unique()) >= 72
    assert 100 < len(rows) < 2 * math.pi * 20 * 1.4


def test_thresholds_are_contrasts_and_weak_edges_need_strong_ones() -> None:
    """An edge below the high threshold stays where it is joined to one above it, and goes where it stands alone."""
    picture = torch.zeros(40, 40)
    picture[:, 12:] = torch.linspace(0.5, 0.12, 40)[:, None]  # ever weaker, but one line
    picture[:, 30:] += 0.15  # weak throughout
    found = edges(pair(picture), 0.1, 0.2)[0, 0]
    assert found[2:38, 12].all()
    assert not found[:, 29:32].any()
    for low, high, count in ((0.14, 0.14, 40), (0.14, 0.16, 0), (0.16, 0.16, 0)):
        step = torch.zeros(40, 40)
        step[:, 20:] = 0.15
        assert int(edges(pair(step), low, high).sum()) == count
    for low, high in ((0.0, 0.2), (0.3, 0.2)):
        with pytest.raises(InputError, match="rising contrasts above 0"):
            edges(pair(step), low, high)


@pytest.mark.parametrize("dims", [(-1,), (-2,), (-1, -2)])
def test_edges_of_a_mirrored_picture_are_mirrored_edges(dims: tuple[int, ...]) -> None:
    """To the bit, on pictures full of ties."""
    draw = torch.Generator().manual_seed(0)
    noise = (torch.rand(3, 3, 33, 40, generator=draw) * 255).round() / 127.5 - 1
    blocks = torch.randint(0, 2, (2, 1, 8, 8), generator=draw).float().repeat_interleave(4, 2).repeat_interleave(5, 3)
    for picture in (noise, blocks * 2 - 1):
        found = edges(picture)
        assert found.any()
        assert torch.equal(edges(picture.flip(dims)), found.flip(dims))
        assert torch.equal(edges(picture), found)


def test_grey_is_what_files_are_read_as() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    colour = torch.from_numpy(pixels.transpose(2, 0, 1))[None].float() / 127.5 - 1
    read = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))).float() / 127.5 - 1
    assert (conditions.grey(colour)[0, 0] - read).abs().max() <= 0.51 / 127.5
    assert torch.equal(conditions.grey(colour[:, :1]), colour[:, :1])


def test_a_folder_shows_masks_edges_or_its_own_pictures(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "train", 4)
    lines = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        Image.new("RGB", (16, 16), (255, 0, 40 * i)).save(path / f"control{i}.png")
        line["control"] = f"control{i}.png"
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = folder.read(path, (16, 16), 1)
    index, flips = torch.tensor([1, 1, 2]), [(), (-1,), (-2,)]

    masks = conditions.shown(conditions.pictures(images, "mask"), index, flips)
    own = images.masks[images.mask_of[1]].float() * 2 - 1
    assert masks.shape == (3, 3, 16, 16)
    assert torch.equal(masks[0], own.expand(3, -1, -1)) and torch.equal(masks[1], own.flip(-1).expand(3, -1, -1))
    assert masks[2].max() == -1  # this image has none

    lines_ = conditions.shown(conditions.pictures(images, "edges", (0.05, 0.1)), index, flips)
    for i, (row, dims) in enumerate(zip(index.tolist(), flips, strict=True)):
        expected = edges(images.pixels(torch.tensor([row]), dims), 0.05, 0.1)[0]
        assert torch.equal(lines_[i] > 0, expected.expand(3, -1, -1))
    assert lines_.unique().tolist() == [-1.0, 1.0]

    files = conditions.shown(conditions.pictures(images, "file"), index, flips)
    assert torch.equal(
        files, torch.stack([images.hints(r[None], f)[0] for r, f in zip(index, flips, strict=True)]) * 2 - 1
    )


def test_missing_conditions_are_named(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "train", 2)
    images = folder.read(path, (16, 16), 1)
    with pytest.raises(InputError, match=r"0\.png has no condition picture"):
        conditions.pictures(images, "file")
    (path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(InputError, match="has no masks to follow"):
        conditions.pictures(folder.read(path, (16, 16), 1), "mask")
