"""What the benchmark of plans says: predicted over measured, by case, scored, drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import CASES, Case, subject

from mezzotint.files import write_with
from mezzotint.plan import calibrate
from mezzotint.plan.generating import Job, generating
from mezzotint.plan.machines import Machine
from mezzotint.plan.objective import Training
from mezzotint.plan.training import training
from mezzotint.training import adversary

BOUNDS = {"flops": 0.01, "memory": 0.10, "time": 0.20}


@dataclass(frozen=True)
class Row:
    """A case: what was predicted and what was measured."""

    case: Case
    predicted: Mapping[str, float | None]
    measured: Mapping[str, float | None]

    def ratio(self, what: str, against: str = "") -> float | None:
        """Predicted over measured; None where one of them is missing."""
        ours, theirs = self.predicted.get(what), self.measured.get(against or what)
        return ours / theirs if ours and theirs else None


def rows(results: Mapping[str, Mapping[str, Any]], names: Sequence[str], places: Path) -> list[Row]:
    """The cases in order, with the machine that was measured nearest to each."""
    found: list[Row] = []
    for case in CASES:
        if case.name in names and case.name in results:
            result = results[case.name]
            found.append(Row(case, predicted(case, kept(places / str(result.get("machine", 0)))), result))
    return found


def kept(place: Path) -> Machine:
    """A machine as it was measured in a run."""
    os.environ["XDG_CACHE_HOME"] = str(place)
    return calibrate.kept("cpu") or calibrate.unmeasured()


def predicted(case: Case, machine: Machine) -> dict[str, float | None]:
    """The plan's figures: operations of one step where it trains, and its time; libraries' own memory is left out."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in case.options.items()}
    planned = subject(case.model)
    if not case.trains:
        plan = generating(planned, Job(**options), machine)
        return {"flops": plan.flops, "memory": plan.peak - machine.base, "time": plan.seconds}
    plan = training(planned, Training(**options), machine, adversary)
    step = plan.phases[-1]
    once = sum(phase.flops for phase in plan.phases[:-1]) + step.traced.flops
    return {"flops": once, "memory": plan.peak - machine.base, "time": machine.seconds(step.traced.calls)}


def scored(found: Sequence[Row], what: str, against: str = "") -> dict[str, float]:
    """Median and 90th percentile of how far off predictions are, and the share within the bound."""
    ratios = [row.ratio(what, against) for row in found]
    errors = np.abs(np.array([ratio for ratio in ratios if ratio is not None]) - 1)
    if not len(errors):
        return {"cases": 0, "median": float("nan"), "p90": float("nan"), "within": float("nan")}
    return {"cases": len(errors), "median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9)),
            "within": float((errors <= BOUNDS[what]).mean())}  # fmt: skip


def written(found: Sequence[Row]) -> str:
    """The table of cases and that of scores, as Markdown."""
    lines = ["| case | GFLOP | over measured | peak | over measured | over held | time | over measured |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in found:
        flops, memory, time = (row.predicted.get(what) for what in ("flops", "memory", "time"))
        cells = [row.case.name, _number(flops, 1e9), _ratio(row.ratio("flops"), 4), f"{_number(memory, 1e6)} MB",
                 _ratio(row.ratio("memory")), _ratio(row.ratio("memory", "held")), f"{_number(time, 1)} s",
                 _ratio(row.ratio("time"))]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| figure | cases | median error | 90th percentile | within | bound |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    figures = (
        ("flops", "", "operations"), ("memory", "", "peak memory"),
        ("memory", "held", "peak memory, C library's defaults"), ("time", "", "time"),
    )  # fmt: skip
    for what, against, said in figures:
        score = scored(found, what, against)
        lines.append(
            f"| {said} | {score['cases']:.0f} | {100 * score['median']:.2f} % | {100 * score['p90']:.2f} % | "
            f"{100 * score['within']:.0f} % | {100 * BOUNDS[what]:.0f} % |"
        )
    return "\n".join(lines)


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.3g}" if value / unit < 100 else f"{value / unit:,.0f}"


def _ratio(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(found: Sequence[Row], path: Path) -> None:
    """Predicted against measured, three panels on logarithmic axes with the bound as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12.5, 4.2), constrained_layout=True)
    for panel, (what, unit, said) in zip(panels, (("flops", 1e9, "GFLOP"), ("memory", 1e6, "peak memory, MB"),
                                                  ("time", 1.0, "seconds")), strict=True):  # fmt: skip
        for trains, mark, colour, label in ((False, "o", "#1f77b4", "generating"), (True, "^", "#d62728", "training")):
            pairs = [(row.measured[what] / unit, row.predicted[what] / unit) for row in found
                     if row.case.trains is trains and row.ratio(what)]  # type: ignore[operator]  # fmt: skip
            if pairs:
                panel.plot(*zip(*pairs, strict=True), mark, color=colour, label=label, alpha=0.8, markersize=6)
        panel.set(xscale="log", yscale="log")
        low, high = (f(panel.get_xlim()[i], panel.get_ylim()[i]) for i, f in ((0, min), (1, max)))
        ends = np.array([low, high])
        panel.fill_between(ends, ends * (1 - BOUNDS[what]), ends * (1 + BOUNDS[what]), color="#999999", alpha=0.25,
                           linewidth=0, label=f"within {100 * BOUNDS[what]:.0f} %")  # fmt: skip
        panel.plot(ends, ends, color="#666666", linewidth=0.8)
        score = scored(found, what)
        panel.set(xlabel=f"measured: {said}", ylabel=f"planned: {said}",
                  title=f"error {100 * score['median']:.1f} % (median), {100 * score['p90']:.1f} % (90th)")  # fmt: skip
        panel.title.set_fontsize(10)
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_with(path, lambda temporary: figure.savefig(temporary, dpi=140, format="png"))
    plt.close(figure)
