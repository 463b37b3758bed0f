"""Weights on disk: whole or absent, mapped and not copied, and nothing foreign is believed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mezzotint.checkpoints import (
    fill,
    open_tensors,
    read_json,
    read_metadata,
    read_part,
    read_shapes,
    read_tensors,
    write_folder,
    write_sharded,
    write_tensors,
)
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


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m.safetensors", "m.fp16.safetensors", "m.bin"], "m.safetensors"),
        (["m.fp16.safetensors", "m.bf16.safetensors", "m.ema.safetensors", "m.bin"], "m.fp16.safetensors"),
        (["m.ema.safetensors", "m.bin"], "m.ema.safetensors"),
        (["m.bin", "m.fp16.bin"], "m.bin"),
        (["m.fp16.bin", "other.safetensors"], "m.fp16.bin"),
    ],
)
def test_the_plain_weights_come_before_their_variants(tmp_path: Path, names: list[str], chosen: str) -> None:
    for number, name in enumerate(names):
        content = {"w": torch.full((2,), float(number))}
        (torch.save if name.endswith(".bin") else save_file)(content, tmp_path / name)
    assert read_part(tmp_path, "m")["w"][0] == names.index(chosen)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        ),
        ("model.fp16.safetensors.index.json", "model.fp16-00001-of-00001.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"),
    ],
)
def test_every_published_kind_of_index_is_found(tmp_path: Path, index: str, shard: str) -> None:
    (torch.save if shard.endswith(".bin") else save_file)({"a": torch.arange(3.0)}, tmp_path / shard)
    (tmp_path / index).write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": {"a": shard}}))
    assert torch.equal(open_tensors(tmp_path)["a"], torch.arange(3.0))
    assert read_shapes(tmp_path) == {"a": ((3,), torch.float32)}


def test_links_are_followed_as_in_the_caches_of_hubs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.arange(3.0)}, tmp_path / "blobs" / "4d7a21")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/4d7a21")
    assert torch.equal(open_tensors(tmp_path / "snapshot")["a"], torch.arange(3.0))


def test_shards_open_where_they_are_published(tmp_path: Path) -> None:
    """What we write in shards, diffusers reads to the bit; and an older, whole file does not hide them."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    theirs.save_config(tmp_path)
    given, stem = theirs.state_dict(), "diffusion_pytorch_model"
    write_sharded(tmp_path, stem, {"old": torch.ones(1)})
    files = write_sharded(tmp_path, stem, given, limit=100_000)
    assert len(files) > 3 and sorted(p.name for p in tmp_path.glob("*.safetensors*")) == sorted(p.name for p in files)
    assert all(p.stat().st_size < 110_000 for p in files)
    for found in (UNet2DModel.from_pretrained(tmp_path).state_dict(), read_part(tmp_path, stem)):
        assert found.keys() == given.keys() and all(torch.equal(found[key], given[key]) for key in given)
    assert read_shapes(tmp_path) == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in given.items()}
    (whole,) = write_sharded(tmp_path, stem, given, dtype=torch.float16)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == [whole.name] == [f"{stem}.safetensors"]
    assert read_part(tmp_path, stem)["conv_in.weight"].dtype == torch.float16


def test_tensors_of_any_layout_are_written_piece_by_piece(tmp_path: Path) -> None:
    base = torch.randn(1100, 1300)
    given = {
        "turned": base.t(), "cut": base[:, 7:1003], "every": base.flatten()[::3], "one": base[:1].expand(900, 1300),
        "axes": base.view(11, 100, 1300).permute(2, 0, 1), "byte": torch.arange(7).to(torch.uint8), "odd": base > 0,
        "fp8": base.to(torch.float8_e4m3fn), "complex": torch.randn(5, dtype=torch.complex64),
    }  # fmt: skip
    found = load_file(write_tensors(tmp_path / "a.safetensors", given))
    assert all(
        torch.equal(
            found[key].double() if key == "fp8" else found[key], given[key].double() if key == "fp8" else given[key]
        )
        for key in given
        if key != "complex"
    )
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["complex"], given["complex"])


def test_what_was_written_into_mapped_tensors_survives_their_conversion(tmp_path: Path) -> None:
    """Pages are given back only while they are the file's: a change to loaded weights is not among those."""
    path = write_tensors(tmp_path / "a.safetensors", {"weight": torch.ones(3000, 2000), "bias": torch.ones(3000)})
    given = read_tensors(path)
    given["weight"][1500] = 7
    for _ in range(2):
        linear = fill(lambda: nn.Linear(2000, 3000), given, torch.bfloat16, path)
        assert linear.weight.sum(dtype=torch.float64) == 2999 * 2000 + 7 * 2000
        assert given["weight"].sum(dtype=torch.float64) == 2999 * 2000 + 7 * 2000
    assert read_tensors(path)["weight"].sum(dtype=torch.float64) == 3000 * 2000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_loading_takes_no_more_memory_than_the_weights(tmp_path: Path) -> None:
    """A network of 140 or 280 MB, from every format, in its own precision and another: within a tenth of its size."""
    script, root = Path(__file__).with_name("loading_peaks.py"), Path(__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = {case: peak / weights for case, (peak, weights) in json.loads(done.stdout).items()}
    assert len(peaks) == 9 and all(0.9 < peak < 1.1 for peak in peaks.values()), peaks
    for path in tmp_path.rglob("*.*"):
        path.unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_views_of_any_layout_keep_their_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randn(1200, 1100).half()
    base = read_tensors(write_tensors(tmp_path / "a.safetensors", {"w": base}))["w"]
    views = [
        base.t(), base[:, 3:900], base[:, 3:900].t(), base[::3].t(), base.view(1200, 11, 100).permute(1, 2, 0),
        base.view(3, 400, 1100)[:, 5:300].transpose(0, 2), base[:1].expand(7, 1100), base[0, 0], base[:0],
        base.flatten()[::7], base.view(1, 1200, 1, 1100).permute(3, 0, 2, 1),
    ]  # fmt: skip
    for view in views:
        expected = view.double().clone()
        module = nn.Module()
        module.register_parameter("w", nn.Parameter(torch.empty(view.shape, device="meta")))
        found = fill(lambda module=module: module, {"w": view}, dtype, tmp_path)
        assert found.w.dtype == dtype and torch.equal(found.w.double(), expected)


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
