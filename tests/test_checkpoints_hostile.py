"""Files made to harm, and files that accidents make: refused in two lines, with nothing run and nothing allocated."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mezzotint.checkpoints import configure, fill, open_tensors, read_shapes
from mezzotint.errors import InputError

Make = Callable[[Path], Path]  # writes the bad file into a folder and returns what is to be opened
MARK = "code-was-run"


class Runs:
    """What a hostile pickle does when an ordinary reader opens it."""

    def __init__(self, folder: Path, call: Callable[..., Any] = os.system) -> None:
        self.call, self.argument = call, f"touch '{folder / MARK}'"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call, (self.argument,)


def evaluates(folder: Path) -> Runs:
    hostile = Runs(folder, eval)
    hostile.argument = f"open({str(folder / MARK)!r}, 'w')"
    return hostile


def plain(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def safetensors(entries: Any, data: bytes = b"", length: int | None = None) -> Make:
    return plain("m.safetensors", header(entries, data, length))


def saved(content: Callable[[Path], Any], legacy: bool = False, name: str = "m.ckpt") -> Make:
    def make(folder: Path) -> Path:
        torch.save(content(folder), folder / name, _use_new_zipfile_serialization=not legacy)
        return folder / name

    return make


def archive(
    change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]], how: int = zipfile.ZIP_STORED
) -> Make:
    """A checkpoint of PyTorch with its members changed."""

    def make(folder: Path) -> Path:
        stream = io.BytesIO()
        torch.save({"w": torch.ones(4)}, stream)
        with zipfile.ZipFile(stream) as good:
            members = [(name, good.read(name)) for name in good.namelist()]
        with zipfile.ZipFile(folder / "m.ckpt", "w", how) as bad:
            for name, content in change(members):
                bad.writestr(name, content)
        return folder / "m.ckpt"

    return make


def program(code: Callable[[Path], bytes]) -> Make:
    """A checkpoint whose instructions are hand-written."""

    def make(folder: Path) -> Path:
        return archive(lambda ms: [(n, code(folder) if n.endswith("data.pkl") else c) for n, c in ms])(folder)

    return make


def bomb(depth: int) -> bytes:
    """Ten references to ten references to ...: small on disk, 10^depth when written out."""
    content: Any = ["x" * 100] * 10
    for _ in range(depth):
        content = [content] * 10
    return pickle.dumps({"w": content}, 2)


def claims(elements: int, legacy: bool = False) -> Make:
    """A checkpoint whose tensor says it has far more numbers than the file."""
    proper, claimed = struct.pack("<i", 4), struct.pack("<i", elements)

    def make(folder: Path) -> Path:
        return archive(
            lambda ms: [(n, c.replace(b"J" + proper, b"J" + claimed).replace(b"K\x04", b"J" + claimed)) for n, c in ms]
        )(folder)

    def old(folder: Path) -> Path:
        path = saved(lambda f: {"w": torch.ones(4)}, legacy=True)(folder)
        path.write_bytes(path.read_bytes().replace(b"K\x04", b"J" + claimed))
        return path

    return old if legacy else make


def cut(make: Make, share: float) -> Make:
    def shortened(folder: Path) -> Path:
        path = make(folder)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return path

    return shortened


def indexed(second: str, weight_map: Any = None) -> Make:
    """A part in two shards whose index sends the tensor b to `second`."""

    def make(folder: Path) -> Path:
        inside = folder / "unet"
        inside.mkdir()
        save_file({"a": torch.ones(2)}, inside / "m-1.safetensors")
        save_file({"b": torch.ones(2)}, inside / "m-2.safetensors")
        save_file({"b": torch.ones(2)}, folder / "elsewhere.safetensors")
        listed = {"a": "m-1.safetensors", "b": second.format(folder=folder)} if weight_map is None else weight_map
        (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        return inside

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "m.safetensors")
    return folder / "m.safetensors"


def link(target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "m.safetensors").symlink_to(target)
        return folder / "m.safetensors"

    return make


def folder_named(name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def variants(folder: Path) -> Path:
    for name in ("ema", "pruned"):
        save_file({"a": torch.ones(2)}, folder / f"model.{name}.safetensors")
    return folder


def locked(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    path = safetensors(one(), bytes(8))(folder)
    path.chmod(0)
    return path


def sparse_file(folder: Path) -> Path:
    """Eight bytes that claim a header of a terabyte, in a file that does have that size (and no content)."""
    path = plain("m.safetensors", struct.pack("<Q", 2**40))(folder)
    os.truncate(path, 2**40 + 100)
    return path


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3438167534\n"
PAGE = b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>"
PAIR = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}
TWICE = json.dumps(PAIR).replace('"b"', '"a"').encode()

SAFETENSORS: dict[str, tuple[Make, str]] = {
    "empty": (plain("m.safetensors", b""), "it is empty .* download"),
    "two bytes": (plain("m.safetensors", b"\1\2"), "the file has 2. Copy or download"),
    "exabytes of header": (safetensors(one(), bytes(8), 2**62), "claims 4611686018427387904 bytes"),
    "negative length": (safetensors(one(), bytes(8), 2**64 - 1), "claims 18446744073709551615 bytes"),
    "terabyte of header": (sparse_file, "more than the 16777216 that any model needs"),
    "no header": (safetensors(b""), "Expecting value"),
    "header of zeros": (safetensors(bytes(100)), "Expecting value"),
    "header not UTF-8": (safetensors(b'{"\xff": 1}'), "codec can't decode"),
    "header too deep": (safetensors(b"[" * 100_000), "nested too deeply"),
    "header deep in an entry": (safetensors(b'{"a":' * 50_000), "nested too deeply"),
    "header is a list": (safetensors([1]), "no table of tensors"),
    "entry is a number": (safetensors({"a": 1}), "'a' is not described"),
    "entry says more": (safetensors({"a": {**one()["a"], "run": "x"}}, bytes(8)), "'a' is not described"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), "__metadata__ is no table of texts"),
    "truncated": (safetensors(PAIR, bytes(15)), "take 16 bytes and 15 are there"),
    "something behind": (safetensors(PAIR, bytes(17)), "take 16 bytes and 17 are there"),
    "overlap": (safetensors(PAIR | {"b": one(offsets=(4, 12))["a"]}, bytes(12)), "'b' overlaps another"),
    "gap": (safetensors(PAIR | {"b": one(offsets=(12, 20))["a"]}, bytes(20)), "'b' comes after a gap"),
    "unknown dtype": (safetensors(one("F99"), bytes(8)), "unknown dtype 'F99'"),
    "dtype is a list": (safetensors(one(["F32"]), bytes(8)), "unknown dtype"),
    "absurd shape": (safetensors(one(shape=[2**61]), bytes(8)), "needs 9.22337203685e.18 bytes and has 8"),
    "overflowing shape": (safetensors(one(shape=[2**33, 2**33]), bytes(8)), "needs .* bytes and has 8"),
    "negative shape": (safetensors(one(shape=[-2]), bytes(8)), "no list of whole numbers"),
    "negative pair": (safetensors(one(shape=[-1, -2]), bytes(8)), "no list of whole numbers"),
    "shape of fractions": (safetensors(one(shape=[2.0]), bytes(8)), "no list of whole numbers"),
    "shape of booleans": (safetensors(one(shape=[True, 2]), bytes(8)), "no list of whole numbers"),
    "many axes": (safetensors(one(shape=[1] * 10_000), bytes(4)), "no list of whole numbers"),
    "backward offsets": (safetensors(one(offsets=(8, 0)), bytes(8)), "needs 8 bytes and has -8"),
    "one name twice": (safetensors(TWICE, bytes(16)), "names 'a' twice"),
    "git lfs pointer": (plain("m.safetensors", POINTER), "Git LFS pointer.*: run git lfs pull"),
    "html page": (plain("m.safetensors", PAGE), "an HTML or XML page, probably an error message: download"),
    "json": (plain("m.safetensors", b'{"error": "gated"}' * 9), "a JSON text"),
    "gguf": (plain("m.safetensors", b"GGUF" + bytes(99)), "a GGUF file"),
    "gzip": (plain("m.safetensors", gzip.compress(bytes(999))), "gzip archive"),
    "pickle in disguise": (saved(Runs, name="m.safetensors"), "a PyTorch pickle .*: if you trust"),
    "raw pickle in disguise": (
        lambda f: plain("m.safetensors", pickle.dumps(Runs(f)))(f), "a Python pickle, not written by PyTorch: get",
    ),
    "a pipe": (pipe, "a pipe or a device"),
    "an endless device": (link("/dev/zero"), "a pipe or a device"),
    "a link to nothing": (link("absent"), "no such weights file"),
    "a folder": (folder_named("m.safetensors"), "has no weights"),
    "no permission": (locked, "Permission denied"),
    "another ending": (plain("m.exe", b"MZ"), r"\.safetensors, \.ckpt, .* are read"),
}  # fmt: skip

PICKLES: dict[str, tuple[Make, str]] = {
    "runs a command": (saved(Runs), "asks for posix.system, and nothing of it was run"),
    "runs a command, nested": (
        saved(lambda f: {"state_dict": {"w": torch.ones(2)}, "callbacks": [Runs(f)]}), "posix.system",
    ),
    "runs a command, legacy": (saved(Runs, legacy=True), "posix.system"),
    "runs a command, .bin in a folder": (
        lambda f: saved(Runs, name="pytorch_model.bin")(f).parent, "posix.system",
    ),
    "evaluates": (saved(evaluates), "asks for (__builtin__|builtins).eval"),
    "raw pickle": (lambda f: plain("m.ckpt", pickle.dumps(Runs(f), 2))(f), "pickle of another kind, which could run"),
    "raw pickle 5": (lambda f: plain("m.pt", pickle.dumps(Runs(f), 5))(f), "pickle of another kind, which could run"),
    "protocol 4 inside": (program(lambda f: pickle.dumps(Runs(f), 4)), "posix system|posix.system"),
    "old instance opcode": (
        program(lambda f: f"(S'touch {f / MARK}'\nios\nsystem\n.".encode()), "asks for os.system",
    ),
    "posix behind torch": (program(lambda f: b"ctorch.serialization\nos.system\n."), "asks for torch.serialization.os"),
    "allocates": (program(lambda f: b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."), "builtins.bytearray"),
    "bomb of lists": (program(lambda f: bomb(12)), "no tensors|Unsupported operand"),
    "bomb of depth": (program(lambda f: b"\x80\x02" + b"]" * 4_000 + b"a" * 3_999 + b"."), "list and no table"),
    "no instructions": (program(lambda f: b""), "not an intact PyTorch file"),
    "cut instructions": (program(lambda f: b"\x80\x02}X\xff\xff\xff\x7f"), "not an intact PyTorch file"),
    "unknown instruction": (program(lambda f: b"\x80\x02\xff."), "not an intact PyTorch file"),
    "empty stack": (program(lambda f: b"\x80\x020."), "not an intact PyTorch file"),
    "storage of another's file": (
        saved(lambda f: {"w": torch.ones(4).expand(10**6, 10**6, 4)}), r"claims \(1000000, 1000000, 4\) numbers",
    ),
    "claims 2 G numbers": (claims(2**31 - 1), "not an intact PyTorch file|claims"),
    "claims 2 G numbers, legacy": (claims(2**31 - 1, legacy=True), "not an intact PyTorch file|claims"),
    "truncated": (cut(saved(lambda f: {"w": torch.ones(4000)}), 0.6), "not an intact PyTorch file"),
    "truncated legacy": (cut(saved(lambda f: {"w": torch.ones(4000)}, legacy=True), 0.6), "not an intact PyTorch file"),
    "truncated legacy header": (cut(saved(lambda f: {"w": torch.ones(2)}, legacy=True), 0.2), "not an intact"),
    "path traversal": (archive(lambda ms: [*ms, ("archive/../../x", b"")]), "a member outside of itself"),
    "absolute member": (archive(lambda ms: [*ms, ("/etc/cron.d/x", b"")]), "a member outside of itself"),
    "zip bomb": (archive(lambda ms: [*ms, ("archive/data/9", bytes(10**7))], zipfile.ZIP_DEFLATED), "is compressed"),
    "TorchScript": (archive(lambda ms: [*ms, ("archive/constants.pkl", b"")]), "a TorchScript program"),
    "some zip": (archive(lambda ms: [("readme.txt", b"hello")]), "some other zip archive"),
    "two programs": (archive(lambda ms: [*ms, ("archive/x/data.pkl", b".")]), "some other zip archive"),
    "empty": (plain("m.bin", b""), r"is empty \(0 bytes\)"),
    "git lfs pointer": (plain("m.bin", POINTER), "Git LFS pointer.*: run git lfs pull"),
    "html page": (plain("m.pth", PAGE), "an HTML or XML page"),
    "noise": (plain("m.pt", b"\x93NUMPY" + bytes(99)), "of no known format"),
    "safetensors in disguise": (plain("m.ckpt", header(one(), bytes(8))), "give it the ending .safetensors"),
    "several sets": (
        saved(lambda f: {"params": {"w": torch.ones(1)}, "params_ema": {"w": torch.ones(1)}}),
        r"several sets of weights: params \(1 tensors\), params_ema \(1 tensors\)",
    ),
    "no tensors": (saved(lambda f: {"epoch": 3}), "holds no tensors"),
    "a bare tensor": (saved(lambda f: torch.ones(3)), "a Tensor and no table"),
    "a sparse tensor": (saved(lambda f: {"w": torch.eye(3).to_sparse()}), "_rebuild_sparse_tensor"),
}  # fmt: skip

FOLDERS: dict[str, tuple[Make, str]] = {
    "shard above": (indexed("../elsewhere.safetensors"), "points outside its folder"),
    "shard at the root": (indexed("{folder}/elsewhere.safetensors"), "points outside its folder"),
    "shard in a folder": (indexed("sub/m-2.safetensors"), "points outside its folder"),
    "shard with backslashes": (indexed("..\\elsewhere.safetensors"), "points outside its folder"),
    "shard is the folder above": (indexed(".."), "points outside its folder|no weights file by its ending"),
    "shard is the index": (indexed("model.safetensors.index.json"), "no weights file by its ending"),
    "shard missing": (indexed("m-3.safetensors"), "no such weights file"),
    "tensor elsewhere": (indexed("m-1.safetensors"), "disagree on 1 tensors, b first"),
    "no map": (indexed("", [1, 2]), "has no weight_map"),
    "several variants": (variants, "several variants and no plain model.safetensors: name one of ema, pruned"),
    "nothing": (folder_named("unet"), "has no weights"),
}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(*case, id=f"{kind}: {name}")
        for kind, cases in (("safetensors", SAFETENSORS), ("pickle", PICKLES), ("folder", FOLDERS))
        for name, case in cases.items()
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, make: Make, says: str) -> None:
    path = make(tmp_path)
    open_tensors(good(tmp_path))  # what is imported on first use is not the file's doing
    for read in (open_tensors, read_shapes):
        before, start = Peak(), time.thread_time()
        with pytest.raises(InputError, match=says) as error:
            read(path)
        assert time.thread_time() - start < 0.2
        assert before.grown() < 48 * 2**20
        message = str(error.value)
        assert str(tmp_path) in message and len(message.splitlines()) <= 2 and len(message) < 600 + len(str(path))
    assert not (tmp_path / MARK).exists()


def good(folder: Path) -> Path:
    torch.save({"w": torch.ones(1)}, folder / "good.pt")
    return folder / "good.pt"


def test_the_hostile_pickles_would_run(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    for make in (Runs, evaluates):
        pickle.loads(pickle.dumps(make(tmp_path)))
        (tmp_path / MARK).unlink()


class Peak:
    """How far the resident memory of this process rises above what it was (Linux; elsewhere nothing is measured)."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.start = self._read("VmHWM")

    def grown(self) -> int:
        return self._read("VmHWM") - self.start

    @staticmethod
    def _read(name: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """A configuration that believes what it is told."""

    layers: int = 2
    width: int = 4

    @classmethod
    def from_config(cls, data: dict[str, Any]) -> TowerConfig:
        return cls(**data)


class Tower(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers))


class Empty(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Identity()) for _ in range(config.layers)))


@pytest.mark.parametrize("network", [Tower, Empty])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": 10**9}, "'layers' = 1e.09 is beyond anything, no network can be built"),
        ({"width": 10**30}, "'width' = 1e.30 is beyond anything, no network can be built"),
        ({"layers": 4 * 10**6}, "far more than the 4 tensors there are"),
        ({"layers": [2, 10**9]}, "beyond anything"),
        ({"layers": {"a": [[10**9]]}}, "beyond anything"),
        ({"layers": "many"}, "no network can be built"),
        ({"depth": 3}, "unexpected keyword"),
    ],
)
def test_a_hostile_configuration_is_refused(network: Any, settings: dict[str, Any], says: str) -> None:
    tensors = Tower(TowerConfig()).state_dict()
    before, start = Peak(), time.thread_time()
    with pytest.raises(InputError, match=says) as error:
        config = configure(TowerConfig, settings, Path("unet/config.json"))
        fill(lambda: network(config), tensors, torch.float32, Path("unet"))
    assert time.thread_time() - start < 0.2 and before.grown() < 48 * 2**20
    assert "unet" in str(error.value) and len(str(error.value).splitlines()) <= 2
    assert fill(lambda: Tower(TowerConfig()), tensors, torch.float32, Path("unet"))  # the bound is gone again


def test_settings_nested_without_end_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InputError, match=r"config\.json"):
        configure(TowerConfig, {"layers": endless}, Path("config.json"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16])
def test_weights_that_are_no_numbers_are_named(bad: float, stored: torch.dtype, wanted: torch.dtype) -> None:
    weights = {key: value.to(stored) for key, value in Tower(TowerConfig()).state_dict().items()}
    weights["blocks.1.weight"][3, 2] = bad
    with pytest.raises(InputError, match=r"^unet: the tensor blocks.1.weight holds NaN or infinite numbers"):
        fill(lambda: Tower(TowerConfig()), weights, wanted, Path("unet"))


def test_weights_too_large_for_half_precision_are_named() -> None:
    weights = Tower(TowerConfig()).state_dict()
    weights["blocks.1.bias"][0] = -70000.0
    with pytest.raises(
        InputError, match=r"blocks.1.bias reaches 7e.04, too large for float16: use float32 or bfloat16"
    ):
        fill(lambda: Tower(TowerConfig()), weights, torch.float16, Path("unet"))
    assert fill(lambda: Tower(TowerConfig()), weights, torch.bfloat16, Path("unet"))


def test_whole_numbers_for_weights_are_named() -> None:
    weights = Tower(TowerConfig()).state_dict() | {"blocks.0.bias": torch.ones(4, dtype=torch.int64)}
    with pytest.raises(InputError, match=r"1 of another kind \(blocks.0.bias int64\)"):
        fill(lambda: Tower(TowerConfig()), weights, torch.float32, Path("unet"))


def whole(folder: Path) -> dict[str, Any]:
    """A training checkpoint as frameworks leave it: weights among all sorts of things."""
    return {
        "epoch": 3, "global_step": 1000, "names": ["a", "b"], "hyper_parameters": {"lr": 1e-4},
        "state_dict": OrderedDict(w=torch.arange(4.0), b=nn.Parameter(torch.ones(2)), note="text"),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}}],
    }  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        (whole(Path()), None, {"w": torch.arange(4.0), "b": torch.ones(2)}),
        ({"w": torch.ones(2), "step": 3, "config": {"a": 1}}, None, {"w": torch.ones(2)}),
        ({"model": {"w": torch.ones(2)}, "opt": {"w": torch.zeros(2)}}, None, {"w": torch.ones(2)}),
        ({"params": {"w": torch.ones(2)}, "params_ema": {"w": torch.zeros(2)}}, "params_ema", {"w": torch.zeros(2)}),
        ({"m": {"t": torch.arange(6.0).view(2, 3).t()}}, None, {"t": torch.arange(6.0).view(2, 3).t()}),
    ],
)
def test_a_training_checkpoint_yields_its_weights(
    tmp_path: Path, legacy: bool, content: Any, key: str | None, expected: dict[str, torch.Tensor]
) -> None:
    path = saved(lambda folder: content, legacy)(tmp_path)
    found = open_tensors(path, key)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert read_shapes(path, key) == {k: (tuple(t.shape), t.dtype) for k, t in expected.items()}


def test_what_frameworks_leave_behind_is_ignored(tmp_path: Path) -> None:
    """Lightning's callbacks and numpy's numbers in published checkpoints: never imported, never built."""
    import argparse

    import numpy

    name = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"

    def content(folder: Path) -> dict[str, Any]:
        return {"state_dict": {"w": torch.ones(3)}, "loss": numpy.float64(0.5), "args": argparse.Namespace(lr=1)}

    path = saved(content)(tmp_path)
    assert torch.equal(open_tensors(path)["w"], torch.ones(3))
    path = program(lambda f: b"\x80\x02}X\x04\x00\x00\x00last" + name + b")\x81}X\x01\x00\x00\x00aK\x01sbs.")(tmp_path)
    with pytest.raises(InputError, match="holds no tensors"):  # it was read to its end
        open_tensors(path)


def test_a_pickle_without_end_is_left(tmp_path: Path) -> None:
    path = program(lambda f: b"\x80\x02" + b"]0" * 10**7 + b"}.")(tmp_path)
    start = time.thread_time()
    with pytest.raises(InputError, match="more than 1000000 instructions"):
        open_tensors(path)
    assert time.thread_time() - start < 3


def test_a_mapped_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2**24)}, tmp_path / "m.ckpt")
    before = Peak()
    found = open_tensors(tmp_path / "m.ckpt")["w"]
    assert before.grown() < 16 * 2**20 and found.numel() == 2**24
