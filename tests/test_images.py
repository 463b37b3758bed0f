"""Pictures in, tensors out, and back, against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as pil

from mezzotint import images
from mezzotint.errors import InputError


def test_bytes_survive_the_way_to_tensors_and_back() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for picture in (pil.fromarray(values), pil.fromarray(np.stack((values, values.T, 255 - values), -1))):
        channels = len(picture.getbands())
        tensor = images.to_tensor(picture, 16, 16, channels)
        assert tensor.shape == (1, channels, 16, 16) and tensor.min() == -1 and tensor.max() == 1
        assert np.array_equal(np.asarray(images.to_images(tensor)[0]), np.asarray(picture))


def test_sixteen_bit_greys_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    pil.fromarray(values).save(tmp_path / "deep.png")
    read = np.asarray(images.read(tmp_path / "deep.png"))
    assert read.dtype == np.uint8 and np.array_equal(read, np.round(values / 257))


def test_masks_are_zeros_and_ones_that_shrink_by_area() -> None:
    picture = np.zeros((8, 8), np.uint8)
    picture[:, :3] = 255
    assert torch.equal(images.mask_to_tensor(pil.fromarray(picture), 8, 8)[0, 0], torch.tensor(picture / 255.0).float())
    halved = images.mask_to_tensor(pil.fromarray(picture), 4, 4)[0, 0]
    assert halved[0].tolist() == [1.0, 1.0, 0.0, 0.0]  # the half-covered column counts


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png"):
        images.read(tmp_path / "a.png")


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        images.find(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        images.find(tmp_path / "none")
