"""Time and peak memory of loading a large network, beside diffusers and plain safetensors, in processes of their own.

    python benchmarks/loading.py            # Stable Diffusion 1.5's U-Net with random weights: 7 GB of disk for a while

Every case runs in a fresh process, the readers in turn, `--rounds` times; the medians are printed. `peak` is the
growth of resident memory (VmHWM) during loading and one look at every number, over the size of the loaded weights;
`load` are the seconds until the network is there, `read` those of the first look at every number (mapped weights come
from disk only then). Files are in the page cache, as after a download or an earlier start. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.checkpoints import configure, fill, open_tensors, read_json, write_sharded
from mezzotint.files import write_json

STEM = "diffusion_pytorch_model"
CONFIG = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
TINY = CONFIG | {"block_out_channels": [32, 32, 32, 32], "norm_num_groups": 8, "cross_attention_dim": 8}
CASES = (  # file, wanted, shards
    ("float32", "float32", 1), ("float16", "float32", 1), ("float32", "float16", 1),
    ("float16", "float32", 4), ("float16", "float16", 4),
)  # fmt: skip


def ours(folder: Path, dtype: torch.dtype) -> nn.Module:
    config = configure(ConditionalUNetConfig, read_json(folder / "config.json"), folder / "config.json")
    return fill(lambda: UNet(config), open_tensors(folder), dtype, folder)


def diffusers(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)


def safetensors(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The usual few lines: load the file, convert it, assign it."""
    from safetensors.torch import load_file

    config = configure(ConditionalUNetConfig, read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        network = UNet(config)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


READERS: dict[str, Callable[[Path, torch.dtype], nn.Module]] = {
    "mezzotint": ours, "diffusers": diffusers, "safetensors": safetensors,
}  # fmt: skip


def make(folder: Path, config: dict[str, object], dtype: str, shards: int) -> Path:
    """A part's folder with random weights, written without ever being in memory as a whole."""
    with torch.device("meta"):
        shapes = UNet(ConditionalUNetConfig.from_config(config)).state_dict()
    tensors = {name: (0.02 * torch.randn(t.shape[1:])).expand(t.shape) for name, t in shapes.items()}
    kind = getattr(torch, dtype)
    size = sum(tensor.numel() for tensor in shapes.values()) * kind.itemsize
    write_json(folder / "config.json", config)
    write_sharded(folder, STEM, tensors, dtype=kind, limit=size // shards + 2**27 if shards > 1 else size)
    return folder


def measure(reader: str, folder: Path, tiny: Path, dtype: torch.dtype) -> dict[str, float]:
    """One load in this process, after a tiny one so that the program's own pages are not counted."""
    look(READERS[reader](tiny, dtype))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident(), time.perf_counter()
    network = READERS[reader](folder, dtype)
    loaded = time.perf_counter()
    look(network)
    size = sum(parameter.nbytes for parameter in network.parameters())
    return {
        "peak": (resident() - before) / size, "load": loaded - start, "read": time.perf_counter() - loaded,
        "gigabytes": size / 1e9,
    }  # fmt: skip


def look(network: nn.Module) -> None:
    for parameter in network.parameters():
        assert parameter.amax().isfinite()


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def compare(rounds: int, place: Path) -> None:
    print(f"{'file':>8} {'wanted':>8} {'shards':>6} {'reader':>12} {'peak':>6} {'load s':>7} {'read s':>7}")
    for stored, wanted, shards in CASES:
        tiny = make(place / "tiny", TINY, stored, 1)
        folder = make(place / "large", CONFIG, stored, shards)
        found: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
        for _ in range(rounds):
            for reader in READERS:
                command = [sys.executable, __file__, "--one", reader, str(folder), str(tiny), wanted]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[reader].append(json.loads(done.stdout.splitlines()[-1]))
        for reader, runs in found.items():
            peak, load, read = (statistics.median(run[key] for run in runs) for key in ("peak", "load", "read"))
            print(f"{stored:>8} {wanted:>8} {shards:>6} {reader:>12} {peak:6.2f} {load:7.2f} {read:7.2f}", flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(tiny)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=4, metavar=("READER", "FOLDER", "TINY", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        reader, folder, tiny, dtype = options.one
        print(json.dumps(measure(reader, Path(folder), Path(tiny), getattr(torch, dtype))))
        return
    with tempfile.TemporaryDirectory(prefix="loading-") as place:
        if shutil.disk_usage(place).free < 12e9:
            raise SystemExit("this needs 12 GB of free disk for a while: set TMPDIR to a place that has it")
        compare(options.rounds, Path(place))


if __name__ == "__main__":
    main()
