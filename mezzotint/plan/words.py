"""Figures as people read and write them: bytes, operations, seconds, money."""

from __future__ import annotations

import re

from mezzotint.errors import InputError

UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30,
         "TIB": 2.0**40}  # fmt: skip


def size(count: float) -> str:
    """Bytes in the unit that suits, 1 GB being 10^9."""
    for unit in ("GB", "MB", "kB"):
        if abs(count) >= UNITS[unit.upper()]:
            return f"{count / UNITS[unit.upper()]:.3g} {unit}" if abs(count) < 1e12 else f"{count / 1e9:,.0f} GB"
    return f"{count:.0f} B"


def count(number: float) -> str:
    """Parameters and the like: 859.5 M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """Operations: 803 GFLOP."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:.0f} FLOP"


def seconds(span: float | None) -> str:
    """A time; a dash where it is not known."""
    if span is None:
        return "-"
    if span >= 2 * 3600:
        return f"{span / 3600:.3g} h"
    if span >= 120:
        return f"{span / 60:.3g} min"
    return f"{span:.3g} s" if span >= 0.1 else f"{1e3 * span:.3g} ms"


def bytes_of(text: str) -> float:
    """Bytes from 12GiB, 24GB, 800 MB; InputError otherwise."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise InputError(f"'{text}' is no size of memory: write it like 12GiB, 24GB or 800MB")
    return float(found[1]) * UNITS[found[2].upper()]
