"""Seconds and memory of one piece of work."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from mezzotint.families import Model
from mezzotint.families.model import PartName

T = TypeVar("T")
PARTS: tuple[PartName, ...] = ("text", "backbone", "codec")
PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What the work gives, and its seconds until an accelerator has done its part too."""
    _settle(device)
    start = time.perf_counter()
    result = work()
    _settle(device)
    return result, time.perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak(work: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What the work gives, and the bytes that it needs at most beyond what is held before: weights are not counted.

    On CUDA the allocator's peak. On Linux the process's resident peak, after memory that the C library kept for later
    has been given back; so the work is slower, and is not to be timed. None on other systems.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not PEAK.exists():
        return work(), None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    try:
        PEAK.write_text("5")  # the resident peak starts anew
    except OSError:  # some containers do not let a process do this
        return work(), None
    before = _resident("VmRSS")
    result = work()
    return result, max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(name))


def weights(model: Model) -> int:
    """Bytes of all parts' parameters and buffers."""
    networks: list[nn.Module] = [network for part in PARTS for network in model.networks(part).values()]
    tensors = {id(t): t for network in networks for t in (*network.parameters(), *network.buffers())}
    return sum(t.numel() * t.itemsize for t in tensors.values())
