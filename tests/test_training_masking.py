"""The part of an image that the loss looks at: shares of latent cells, mirrored with their image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_parts import full_recipe, image_folder

from mezzotint.data import folder
from mezzotint.errors import InputError
from mezzotint.training import masking, recipe
from mezzotint.training.recipe import Inpaint


def test_shares_of_latent_cells_are_areas(tmp_path: Path) -> None:
    images = folder.read(image_folder(tmp_path / "train", 4), (16, 16), 1)  # odd ones: a mask of [4:10, 5:9]
    flips = [(), (), (-1,), (-2,)]
    shares = masking.inside(images, torch.tensor([1, 0, 1, 3]), flips, 4)
    exact = torch.zeros(4, 4)
    exact[1, 1], exact[1, 2], exact[2, 1], exact[2, 2] = (
        12 / 16,
        4 / 16,
        6 / 16,
        2 / 16,
    )  # rows 4:8 and 8:10, columns 5:9
    assert shares.dtype == torch.float32 and torch.equal(shares[0, 0], exact)
    assert torch.equal(shares[1, 0], torch.ones(4, 4))  # no mask: the whole image counts
    assert torch.equal(shares[2, 0], exact.flip(-1)) and torch.equal(shares[3, 0], exact.flip(-2))
    whole = masking.inside(images, torch.tensor([3]), [()], 1)
    assert torch.equal(whole[0], images.masks[1].float()) and float(shares[0].sum()) * 16 == float(whole.sum())


def test_mirrored_are_image_mask_and_condition_alike(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", 2)
    Image.open(data / "1.png").convert("RGB").save(data / "edges.png")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    (data / "metadata.jsonl").write_text(json.dumps(rows[1] | {"control": "edges.png"}) + "\n")
    images = folder.read(data, (16, 16), 1)
    for dims in folder.mirrorings(["horizontal", "vertical"]):
        index = torch.tensor([0])
        pixels, hint = images.pixels(index, dims), images.hints(index, dims)
        share = masking.inside(images, index, [dims], 1)
        assert torch.allclose(hint, (pixels.expand(-1, 3, -1, -1) + 1) / 2, atol=1e-6)
        assert bool((pixels[share == 1] == -1).all()) and float(share.sum()) == 24  # the black square of 6 x 4


def test_images_are_not_mirrored_unless_asked(tmp_path: Path) -> None:
    """Letters, faces and parts with a left and a right are what is taught most often."""
    image_folder(tmp_path / "train", 1)
    plan = full_recipe(tmp_path)
    del plan["data"]["flips"]
    assert folder.mirrorings(list(recipe.check(plan, "test").data.flips)) == [()]


def test_masks_of_a_folder_in_buckets_are_counted_together(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", 2)  # the second has a mask
    Image.fromarray(np.zeros((8, 32), dtype=np.uint8)).save(data / "0.png")
    found = folder.read_buckets(data, [(16, 16), (32, 8)], 1)
    assert [len(images.masks) for images in found] == [1, 0]
    masking.check(Inpaint(source="both"), *found)
    with pytest.raises(InputError, match=r"and 1 of 2 images of .*train have no mask, 0.png first"):
        masking.check(Inpaint(source="file"), *found)
    with pytest.raises(InputError, match=r"no image of .*train has a mask"):
        masking.check(Inpaint(source="both"), found[1])
