"""How much memory whole models take: run as a script in a process of its own by the test of families' loading.

Prints {case: (peak, weights)} in bytes as JSON, and what stays resident of a text encoder between its uses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from loading_peaks import peak
from torch import nn

import mezzotint as mz
from mezzotint.families.model import Model, working
from mezzotint.text.vocabulary import clip_vocabulary


def warm_up(folder: Path) -> None:
    """Import what loading and generating import, so that only weights are counted afterwards."""
    mz.generate(mz.load(folder), mz.Request(prompt="a cell", steps=1, guidance=1.0))
    clip_vocabulary()


def load(path: Path, dtype: torch.dtype) -> int:
    model = mz.load(path, dtype=dtype)
    return sum(bytes_of(network) for network in networks(model))


def networks(model: Model) -> list[nn.Module]:
    return [network for part in ("text", "backbone", "codec") for network in model.networks(part).values()]


def bytes_of(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in (*network.parameters(), *network.buffers()))


def rest(path: Path) -> tuple[int, int]:
    """Resident bytes that the text encoder gives back when it has worked, and its weights."""
    model = mz.load(path, offload=True)
    assert model.text is not None
    with working(model, "text"):
        model.text.encode(["a crack"])
        for network in model.text.networks.values():
            sum(float(tensor.sum()) for tensor in network.parameters())  # every page of it
        before = now_resident()
    return before - now_resident(), sum(map(bytes_of, model.text.networks.values()))


def now_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def beyond(path: Path, like: Path, dtype: torch.dtype) -> tuple[int, int]:
    """The peak of loading beyond that of a small model of the same kind: tokenizers and tables are no weights."""
    (least, few), (peak_, weights) = peak(lambda: load(like, dtype)), peak(lambda: load(path, dtype))
    return peak_ - max(0, least - few), weights


def main(small: Path, large: Path) -> None:
    warm_up(small)
    found = {
        "folder": beyond(large, small, torch.float32),
        "folder, narrowed": beyond(large, small, torch.bfloat16),
        "single file": beyond(large / "model.safetensors", small, torch.float32),
    }
    print(json.dumps({**found, "given back": rest(large)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
