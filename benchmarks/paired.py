"""Paired timing: several ways to do one piece of work, in turns within one process, reported as ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
Work = Callable[[], Tensor]  # one timed piece of work; its output is what the sides are compared by


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: times in seconds, ratio = reference / ours."""

    case: str
    arm: str
    rounds: int
    reference_median: float
    median: float
    ratio_median: float
    ratio_min: float
    ratio_max: float
    error: float  # max |ours - reference| / max |reference|, the worst of all rounds


def in_turns(arms: Mapping[str, Callable[[], T]], rounds: int) -> Iterator[tuple[bool, dict[str, tuple[float, T]]]]:
    """Every arm once a round, in turning order: whether the round counts (one is warm-up), then seconds and output."""
    names = list(arms)
    for turn in range(-1, rounds):
        found: dict[str, tuple[float, T]] = {}
        shift = max(turn, 0) % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            output = arms[name]()
            found[name] = time.perf_counter() - start, output
        yield turn >= 0, found


def measure(case: str, arms: dict[str, Work], rounds: int) -> list[Row]:
    """Time the arms in turns; the first is the reference. One warm-up each is compared but not timed."""
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    errors = dict.fromkeys(names, 0.0)
    for counts, found in in_turns(arms, rounds):
        _, reference = found[names[0]]
        for name, (spent, output) in found.items():
            if counts:
                times[name].append(spent)
            gap = (output - reference).abs().max() / reference.abs().max()
            errors[name] = max(errors[name], gap.item())
    rows: list[Row] = []
    middle = statistics.median
    for name in names[1:]:
        ratios = [theirs / ours for theirs, ours in zip(times[names[0]], times[name], strict=True)]
        rows.append(
            Row(
                case,
                name,
                rounds,
                middle(times[names[0]]),
                middle(times[name]),
                middle(ratios),
                min(ratios),
                max(ratios),
                errors[name],
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    lines = [f"{'case':<12}{'arm':<22}{'reference s':>12}{'ours s':>10}{'ratio':>8}{'spread':>16}{'error':>10}"]
    for row in rows:
        spread = f"{row.ratio_min:.2f} - {row.ratio_max:.2f}"
        lines.append(
            f"{row.case:<12}{row.arm:<22}{row.reference_median:>12.3f}{row.median:>10.3f}"
            f"{row.ratio_median:>8.2f}{spread:>16}{row.error:>10.1e}"
        )
    return "\n".join(lines)
