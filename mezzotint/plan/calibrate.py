"""Measure a machine: the kernels that diffusion models spend their time in, at sizes that bracket theirs.

About half a minute on two cores: matrix products, convolutions, attention, their backward passes, what only moves
numbers, and what a call costs however small it is. The result is kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.backbones.dit import DiT
from mezzotint.backbones.presets import dit, small_text_unet
from mezzotint.backbones.unet import UNet
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.files import write_json
from mezzotint.plan.machines import CPU_BASE, Machine, Point
from mezzotint.plan.trace import imaginary, imagined, outlined, trace
from mezzotint.plan.trials import NUMBERS, Act, tasks

EDITION = 2  # of what is measured: what an earlier one kept is measured anew
SPENT, ROUNDS = 0.1, 2  # seconds on a kernel at a size, but three runs at least in each round
HOPELESS = 1.0  # seconds: what takes longer is believed at once
SLOW = 1 / 20  # of float32's rate in a product: formats that are emulated get no further measuring


def calibrate(device: str = "cpu", watch: Callable[[int, int], None] | None = None) -> Machine:
    """Measure the device with the number of threads that torch uses now; `watch(done, all)` follows."""
    at = torch.device(device)
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    points: dict[str, dict[str, list[Point]]] = {}
    best = 0.0
    for dtype in kinds:
        name = str(dtype).removeprefix("torch.")
        if dtype is not torch.float32:
            rate = _quick(at, dtype)
            if rate < SLOW * best:
                points[name] = _scaled(points["float32"], rate / best)
                continue
        points[name] = _measured(at, dtype, points.get("float32"), watch)
        if dtype is torch.float32:
            best = _quick(at, dtype)
    memory, what = _memory(at)
    base = CPU_BASE if at.type == "cpu" else 0.0
    machine = Machine(
        what, "cpu" if at.type == "cpu" else "accelerator", memory, points, _overhead(at), base,
        f"measured here, {torch.get_num_threads()} threads", True,
    )  # fmt: skip
    machine = replace(machine, whole=whole(machine, at))
    if watch:
        total = ROUNDS * sum(map(len, points["float32"].values())) + 2
        watch(total, total)
    return machine


def _measured(
    at: torch.device, dtype: torch.dtype, plain: Mapping[str, Sequence[Point]] | None, watch: Any
) -> dict[str, list[Point]]:
    """Every kernel in a format; of one that is far slower than in float32 the first size alone, the rest by its share.

    In rounds, of which the fastest counts: another job rarely lasts through all of them. In formats other than float32
    there is one, and what only moves numbers is measured at one size.
    """
    trials = tasks(at, dtype, NUMBERS if plain is None else NUMBERS[2:3])
    rates, shares = [0.0] * len(trials), dict[str, float]()
    rounds = ROUNDS if plain is None else 1
    for done, (turn, place) in enumerate(product(range(rounds), range(len(trials)))):
        kernel, shape, work, act = trials[place]
        known = {point.shape: point.rate for point in plain[kernel]} if plain else {}
        if kernel in shares:
            rates[place] = rates[place] or shares[kernel] * known[shape]
            continue
        rates[place] = max(rates[place], work / _seconds(act, at, SPENT / ROUNDS))
        if not turn and shape in known and len(shape) > 1 and rates[place] < 2 * SLOW * known[shape]:
            shares[kernel] = rates[place] / known[shape]
        if watch and plain is None:
            watch(done + 1, rounds * len(trials) + 2)
    found: dict[str, list[Point]] = {}
    for (kernel, shape, _, _), rate in zip(trials, rates, strict=True):
        found.setdefault(kernel, []).append(Point(shape, rate))
    return found


def whole(machine: Machine, at: torch.device) -> dict[str, float]:
    """How many times as long whole networks take as their kernels, forward and with the way back.

    Caches are colder in a network than in a trial, memory is new, and Python stands between the kernels. The mean, by
    the logarithm, of a small U-Net and a small transformer.
    """
    text, label = torch.zeros(2, 77, 256, device=at), torch.zeros(4, dtype=torch.long, device=at)
    shapes: list[tuple[Callable[[], Any], int, Conditioning]] = [
        (lambda: UNet(small_text_unet(4, 4, 256, 96, 32)), 2, Conditioning(tokens=text)),
        (lambda: DiT(dit("S/4", 4, 4, 10, 32)), 4, Conditioning(label=label)),
    ]
    runs: list[tuple[str, Act, float | None]] = []  # of a network, with what its kernels take
    for build, count, told in shapes:
        network = build().to(at)
        with outlined():
            outline = build()
        x, t = torch.randn(count, 4, 32, 32, device=at), torch.zeros(count, device=at)
        for way, learns in (("forward", False), ("backward", True)):
            with imagined():
                twin = imaginary(outline, torch.float32, trains=learns)
                seen = told.map(lambda part: torch.empty(part.shape, dtype=part.dtype))
                act = partial(_passes, twin, torch.empty(x.shape), torch.empty(t.shape), seen, learns)
                calls = trace(act, twin.parameters()).calls
            runs.append((way, partial(_passes, network, x, t, told, learns), machine.seconds(calls)))
    rounds = [[_seconds(act, at, 5 * SPENT / ROUNDS) for _, act, _ in runs] for _ in range(ROUNDS)]
    ratios: dict[str, list[float]] = {}
    for (way, _, kernels), spans in zip(runs, zip(*rounds, strict=True), strict=True):
        ratios.setdefault(way, []).append(min(spans) / (kernels or min(spans)))
    return {way: exp(sum(map(log, each)) / len(each)) for way, each in ratios.items()}


def _passes(network: Any, x: Tensor, t: Tensor, told: Conditioning, learns: bool) -> None:
    with torch.set_grad_enabled(learns):
        raw = network(x, t, told)
        if learns:
            raw.square().mean().backward()


def key(device: str) -> str:
    """What a measurement holds for: the machine, torch and its threads."""
    at = torch.device(device)
    return f"{_memory(at)[1]}; torch {torch.__version__}; {torch.get_num_threads()} threads; {at.type}"


def place(device: str) -> Path:
    """The file in the user's cache folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mezzotint" / f"machine-{torch.device(device).type}.json"


def keep(machine: Machine, device: str) -> Path:
    """Write a measured machine where `kept` finds it."""
    points = {dtype: {kernel: [[list(p.shape), p.rate] for p in rows] for kernel, rows in kernels.items()}
              for dtype, kernels in machine.points.items()}  # fmt: skip
    return write_json(place(device), {
        "key": key(device), "edition": EDITION, "name": machine.name, "memory": machine.memory,
        "overhead": machine.overhead, "whole": dict(machine.whole), "points": points,
    })  # fmt: skip


def kept(device: str = "cpu") -> Machine | None:
    """The machine as it was measured last; None where it was not, or with another torch or number of threads."""
    try:
        found = json.loads(place(device).read_bytes())
        if (found["key"], found["edition"]) != (key(device), EDITION):
            return None
        points = {
            dtype: {kernel: [Point(tuple(shape), rate) for shape, rate in rows] for kernel, rows in kernels.items()}
            for dtype, kernels in found["points"].items()
        }
        kind = "cpu" if torch.device(device).type == "cpu" else "accelerator"
        base = CPU_BASE if kind == "cpu" else 0.0
        return Machine(found["name"], kind, found["memory"], points, found["overhead"], base,
                       f"measured here: {found['key']}", True, found["whole"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unmeasured() -> Machine:
    """This machine's processor before it was measured: its memory is known and its speed is not."""
    memory, what = _memory(torch.device("cpu"))
    return Machine(what, "cpu", memory, {}, 0.0, CPU_BASE, "not measured: run mezzotint plan --calibrate once")


def _seconds(act: Act, at: torch.device, spent: float = SPENT) -> float:
    """The lower quartile of as many runs as the time allows: other jobs only ever make a run longer."""
    with torch.no_grad():
        first = _once(act, at, 1)
        if first > HOPELESS:
            return first
        row = max(1, int(2e-4 / max(first, 1e-7)))  # short calls in a row, or the clock itself would count
        spans: list[float] = []
        until = time.perf_counter() + spent
        while len(spans) < 3 or time.perf_counter() < until:
            spans.append(_once(act, at, row) / row)
    return sorted(spans)[(len(spans) - 1) // 4]


def _once(act: Act, at: torch.device, row: int) -> float:
    start = time.perf_counter()
    for _ in range(row):
        act()
    if at.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _quick(at: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one modest product."""
    a = torch.randn(256, 256, device=at).to(dtype)
    return 2.0 * 256**3 / _seconds(lambda: a @ a, at)


def _scaled(points: Mapping[str, Sequence[Point]], share: float) -> dict[str, list[Point]]:
    """A format that the machine emulates: float32's figures, the computing ones by the share of its product."""
    return {kernel: [Point(p.shape, p.rate * (share if len(p.shape) > 1 else 1.0)) for p in rows]
            for kernel, rows in points.items()}  # fmt: skip


@torch.no_grad()
def _overhead(at: torch.device) -> float:
    """Seconds that one operator costs in a network of tiny layers, Python and all."""
    layers = nn.Sequential(*(layer for _ in range(100) for layer in (nn.Linear(8, 8), nn.SiLU()))).to(at)
    x = torch.randn(2, 8, device=at)
    return _seconds(lambda: layers(x), at) / 200


def _memory(at: torch.device) -> tuple[float | None, str]:
    """Bytes of memory, and what the device is called."""
    if at.type != "cpu":
        try:
            facts: Any = torch.cuda.get_device_properties(at)
            return float(facts.total_memory), str(facts.name)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"the device {at} cannot be used: {str(error).splitlines()[0]}") from error
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else None
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return memory, f"{model}, {os.cpu_count()} cores"
