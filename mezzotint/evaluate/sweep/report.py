"""The sweep for people and programs: lines for the terminal, plain data, a page that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2

from mezzotint import files
from mezzotint.evaluate.sweep import drawing
from mezzotint.evaluate.sweep.measure import Sweep
from mezzotint.evaluate.sweep.results import Interval, Results, Row
from mezzotint.evaluate.sweep.subject import machine

PAGE, DATA, SHEET = "sweep.html", "sweep.json", "contact_sheet.png"
MEBI = 2**20


def span(value: Interval | None, digits: int = 2) -> str:
    """`3.42 (3.10 to 3.75)`, a dash for none."""
    if value is None:
        return "–"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def distance(found: Mapping[str, Any] | None) -> str:
    """A Frechet distance with its interval, a dash for none."""
    if found is None:
        return "–"
    each = found["frechet"]
    return f"{each['distance']:.2f} ({each['low']:.2f} to {each['high']:.2f})"


def columns(results: Results) -> dict[str, list[str]]:
    """The table by column, as texts; columns without an entry are left out."""
    rows = results.rows
    marks = {id(row): "front" for row in results.front}
    if results.best is not None:
        marks[id(results.best)] = "use this"
    found = {
        "": [marks.get(id(row), "") for row in rows],
        "sampler": [row.setting.way for row in rows],
        "steps": [str(row.setting.steps) for row in rows],
        "guidance": [f"{row.setting.target.guidance:g}" for row in rows],
        "rescale": [f"{row.setting.target.rescale:g}" if row.setting.target.rescale else "–" for row in rows],
        "evaluations": [str(row.evaluations) for row in rows],
        "error": [span(row.latent, 3) for row in rows],
        "grey levels": [span(row.pixel) for row in rows],
        "s an image": ["–" if row.seconds is None else f"{row.seconds:.3g}" for row in rows],
        "times baseline": [span(row.ratio) for row in rows],
        "MiB": ["–" if row.memory is None else f"{row.memory / MEBI:.0f}" for row in rows],
        "money": ["–" if row.money is None else f"{row.money:.2g}" for row in rows],
        "from converged": [distance(row.converged) for row in rows],
        "from real": [distance(row.real) for row in rows],
        "failed": [row.failure or "–" for row in rows],
    }
    return {name: cells for name, cells in found.items() if any(cell not in ("", "–") for cell in cells)}


def remarks(sweep: Sweep, results: Results) -> list[str]:
    """What the reader must know of how it was measured."""
    subject, told = sweep.subject, list[str]()
    for target, reference in results.references.items():
        state = "" if reference.converged else ": not converged, so read small errors with care"
        told.append(
            f"The reference of {target.name} is its probability flow in {reference.steps} fine steps in "
            f"{subject.precise}; the last doubling moved it by {reference.gap:.4f} of the pictures' deviation{state}."
        )
    if not subject.follows_ode:
        told.append("This network was distilled to few steps: it follows no ODE, so nothing has an error.")
    if any(row.setting.stochastic for row in results.rows):
        told.append(
            "Samplers that draw fresh noise lead elsewhere from the same start and have no error: they are compared as "
            "sets of pictures, in the columns of distances."
            if sweep.compares
            else "Samplers that draw fresh noise have no error. As sets of pictures they are compared where there are "
            "16 of them (or 8, and --data) and mezzotint's extra 'demo', which has the network for it, is installed."
        )
    for target, found in results.reals.items():
        each = found["frechet"]
        told.append(
            f"The converged pictures of {target.name} are {distance(found)} from real images; real ones from each other"
            f" {each['floor']:.2f} ({each['floor_low']:.2f} to {each['floor_high']:.2f})."
        )
    told.append(
        f"Times are of batches of {min(subject.batch, len(subject.wishes))}, text and decoding included, in turns with "
        f"{results.baseline.name}."
    )
    alone = sum(row.seconds is not None and not row.pairs for row in results.rows)
    if alone:
        told.append(f"{alone} settings were timed in no round together with that baseline: their times are their own.")
    return told


def command(sweep: Sweep, row: Row) -> str:
    """How to draw with a row's setting."""
    model = sweep.subject.models[row.setting.dtype]
    return row.setting.command(model.path or Path("MODEL"), sweep.subject.wishes[0], sweep.subject.options)


def lines(sweep: Sweep, results: Results, out: Path) -> list[str]:
    """The table, the remarks, the recommendation with its command, and where the page is."""
    table = columns(results)
    widths = {name: max(len(name), *map(len, cells)) for name, cells in table.items()}
    told = ["  ".join(f"{name:<{widths[name]}}" for name in table).rstrip()]
    for i in range(len(results.rows)):
        told.append("  ".join(f"{cells[i]:<{widths[name]}}" for name, cells in table.items()).rstrip())
    told += ["", *remarks(sweep, results), ""]
    if results.best is None:
        told.append(f"No recommendation: {results.why}.")
    else:
        told += [f"Use {results.best.setting.name}: {results.why}.", f"$ {command(sweep, results.best)}"]
    return [*told, "", f"everything that was measured: {out / PAGE}"]


def to_dict(sweep: Sweep, results: Results) -> dict[str, Any]:
    """Everything as plain data."""
    best = results.best
    chosen = None if best is None else {"setting": best.setting.to_dict(), "command": command(sweep, best)}
    return {
        "recommendation": chosen,
        "why": results.why,
        "target": results.target.name,
        "front": [row.setting.name for row in results.front],
        "rows": [row.to_dict() for row in results.rows],
        "references": {
            target.name: {"steps": each.steps, "gap": str(each.gap), "converged": each.converged,
                          "from_real": results.reals.get(target)}
            for target, each in results.references.items()
        },
        "baseline": results.baseline.name,
        "images": len(sweep.subject.wishes),
        "batch": sweep.subject.batch,
        "machine": machine(sweep.subject.models[sweep.subject.precise]),
        "remarks": remarks(sweep, results),
        "mezzotint": metadata.version("mezzotint"),
    }  # fmt: skip


def write(sweep: Sweep, results: Results, tolerance: float, out: Path) -> Path:
    """Write sweep.html, sweep.json and contact_sheet.png; returns the page."""
    sheet = drawing.contact_sheet(sweep, results)
    files.write_with(out / SHEET, lambda path: sheet.save(path, "PNG"))
    files.write_json(out / DATA, to_dict(sweep, results))
    return files.write_text(out / PAGE, html(sweep, results, tolerance))


def html(sweep: Sweep, results: Results, tolerance: float) -> str:
    """The whole page; the contact sheet lies beside it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files(__package__ or "").joinpath("report.html.j2").read_text("utf-8"))
    order = [results.target, *(target for target in sweep.targets if target != results.target)]
    plots = [(target.name, drawing.plot(results, target, tolerance)) for target in order]
    path = sweep.subject.models[sweep.subject.precise].path
    return template.render(
        model=str(path or "the model"),
        images=len(sweep.subject.wishes),
        best=results.best,
        command=None if results.best is None else command(sweep, results.best),
        why=results.why,
        plots=[(name, "data:image/png;base64," + base64.b64encode(png).decode()) for name, png in plots if png],
        table=columns(results),
        count=len(results.rows),
        remarks=remarks(sweep, results),
        sheet=SHEET,
        data=DATA,
        machine=machine(sweep.subject.models[sweep.subject.precise]),
        version=metadata.version("mezzotint"),
    )
