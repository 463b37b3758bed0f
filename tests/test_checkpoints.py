"""Weights on disk: whole or absent, mapped and not copied, and nothing foreign is believed."""

from __future__ import annotations

import errno
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mezzotint.checkpoints import fill, read_json, read_metadata, read_part, read_tensors, write_folder, write_tensors
from mezzotint.errors import InputError


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(4, 6), "half": torch.randn(5).half(), "count": torch.tensor(3), "none": torch.empty(0, 2),
    }  # fmt: skip


def test_written_and_read_as_the_format_says(tmp_path: Path) -> None:
    given = tensors() | {"turned": torch.randn(3, 4).t()}
    write_tensors(tmp_path / "a.safetensors", given, {"origin": "test"})
    ours, theirs = read_tensors(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys() == given.keys()
    assert all(torch.equal(ours[k], theirs[k]) and torch.equal(ours[k], given[k]) for k in given)
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt", "origin": "test"}


def test_storage_dtype_touches_floating_numbers_only(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", tensors(), dtype=torch.float16)
    assert {k: t.dtype for k, t in read_tensors(tmp_path / "a.safetensors").items()} == {
        "weight": torch.float16, "half": torch.float16, "count": torch.int64, "none": torch.float16,
    }  # fmt: skip


def test_mapped_pages_are_private(tmp_path: Path) -> None:
    """What training does to loaded weights must not reach the file they came from."""
    path = write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(1000)})
    read_tensors(path)["w"].fill_(5)
    assert read_tensors(path)["w"].sum() == 1000


def header(entries: dict[str, object], length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        header({}, length=2**62),
        header({}, length=100) + b"x" * 4,
        header({"a": F32 | {"data_offsets": [0, 8]}}) + b"\0" * 7,  # truncated
        header({"a": F32 | {"data_offsets": [0, 8]}}) + b"\0" * 9,  # something behind
        header({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}}) + b"\0" * 12,  # overlap
        header({"a": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 8,
        b"\x80\x04" + pickle.dumps({"a": 1}),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_metadata):
        with pytest.raises(InputError, match="not an intact safetensors file") as error:
            read(path)
        assert str(path) in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_missing_files_and_folders_in_their_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such weights file"):
        read_tensors(tmp_path / "absent.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError):
        read_tensors(tmp_path / "folder.safetensors")


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "nul"])
def test_broken_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def shard(folder: Path, weight_map: dict[str, object]) -> None:
    save_file({"a": torch.arange(3.0)}, folder / "m-1.safetensors")
    save_file({"b": torch.arange(4.0)}, folder / "m-2.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_part(tmp_path: Path) -> None:
    shard(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    found = read_part(tmp_path, "m")
    assert torch.equal(found["a"], torch.arange(3.0)) and torch.equal(found["b"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "m-1.safetensors", "b": "../m-2.safetensors"}, "outside its folder"),
        ({"a": "m-1.safetensors", "b": "/etc/passwd"}, "outside its folder"),
        ({"a": "m-1.safetensors", "b": "m-3.safetensors"}, "no such weights file"),
        ({"a": "m-1.safetensors", "c": "m-2.safetensors"}, "disagree on 2 tensors"),
        ({"a": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, weight_map, says: str) -> None:
    shard(tmp_path, weight_map)
    with pytest.raises(InputError, match=says):
        read_part(tmp_path, "m")


def test_a_network_takes_tensors_in_place() -> None:
    given = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    network = fill(lambda: nn.Linear(2, 3), given, torch.float32, Path("m"))
    assert network.weight.data_ptr() == given["weight"].data_ptr()
    assert not network.training and not network.weight.requires_grad
    assert fill(lambda: nn.Linear(2, 3), given, torch.bfloat16, Path("m")).weight.dtype == torch.bfloat16


def test_tensors_that_do_not_fit_are_listed_briefly() -> None:
    given = {"weight": torch.zeros(4, 2), **{f"odd{i}": torch.zeros(1) for i in range(9)}}
    with pytest.raises(InputError) as error:
        fill(lambda: nn.Linear(2, 3), given, torch.float32, Path("unet"))
    assert str(error.value) == (
        "unet does not fit its configuration: 1 missing (bias); 9 unexpected (odd0, odd1, odd2 and 6 more); "
        "1 of another shape (weight (4, 2) for (3, 2))"
    )


def test_a_folder_is_replaced_whole_or_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def first(folder: Path) -> None:
        (folder / "model_index.json").write_text("1")
        (folder / "old.txt").write_text("old")

    def second(folder: Path) -> None:
        (folder / "model_index.json").write_text("2")

    def broken(folder: Path) -> None:
        second(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    write_folder(target, first)
    with pytest.raises(InputError, match=r"cannot write .*model: No space left on device"):
        write_folder(target, broken)
    assert (target / "old.txt").read_text() == "old"
    with pytest.raises(ZeroDivisionError):
        write_folder(target, lambda folder: 1 / 0)
    write_folder(target, second)
    assert [p.name for p in target.iterdir()] == ["model_index.json"]
    assert (target / "model_index.json").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_users_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("photos", "file"):
        with pytest.raises(InputError, match="is not a model folder"):
            write_folder(tmp_path / name, lambda folder: None)
    assert (tmp_path / "photos" / "mine.jpg").read_text() == "dear"
