"""Memory of mapped weights, given back while they are converted: a file is mapped, read once and never needed again."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

OF_FILE, SWAPPED = 1 << 61, 1 << 62  # bits of /proc/self/pagemap; bit 63, the sign, says present


class Pages:
    """The file mappings of this process at one moment, and the right to let go of their pages.

    Only pages that the kernel says are still the file's own are let go: they come back from the file when touched
    again, so no number can change. A page written to is kept. Where the system does not tell (anything but Linux),
    nothing happens and memory stays until the tensors are deleted.
    """

    def __init__(self) -> None:
        self.ranges = _file_ranges()
        self.advise = _madvise() if self.ranges else None

    def release(self, tensor: Tensor) -> None:
        """Let go of the pages under a tensor or view, which must be alive since these mappings were listed."""
        if self.advise is None or tensor.device.type != "cpu" or not tensor.numel():
            return
        start = tensor.data_ptr()
        steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        at = bisect.bisect_right(self.ranges, (start, 2**64)) - 1
        if at < 0 or start >= self.ranges[at][1]:
            return  # not mapped from a file
        first = start - start % mmap.PAGESIZE
        last = min(start + (steps + 1) * tensor.itemsize, self.ranges[at][1])
        last += -last % mmap.PAGESIZE
        if _untouched(first, last):
            self.advise(first, last - first)


def _file_ranges() -> list[tuple[int, int]]:
    """Addresses [start, end) of every mapping of a file, in order; empty where the system does not list them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        span, rights, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0" and rights.startswith("r"):
            start, _, end = span.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _untouched(first: int, last: int) -> bool:
    """Whether all resident pages in a range are the file's own and none is a private copy that was written to."""
    page = mmap.PAGESIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = os.pread(file.fileno(), 8 * (last - first) // page, 8 * first // page)
    except OSError:
        return False
    if len(entries) != 8 * (last - first) // page:
        return False
    bits = torch.frombuffer(bytearray(entries), dtype=torch.int64)
    present, of_file, swapped = (bits < 0), (bits & OF_FILE) != 0, (bits & SWAPPED) != 0
    return not bool(((present & ~of_file) | swapped).any())


def _madvise() -> Callable[[int, int], None] | None:
    """The system's `madvise(start, length, MADV_DONTNEED)`, where there is one."""
    wish = getattr(mmap, "MADV_DONTNEED", None)
    try:
        call = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int

    def advise(start: int, length: int) -> None:
        call(start, length, wish)  # a refusal costs memory, not correctness

    return None if wish is None else advise
