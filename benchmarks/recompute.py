"""What computing activations again saves and costs: peak memory and time of a training step, with and without it.

    python benchmarks/recompute.py --rounds 5

Every arm runs in a process of its own, the two of a pair one after the other and each first in every second round.
Memory is the peak of a step (loss, gradients) beyond what is resident after a step on one picture; time is the median
of the steps of a process. Printed are medians over rounds, and of the pairs' ratios. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mezzotint.backbones.initialise import initialise
from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.layers.recompute import recompute

SIDE, WORDS, WIDTH, STEPS = 32, 77, 256, 3


def unet() -> nn.Module:
    return UNet(
        ConditionalUNetConfig(
            block_out_channels=(64, 128, 192), down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2, cross_attention_dim=WIDTH,
            attention_head_dim=4,
        )
    )  # fmt: skip


def mmdit() -> nn.Module:
    return MMDiT(
        MMDiTConfig(
            sample_size=SIDE, in_channels=4, out_channels=4, num_layers=8, attention_head_dim=64, num_attention_heads=5,
            joint_attention_dim=WIDTH, caption_projection_dim=320, pooled_projection_dim=WIDTH,
            pos_embed_max_size=SIDE, qk_norm="rms_norm",
        )
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"unet": unet, "mmdit": mmdit}
ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {"kept": lambda network: network, "again": recompute}


def measure(name: str, arm: str, batch: int) -> dict[str, float]:
    """One network in this process, after a step on a single picture, which makes gradients and buffers."""
    torch.manual_seed(0)
    network = ARMS[arm](initialise(NETWORKS[name]()).train())
    step(network, 1)
    Path("/proc/self/clear_refs").write_text("5")
    before, times = resident("VmRSS"), []
    for _ in range(STEPS):
        start = time.perf_counter()
        step(network, batch)
        times.append(time.perf_counter() - start)
    weights = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    return {"megabytes": (resident("VmHWM") - before) / 1e6, "seconds": statistics.median(times), "millions": weights}


def step(network: nn.Module, batch: int) -> None:
    x, t = torch.randn(batch, 4, SIDE, SIDE), torch.rand(batch) * 999
    told = Conditioning(tokens=torch.randn(batch, WORDS, WIDTH), pooled=torch.randn(batch, WIDTH))
    (network(x, t, told) - x).square().mean().backward()


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def compare(rounds: int, batch: int) -> None:
    print(f"batch {batch}, latents 4 x {SIDE} x {SIDE}, {torch.get_num_threads()} threads")
    print(f"{'network':>8} {'weights M':>9} {'arm':>6} {'peak MB':>8} {'step s':>7} {'memory':>7} {'time':>7}")
    for name in NETWORKS:
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for round_ in range(rounds):
            for arm in list(ARMS)[:: 1 - 2 * (round_ % 2)]:
                command = [sys.executable, __file__, "--one", name, arm, "--batch", str(batch)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
        for arm, runs in found.items():
            peak, seconds = (statistics.median(run[key] for run in runs) for key in ("megabytes", "seconds"))
            memory, took = (
                statistics.median(a[key] / b[key] for a, b in zip(runs, found["kept"], strict=True))
                for key in ("megabytes", "seconds")
            )
            millions = runs[0]["millions"]
            print(
                f"{name:>8} {millions:9.1f} {arm:>6} {peak:8.0f} {seconds:7.2f} {memory:7.2f} {took:7.2f}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, arm = options.one
        print(json.dumps(measure(name, arm, options.batch)))
    else:
        compare(options.rounds, options.batch)


if __name__ == "__main__":
    main()
