"""Tables and a plot of what the doctor said: recall, false alarms, time, what is taken for what.

    python benchmarks/doctor/table.py runs/doctor/results-0.jsonl runs/doctor/results-1.jsonl

prints markdown and writes confusion.png beside the first file. A case counts as found where its true cause is the first
finding that is graded broken or harmful. A healthy case with any such finding is a false alarm. Where a file cannot be
opened at all the refusal counts as missed: nothing was named. With `--verified FILE`, what `run.py --verify` wrote of
the same cases, the faults that change nothing that is measured there (`verify.LEAST`) are counted apart.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTHING, REFUSED = "nothing", "refused"


@dataclass(frozen=True)
class Answer:
    """One case: what was true, and the causes that were named, alarms first to last."""

    seed: int
    model: str
    fault: str
    cause: str  # "" where healthy
    pain: int | None
    alarms: tuple[str, ...]
    notes: tuple[str, ...]
    also: tuple[str, ...]  # what the first alarm does not tell apart from itself
    seconds: float
    cpu: float | None  # of the process: what it takes on a machine that does nothing else
    refused: str

    @property
    def first(self) -> str:
        return self.alarms[0] if self.alarms else REFUSED if self.refused else NOTHING

    @property
    def found(self) -> bool:
        return self.first == self.cause if self.cause else not self.alarms and not self.refused


def read(paths: Sequence[Path]) -> tuple[list[Answer], list[dict[str, Any]]]:
    """The last record of every case, and those in which the benchmark or a probe broke down."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        for text in path.read_text().splitlines():
            record = json.loads(text)
            last[record["seed"], record["fault"], record["model"]] = record
    broken = [record for record in last.values() if "error" in record]
    return [answer(r) for r in last.values() if "ranked" in r], broken


def answer(record: dict[str, Any]) -> Answer:
    alarms = [each for each in record["ranked"] if each["grade"] != "note"]
    return Answer(
        record["seed"], record["model"], record["fault"], record["cause"], record["pain"],
        tuple(each["cause"] for each in alarms),
        tuple(each["cause"] for each in record["ranked"] if each["grade"] == "note"),
        tuple(alarms[0]["also"]) if alarms else (), record["seconds"], record.get("cpu"),
        record.get("refused", ""),
    )  # fmt: skip


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    share, square = hits / total, z * z / total
    middle = share + square / 2
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def share(hits: int, total: int) -> str:
    low, high = wilson(hits, total)
    return f"{hits}/{total} = {hits / max(total, 1):.1%} ({low:.1%} to {high:.1%})"


def quantiles(values: Sequence[float]) -> str:
    if not values:
        return "-"
    ninth = sorted(values)[math.ceil(0.9 * len(values)) - 1]
    return f"median {statistics.median(values):.1f}, 90th percentile {ninth:.1f}"


def idle(paths: Sequence[Path]) -> set[tuple[int, str, str]]:
    """The cases of verified files in which nothing happens."""
    records = [json.loads(text) for path in paths for text in path.read_text().splitlines()]
    return {(r["seed"], r["fault"], r["model"]) for r in records if r.get("idle")}


def summary(every: Sequence[Answer], without: set[tuple[int, str, str]]) -> str:
    faulty, healthy = [a for a in every if a.cause], [a for a in every if not a.cause]
    second = sum(a.cause in a.alarms[:2] for a in faulty)
    anywhere = sum(a.cause in (*a.alarms, *a.notes) for a in faulty)
    apart = sum(a.found or (bool(a.alarms) and a.cause in a.also) for a in faulty)
    something = sum(bool(a.alarms) or bool(a.refused) for a in faulty)
    by_fault = defaultdict(list)
    for a in faulty:
        by_fault[a.fault].append(a.found)
    whole = sum(all(found) for found in by_fault.values())
    felt = [a for a in faulty if (a.seed, a.fault, a.model) not in without]
    rows = [
        ("true cause first", share(sum(a.found for a in faulty), len(faulty))),
        *[("the same, of faults that change something", share(sum(a.found for a in felt), len(felt)))] * bool(without),
        ("true cause first, or not told apart from the first", share(apart, len(faulty))),
        ("true cause among the first two", share(second, len(faulty))),
        ("true cause named at all, also as a note", share(anywhere, len(faulty))),
        ("anything alarming said, or refused", share(something, len(faulty))),
        ("false alarms on healthy cases", share(sum(not a.found for a in healthy), len(healthy))),
        ("faults found in every case", f"{whole} of {len(by_fault)}"),
        ("seconds a case", quantiles([a.seconds for a in every])),
        ("seconds of a processor core a case", quantiles([a.cpu for a in every if a.cpu is not None])),
    ]
    return "\n".join(["| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def by_cause(every: Sequence[Answer]) -> str:
    """For each true cause: cases, found, among two, and what was named first instead."""
    grouped: dict[str, list[Answer]] = defaultdict(list)
    for a in every:
        grouped[a.cause].append(a)
    lines = ["| true cause | cases | first | first two | named instead |", "|---|---|---|---|---|"]
    for cause in sorted(grouped, key=lambda name: (name == "", name)):
        of = grouped[cause]
        wrong = Counter(a.first for a in of if not a.found)
        instead = ", ".join(f"{name} {count}" for name, count in wrong.most_common(4))
        hits, second = sum(a.found for a in of), sum(a.found or a.cause in a.alarms[:2] for a in of)
        lines.append(f"| {cause or 'healthy'} | {len(of)} | {hits} | {second if cause else '-'} | {instead} |")
    return "\n".join(lines)


def by_model(every: Sequence[Answer]) -> str:
    lines = ["| model | faults found | false alarms |", "|---|---|---|"]
    for model in sorted({a.model for a in every}):
        faulty = [a for a in every if a.model == model and a.cause]
        healthy = [a for a in every if a.model == model and not a.cause]
        alarms = sum(not a.found for a in healthy)
        lines.append(f"| {model} | {sum(a.found for a in faulty)}/{len(faulty)} | {alarms}/{len(healthy)} |")
    return "\n".join(lines)


def pains(every: Sequence[Answer]) -> str:
    """The cases that are pains of public threads, by their number."""
    lines = ["| pain | fault | found |", "|---|---|---|"]
    known = sorted({(a.pain, a.fault) for a in every if a.pain is not None})
    for pain, fault in known:
        of = [a for a in every if a.fault == fault]
        lines.append(f"| {pain} | {fault} | {sum(a.found for a in of)}/{len(of)} |")
    return "\n".join(lines)


def misses(every: Sequence[Answer]) -> str:
    lines = []
    for a in sorted((a for a in every if not a.found), key=lambda a: (a.cause, a.fault, a.model, a.seed)):
        notes = f"; notes {', '.join(a.notes)}" if a.notes else ""
        refused = f"; refused: {a.refused.splitlines()[0][:100]}" if a.refused else ""
        named = ", ".join(a.alarms) or "nothing"
        lines.append(f"- {a.cause or 'healthy'} ({a.fault}, {a.model}, seed {a.seed}): {named}{notes}{refused}")
    return "\n".join(lines)


def margins(paths: Sequence[Path]) -> str:
    """What healthy models measure where there is a bound: how near the nearest comes to it."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for text in (text for path in paths for text in path.read_text().splitlines()):
        record = json.loads(text)
        for probe, name, value, _, _, bound in record.get("measures", []) if not record["cause"] else []:
            if bound and math.isfinite(value):
                found[probe, name.partition(" (")[0], bound].append(value)
    lines = ["| probe | measure | bound | least | most | cases |", "|---|---|---|---|---|---|"]
    for (probe, name, bound), values in sorted(found.items()):
        lines.append(f"| {probe} | {name} | {bound} | {min(values):.3g} | {max(values):.3g} | {len(values)} |")
    return "\n".join(lines)


def plot(every: Sequence[Answer], path: Path) -> None:
    """True cause by row, the cause named first by column, as shares of a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    causes = sorted({a.cause for a in every if a.cause})
    named = [*causes, *sorted({a.first for a in every if a.alarms} - set(causes)), NOTHING, REFUSED]
    rows = [*causes, ""]
    table = [[0.0] * len(named) for _ in rows]
    for a in every:
        table[rows.index(a.cause)][named.index(a.first)] += 1
    totals = [max(sum(row), 1) for row in table]
    figure = Figure(figsize=(0.22 * len(named) + 3.2, 0.22 * len(rows) + 2.8))
    axes = figure.add_subplot()
    shares = [[value / total for value in row] for row, total in zip(table, totals, strict=True)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            if value:
                light = value / totals[i] > 0.6
                axes.text(
                    j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color="white" if light else "black"
                )
    axes.set_xticks(range(len(named)), named, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), [cause or "healthy" for cause in rows], fontsize=7)
    axes.set_xlabel("named first")
    axes.set_ylabel("true cause")
    axes.set_title("What the doctor names first (cases)", fontsize=9)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--verified", type=Path, nargs="*", default=[], help="what run.py --verify wrote")
    parser.add_argument("--plot", type=Path, help="instead of confusion.png beside the first file")
    options = parser.parse_args()
    every, broken = read(options.results)
    for title, text in (
        ("Summary", summary(every, idle(options.verified))), ("By cause", by_cause(every)),
        ("By model", by_model(every)), ("Pains of public threads", pains(every)),
        ("Misses", misses(every)), ("Healthy models and the bounds", margins(options.results)),
    ):  # fmt: skip
        print(f"## {title}\n\n{text}\n")
    if broken:
        lines = [f"- {r['fault']}, {r['model']}, seed {r['seed']}: {r['error'][:160]}" for r in broken]
        print("## Broke down\n\n" + "\n".join(lines))
    plot(every, options.plot or options.results[0].with_name("confusion.png"))


if __name__ == "__main__":
    main()
