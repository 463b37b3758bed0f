"""What this machine can do at best: matrix products, convolutions and copies a second, cores and memory.

A network is judged against these numbers and not against a list of processors: what a format, a kernel or a thread is
worth differs between machines of one name.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from mezzotint.doctor.clock import Paired, settled

SPENT = 0.1  # seconds on each of the three; the best of many runs is a ceiling, also beside other jobs
PRODUCT, LARGEST = 256, 4096  # sides of the matrices: grown until one product takes
ENOUGH = 2e-3  # seconds, far above what a call costs
COPIED = 1 << 24  # numbers of float32, 64 MiB: beyond the caches of most machines
PAIRS = 7
MOST = 20  # runs of each side of a pair


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best that was seen, in operations and bytes a second."""

    matrix: float
    convolution: float
    copy: float  # read and written bytes together

    def seconds(self, flops: dict[str, float]) -> float:
        """The least time for floating-point operations by kind of layer."""
        other = sum(count for kind, count in flops.items() if kind != "convolution")
        return flops.get("convolution", 0.0) / self.convolution + other / self.matrix


@lru_cache(maxsize=32)
def ceiling(device: str, dtype: torch.dtype, threads: int, channels: int, side: int) -> Ceiling:
    """The ceiling with convolutions of `channels` at side x side; `threads` are those at work, for the memory of it."""
    assert threads == torch.get_num_threads()
    product, convolution = _product(device, dtype), _convolution(device, dtype, channels, side)
    rows = torch.randn(COPIED, device=device), torch.empty(COPIED, device=device)
    return Ceiling(
        product.flops / _best(product.act, device),
        convolution.flops / _best(convolution.act, device),
        2 * rows[0].nbytes / _best(lambda: rows[1].copy_(rows[0]), device),
    )


def times_slower(
    device: str, dtype: torch.dtype, than: torch.dtype, flops: dict[str, float], channels: int, side: int
) -> Paired:
    """How much longer a network with operations `flops` by kind takes in one format than in another: paired, by the
    product and the convolution of the ceiling, weighted by what the network spends on each in the quicker format."""
    products = [_product(device, kind, PRODUCT if device == "cpu" else 2048) for kind in (dtype, than)]
    pairs = _ratios(products[0].act, products[1].act, device)
    convolved = flops.get("convolution", 0.0) / max(sum(flops.values()), 1.0)
    if convolved > 0.05:  # a share that no ratio of single operations would turn
        convolutions = [_convolution(device, kind, channels, side) for kind in (dtype, than)]
        others = _ratios(convolutions[0].act, convolutions[1].act, device)
        pairs = [(1 - convolved) * a + convolved * b for a, b in zip(pairs, others, strict=True)]
    return Paired(tuple(pairs))


def product(device: str, dtype: torch.dtype) -> Callable[[], object]:
    """A matrix product that takes long enough to be timed well."""
    return _product(device, dtype).act


def cores() -> int:
    """The cores that this process may use: those it is bound to, or its share of them where that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(bound, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or no limit in it
        return bound


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, and pages that had to be read back from disk since the process began."""

    available: float | None  # None where the system does not tell
    resident: float | None  # of this process
    swapped: float | None  # of this process
    faults: int


def memory() -> Memory:
    """The memory of the machine and of this process, now."""
    machine, own = _table("/proc/meminfo"), _table("/proc/self/status")
    available = machine.get("MemAvailable")
    try:
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text()) - float((group / "memory.current").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit += float(cache.get("inactive_file", 0))
        available = limit if available is None else min(available, limit)
    except (OSError, ValueError):  # no such group, or no limit in it
        pass
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    return Memory(available, own.get("VmRSS"), own.get("VmSwap"), faults)


def _table(path: str) -> dict[str, float]:
    """Bytes by name from the kernel's tables of kilobytes; empty where there are none."""
    try:
        rows = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): 1024.0 * float(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}


@dataclass(frozen=True, slots=True)
class _Task:
    flops: float
    act: Callable[[], object]


def _product(device: str, dtype: torch.dtype, side: int = 0) -> _Task:
    """A square matrix product of the given side, or of one at which it takes long enough to be timed well."""
    grown = side or PRODUCT
    while True:
        a, b = (torch.randn(grown, grown, device=device).to(dtype) for _ in range(2))
        act = lambda a=a, b=b: a @ b  # noqa: E731
        if side or grown >= LARGEST or (act(), settled(act, device))[1] > ENOUGH:
            return _Task(2.0 * grown**3, act)
        grown *= 2


def _convolution(device: str, dtype: torch.dtype, channels: int, side: int) -> _Task:
    """A 3x3 convolution of two images, as the two branches of guidance make it."""
    x = torch.randn(2, channels, side, side, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    return _Task(2.0 * 9 * channels**2 * side**2 * 2, lambda: F.conv2d(x, weight, padding=1))


@torch.inference_mode()
def _best(act: Callable[[], object], device: str) -> float:
    act()
    until, best, turns = time.perf_counter() + SPENT, float("inf"), 0
    while turns < 3 or time.perf_counter() < until:
        best, turns = min(best, settled(act, device)), turns + 1
        if turns == 3 and best > 1.0:  # a format of which one run says everything
            break
    return best


@torch.inference_mode()
def _ratios(first: Callable[[], object], second: Callable[[], object], device: str) -> list[float]:
    """Pair by pair, each side the best of a few; the quicker side runs several times in a row, so that both take about
    as long: beside other jobs what is shorter is disturbed less, and would seem quicker still."""
    first()
    second()
    once = [min(settled(act, device) for _ in range(3)) for act in (first, second)]
    rows = [max(1, min(100, round(max(once) / spent))) for spent in once]
    times = min(MOST, max(1, int(SPENT / 2 / max(*once, 1e-6))))

    def best(act: Callable[[], object], row: int) -> float:
        return min(settled(lambda: [act() for _ in range(row)], device) for _ in range(times)) / row

    return [best(first, rows[0]) / best(second, rows[1]) for _ in range(PAIRS)]
