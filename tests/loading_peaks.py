"""How much memory loading takes at its peak: run as a script in a process of its own by the test of checkpoints.

Prints {case: (peak, weights)} in bytes as JSON; every case runs in a fork, so that none profits from another's memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mezzotint.checkpoints import fill, open_tensors, write_sharded, write_tensors
from mezzotint.checkpoints.keymap import Fused, Transposed, entry, renamed

WIDTH, LAYERS = 1536, 12  # 71 million numbers: 142 MB in float16, 283 MB in float32


class Tower(nn.Module):
    """Layers as large as those of a real network, with one tensor that is a third of all."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.table = nn.Embedding(width * LAYERS, width)
        self.blocks = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(LAYERS // 2))


def numbers(dtype: torch.dtype, width: int = WIDTH) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = Tower(width).state_dict()
    return {name: torch.full(tensor.shape, 0.5, dtype=dtype) for name, tensor in wanted.items()}


def peak(work: Callable[[], int]) -> tuple[int, int]:
    """(growth of resident memory at its highest, what `work` returns) in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        warm_up()  # the program's own pages are not the weights'
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        expected = work()
        os.write(writer, json.dumps([resident() - before, expected]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        grown, expected = json.load(answer)
    return grown, expected


def warm_up() -> None:
    for dtype in (torch.float32, torch.float16):
        tower = fill(lambda: Tower(8), numbers(torch.bfloat16, 8), dtype, Path("tiny"))
        assert all(parameter.min() == 0.5 for parameter in tower.parameters())


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load(path: Path, dtype: torch.dtype, split: bool = False) -> int:
    """Load a tower, touch every number of it, and return its size."""
    tensors = open_tensors(path)
    if split:  # fused and turned around in the file: what is filled are views
        thirds = [entry(f"blocks.{i}", f"q.{i}", f"k.{i}", f"v.{i}", change=Fused((1, 1, 1))) for i in range(6)]
        tensors = renamed(tensors, [*thirds, entry("table.weight", "table.weight", change=Transposed())])
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        tower = fill(lambda: _bare(shapes), {name.replace(".", "_"): t for name, t in tensors.items()}, dtype, path)
    else:
        tower = fill(Tower, tensors, dtype, path)
    for parameter in tower.parameters():
        inner = parameter if parameter.is_contiguous() else parameter.T  # or min() would make a copy
        assert parameter.dtype == dtype and inner.min() == 0.5
    return sum(parameter.nbytes for parameter in tower.parameters())


def _bare(shapes: dict[str, torch.Size]) -> nn.Module:
    network = nn.Module()
    for name, shape in shapes.items():
        network.register_parameter(name.replace(".", "_"), nn.Parameter(torch.empty(shape)))
    return network


def make(folder: Path) -> int:
    half = numbers(torch.float16)
    write_tensors(folder / "half.safetensors", half)
    torch.save(half, folder / "half.ckpt")
    write_sharded(folder / "half", "model", half, limit=40 * 10**6)
    write_tensors(folder / "single.safetensors", half, dtype=torch.float32)
    return sum(tensor.nbytes for tensor in half.values())


def main(folder: Path) -> None:
    half, single = torch.float16, torch.float32
    found = {"written": peak(lambda: make(folder))}
    cases: dict[str, tuple[str, torch.dtype, bool]] = {
        "as stored": ("half.safetensors", half, False),
        "as stored, pickle": ("half.ckpt", half, False),
        "widened": ("half.safetensors", single, False),
        "widened, split": ("half.safetensors", single, True),
        "widened, pickle": ("half.ckpt", single, False),
        "widened, shards": ("half", single, False),
        "narrowed": ("single.safetensors", half, False),
        "narrowed, split": ("single.safetensors", half, True),
    }
    found |= {
        name: peak(lambda path=folder / path, dtype=dtype, split=split: load(path, dtype, split))
        for name, (path, dtype, split) in cases.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    main(Path(sys.argv[1]))
