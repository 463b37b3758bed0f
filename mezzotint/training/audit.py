"""The audit of a data set as people read it: lines for the terminal, one page with pictures, or a refusal."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from mezzotint import files, images
from mezzotint.data.audit import audit
from mezzotint.data.findings import Audit, Example, Finding
from mezzotint.errors import InputError
from mezzotint.text import TextEncoder
from mezzotint.training.methods import Place
from mezzotint.training.tables import Recipe

PAGE = "audit.html"
DATA = "audit.json"
LINES = 12
SHOWN = 6  # examples of a finding with pictures; the others are named
SIDE = 144  # pixels of a picture on the page
BESIDE = 4  # pictures of one example
BARS = 16  # sizes and classes in a chart


def before(
    recipe: Recipe,
    place: Place,
    classes: Sequence[str] | None = None,
    text: TextEncoder | None = None,
    sizes: Sequence[tuple[int, int]] = (),
) -> None:
    """Audit the data of a run that begins: lines to `place.say`, a page in the run folder, or a refusal.

    `classes` are the model's, `text` reads its captions, `sizes` are those of its buckets.
    """
    if place.say is None:
        return
    data = recipe.data
    found = audit(
        Path(data.folder), Path(data.validation) if data.validation else None, data.size, data.channels, classes,
        tokens=text.lengths if text else None, room=text.readings(False)[0].length if text else None,
        watch=lambda done, total: place.watch("audit of the data", done, total), sizes=sizes,
    )  # fmt: skip
    page = write(found, place.folder)
    for line in lines(found, page):
        place.say(line)
    refuse(found, page)


def lines(found: Audit, page: Path | None = None, most: int = LINES) -> list[str]:
    """At most `most` lines: what there is, then the findings, those that stop a run first."""
    parts = [f"{part['images']:,} images{_one_size(part)} in {part['folder']}" for part in found.facts.values()]
    first = "data: " + ", ".join(parts) + ("" if found.findings else "; nothing found")
    last = [] if page is None else [f"pictures of all that: {page}"]
    room = most - 1 - len(last)
    told = list(found.findings)
    if len(told) > room:
        told = told[: room - 1]
        last.insert(0, f"and {len(found.findings) - len(told)} more findings")
    return [first, *(f"{each.severity}: {each.what}{_names(each)}. {each.do}" for each in told), *last]


def refuse(found: Audit, page: Path | None = None) -> None:
    """InputError where something was found with which training must not start."""
    if not found.stops:
        return
    what = "; ".join(f"{each.what}{_names(each)}" for each in found.stops)
    where = "" if page is None else f" All are listed in {page}."
    remedy = found.stops[0].do if len(found.stops) == 1 else "Correct them first."
    raise InputError(f"the data cannot be trained on: {what}.\n{remedy}{where}")


def write(found: Audit, folder: Path) -> Path:
    """Write audit.html, which loads nothing, and audit.json into a folder; returns the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(resources.files(__package__ or "").joinpath("audit.html.j2").read_text("utf-8"))
    files.write_json(Path(folder) / DATA, found.to_dict())
    page = template.render(
        found=found,
        counts={
            severity: sum(each.severity == severity for each in found.findings) for severity in ("stop", "warn", "note")
        },
        shown=[(each, [_pictures(example) for example in _with_files(each)[:SHOWN]]) for each in found.findings],
        charts=charts(found),
        name=lambda file: str(Path(*Path(file).parts[-2:])),
    )
    return files.write_text(Path(folder) / PAGE, page)


def charts(found: Audit) -> dict[str, str]:
    """Title to PNG data address: every histogram and count of the facts that takes more than one value."""
    drawn: dict[str, str] = {}
    train = found.facts["train"]
    for name in train["histograms"]:
        parts = {part: facts["histograms"][name] for part, facts in found.facts.items() if name in facts["histograms"]}
        if any(sum(count > 0 for count in each["counts"]) > 1 for each in parts.values()):
            drawn[name] = _histogram(name, parts)
    for name, key in (("images by size", "sizes"), ("images by label", "labels")):
        if len(train[key]) > 1:
            drawn[name] = _bars(name, {part: facts[key] for part, facts in found.facts.items()})
    return drawn


def _histogram(name: str, parts: dict[str, dict[str, list[float]]]) -> str:
    figure, axes = _figure(name)
    for part, each in parts.items():
        total = sum(each["counts"])
        axes.stairs(
            [count / total for count in each["counts"]], each["edges"], label=part, fill=part == "train", alpha=0.8
        )
    axes.set(ylabel="share of images")
    return _png(figure, axes, parts)


def _bars(name: str, parts: dict[str, dict[str, int]]) -> str:
    figure, axes = _figure(name)
    names = list(parts["train"])[:BARS]
    height = 0.8 / len(parts)
    for i, (part, counts) in enumerate(parts.items()):
        axes.barh([y + i * height for y in range(len(names))], [counts.get(n, 0) for n in names], height, label=part)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names)
    axes.invert_yaxis()
    return _png(figure, axes, parts)


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Any, axes: Any, parts: dict[str, Any]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if len(parts) > 1:
        axes.legend(fontsize=8)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _with_files(each: Finding) -> list[Example]:
    return [example for example in each.examples if example.files]


def _pictures(example: Example) -> tuple[Example, list[tuple[str, str]]]:
    """The example and (file, data address) of its first pictures, "" for what is no picture."""
    return example, [(file, _thumbnail(Path(file))) for file in example.files[:BESIDE]]


def _thumbnail(path: Path) -> str:
    try:
        picture = images.read(path).convert("RGB")
    except InputError:
        return ""
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _one_size(part: dict[str, Any]) -> str:
    return f" of {next(iter(part['sizes']))}" if len(part["sizes"]) == 1 else ""


def _names(each: Finding) -> str:
    """The first files or lines of a finding that stops a run."""
    if each.severity != "stop":
        return ""
    first = ", ".join(Path(example.files[0]).name for example in each.examples[:3])
    return f" ({first}{', ...' if len(each.examples) > 3 else ''})"
