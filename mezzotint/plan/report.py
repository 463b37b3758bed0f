"""Plans as people and programs read them: lines for the terminal, plain data, one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2

from mezzotint import files
from mezzotint.plan import words
from mezzotint.plan.fit import Fit
from mezzotint.plan.phases import Phase, Plan

Table = list[list[str]]


def to_dict(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """A plan as JSON data: bytes, operations and seconds as numbers."""
    return {
        "model": plan.model, "title": plan.title, "licence": plan.licence, "job": plan.what,
        "settings": dict(plan.settings), "parameters": dict(plan.parameters), "trained": plan.trained,
        "peak_bytes": plan.peak, "peak_in": plan.at.name, "flops": plan.flops, "seconds": plan.seconds,
        "cost": None if price is None else plan.cost(price), "fits": plan.fits,
        "machine": {"name": plan.machine.name, "memory": plan.machine.memory, "source": plan.machine.source,
                    "measured": plan.machine.measured, "base_bytes": plan.machine.base},
        "host_bytes": plan.host, "files": dict(plan.files), "notes": list(plan.notes),
        "phases": [_phase(plan, phase) for phase in plan.phases],
    }  # fmt: skip


def _phase(plan: Plan, phase: Phase) -> dict[str, Any]:
    calls = phase.traced.calls
    return {
        "name": phase.name, "what": phase.said, "times": phase.times, "flops": phase.flops,
        "flops_by_kind": phase.traced.by_kind, "bytes": phase.memory, "bytes_by_part": phase.parts,
        "operators": phase.traced.operators, "seconds": phase.seconds(plan.machine),
        "seconds_by_kind": plan.machine.by_kind(calls) if plan.machine.points else None,
    }  # fmt: skip


def about(plan: Plan) -> str:
    """The job in a line."""
    said = plan.settings
    if plan.what == "generate":
        images = "1 image" if plan.images == 1 else f"{plan.images} images"
        images += f" of {said['size']}" + (f", {said['batch']} at a time" if plan.images > 1 else "")
        steps = f"{said['sampler']}, {said['steps']} steps ({said['calls']} looks), guidance {said['guidance']:g}"
        weights = said["dtype"] + (f", matrices in {said['quant']}" if said["quant"] else "")
        return f"{images}: {steps}; {weights}, on {plan.machine.name}"
    more = [f"rank {said['rank']}"] if said["rank"] else []
    more += ["recomputed"] if said["recompute"] else []
    detail = f", {', '.join(more)}" if more else ""
    return (
        f"{plan.what}: {said['steps']} steps of {said['batch']} at {said['size']}{detail}; {said['precision']}, "
        f"frozen weights {said['dtype']}, on {plan.machine.name}"
    )


def lines(plan: Plan, price: float | None = None, explain: bool = False) -> list[str]:
    """A plan for the terminal."""
    total = sum(plan.parameters.values())
    held = ", ".join(f"{name} {words.count(number)}" for name, number in plan.parameters.items() if number)
    found = [f"{plan.model}: {plan.title}; {plan.licence}", about(plan), "", f"parameters  {total:,} ({held})"]
    if plan.trained:
        found.append(f"train       {plan.trained:,}")
    found += ["", *aligned([["phase", "times", "FLOP", "memory", "time"], *(
        [phase.name, f"{phase.times:g}", words.flops(phase.flops), words.size(plan.machine.base + phase.memory),
         words.seconds(phase.seconds(plan.machine))] for phase in plan.phases)]), ""]  # fmt: skip
    found.append(f"peak    {words.size(plan.peak)}, in {plan.at.name}: {summed(plan)}")
    found.append(f"work    {words.flops(plan.flops)}")
    found.append(f"time    {words.seconds(plan.seconds)} ({plan.machine.source})")
    if price is not None and plan.seconds is not None:
        found.append(f"cost    {plan.cost(price):.4g} at {price:g} an hour, {each(plan, price)}")
    if plan.files:
        found.append(f"disk    {', '.join(f'{name} {words.size(size)}' for name, size in plan.files.items())}")
    if plan.host:
        found.append(f"host    {words.size(plan.host)} of weights rest in the CPU's memory")
    if plan.machine.memory is not None:
        room = words.size(plan.machine.memory)
        found.append(f"fits    {'yes' if plan.fits else 'no'}: the device has {room}")
    found += [f"note    {note}" for note in plan.notes]
    return found + ([line for phase in plan.phases for line in explained(plan, phase)] if explain else [])


def each(plan: Plan, price: float) -> str:
    """What a thousand images, or a step, costs."""
    cost = plan.cost(price) or 0.0
    if plan.what == "generate":
        return f"{1000 * cost / plan.images:.4g} for a thousand images"
    return f"{1000 * cost / plan.settings['steps']:.4g} for a thousand steps"


def summed(plan: Plan) -> str:
    """The peak as a sum."""
    parts = [(name, size) for name, size in plan.at.parts.items() if size] + [("libraries", plan.machine.base)]
    return " + ".join(f"{name} {words.size(size)}" for name, size in parts if size)


def explained(plan: Plan, phase: Phase) -> Iterator[str]:
    """The sums behind a phase's figures."""
    traced = phase.traced
    yield ""
    yield f"{phase.name}: {phase.said}"
    parts = [*phase.parts.items(), ("libraries", plan.machine.base)]
    yield f"  memory  {' + '.join(f'{size / 1e6:,.1f} MB {name}' for name, size in parts if size)}"
    yield f"          = {(plan.machine.base + phase.memory) / 1e6:,.1f} MB"
    kinds = " + ".join(f"{kind} {words.flops(number)}" for kind, number in traced.by_kind.items())
    yield f"  work    {phase.times:g} x ({kinds}) = {words.flops(phase.flops)}" if kinds else "  work    none counted"
    if plan.machine.points:
        spans = plan.machine.by_kind(traced.calls)
        sums = " + ".join(f"{kind} {words.seconds(span)}" for kind, span in spans.items())
        yield f"  time    {phase.times:g} x ({sums}) = {words.seconds(phase.seconds(plan.machine))}"
        yield f"          {traced.operators:g} operators at {1e6 * plan.machine.overhead:.1f} us at least"


def compared(plans: Sequence[Plan], price: float | None = None) -> list[str]:
    """Several plans side by side."""
    head = ["model", "job", "parameters", "peak", "in", "work", "time"] + (["cost"] if price is not None else [])
    rows = [[p.model, p.what, words.count(sum(p.parameters.values())), words.size(p.peak), p.at.name,
             words.flops(p.flops), words.seconds(p.seconds), *([_money(p, price)] if price is not None else []),
             p.licence] for p in plans]  # fmt: skip
    return aligned([[*head, "licence"], *rows])


def _money(plan: Plan, price: float) -> str:
    cost = plan.cost(price)
    return "-" if cost is None else f"{cost:.4g}"


def fit_lines(fit: Fit) -> list[str]:
    """What fits, and for what does not what would have to give, with the figure for each."""
    plan = fit.plan
    found = [f"{plan.model}, {plan.what}: {words.size(plan.peak)} against {words.size(fit.limit)}: {fit.says}"]
    rows = [["", way.gives[0], words.size(way.plan.peak), "fits" if way.fits else ""] for way in fit.alone]
    if fit.together and len(fit.together.gives) > 1:
        rows.append(["", " + ".join(fit.together.gives), words.size(fit.together.plan.peak), "fits"])
    return found + aligned(rows)


def fit_dict(fit: Fit) -> dict[str, Any]:
    """The same as data."""
    ways = [*fit.alone, *([fit.together] if fit.together and len(fit.together.gives) > 1 else [])]
    return {
        "model": fit.plan.model, "job": fit.plan.what, "limit_bytes": fit.limit, "peak_bytes": fit.plan.peak,
        "fits": fit.fits, "says": fit.says,
        "ways": [{"gives": list(way.gives), "peak_bytes": way.plan.peak, "fits": way.fits} for way in ways],
    }  # fmt: skip


def aligned(rows: Table) -> list[str]:
    """Rows in columns; the last column runs free."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write(plans: Sequence[Plan], fits: Sequence[Fit], path: Path, price: float | None = None) -> Path:
    """Write a page that loads nothing."""
    return files.write_text(path, html(plans, fits, price))


def html(plans: Sequence[Plan], fits: Sequence[Fit], price: float | None = None) -> str:
    """The page: comparison, every plan with the sums behind its figures, what fits."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files(__package__ or "").joinpath("report.html.j2").read_text("utf-8"))
    shown = lambda plan, phase: "\n".join(list(explained(plan, phase))[2:])  # noqa: E731
    return template.render(
        plans=plans, fits=fits, price=price, about=about, words=words, bars=bars, colours=colours(plans), money=_money,
        explained=shown, version=metadata.version("mezzotint"),
    )  # fmt: skip


PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#8cd17d", "#d37295")


def colours(plans: Sequence[Plan]) -> Mapping[str, str]:
    """One colour for each part of memory, the same in every bar; activations are red."""
    names = dict.fromkeys(name for plan in plans for phase in plan.phases for name in phase.parts)
    rest = [name for name in names if name != "activations"]
    return {"activations": "#e15759"} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(rest)}


def bars(plan: Plan) -> list[tuple[Phase, list[tuple[str, float, float]]]]:
    """Each phase with its parts: name, bytes, and the share of the plan's peak in percent."""
    return [
        (phase, [(name, size, 100 * size / plan.peak) for name, size in phase.parts.items() if size])
        for phase in plan.phases
    ]
