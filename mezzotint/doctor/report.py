"""A diagnosis as people and programs read it: lines for the terminal, plain data, one page with everything measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2

from mezzotint import files
from mezzotint.doctor import drawing
from mezzotint.doctor.causes import CAUSES
from mezzotint.doctor.finding import Checked, Diagnosis, Exhibit, Measure, Outcome

PAGE, DATA = "doctor.html", "doctor.json"
MEANS = {"broken": "nothing good can come out", "harmful": "costs quality or time", "note": "good to know"}


# Words.


def title(cause: str) -> str:
    """What people call a cause; a name that this version does not know stands for itself."""
    return CAUSES[cause].title if cause in CAUSES else cause


def sentence(text: str) -> str:
    """A text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def verdict(found: Diagnosis) -> str:
    """One sentence: the first thing to mend and how much more was found, or that nothing was."""
    looked = sum(each.checked is not None for each in found.outcomes)
    apart = len(found.outcomes) - looked
    if found.healthy:
        more = [counted(len(found.findings), "note"), f"{apart} not checked" if apart else ""]
        brackets = ", ".join(part for part in more if part)
        told = f" ({brackets})" if brackets else ""
        return f"Healthy: {counted(looked, 'probe')} found nothing that costs quality or time{told}."
    first, *others = found.findings
    faults = [each for each in others if each.grade != "note"]
    follow = sum(each.cause in found.follows for each in faults)
    more = f"; {counted(len(faults), 'more cause')} found" if faults else ""
    more += f", {'which' if follow == len(faults) else f'{follow} of which'} may follow from others" if follow else ""
    return f"{first.grade.capitalize()}: {title(first.cause)}{more}."


def about(found: Diagnosis) -> str:
    """What was examined, and on how many images."""
    facts, settings = found.facts, found.settings
    size = f", {'×'.join(map(str, facts['size']))} pixels" if facts.get("size") else ""
    model = f"{facts['family']}{size}. " if facts.get("family") else ""
    on = f" of {settings['data']}" if settings.get("data") else ""
    count = settings.get("images", 0)
    return f"{model}{counted(count, 'image') or 'No image'}{on if count else ''} looked at."


def counted(count: int, what: str) -> str:
    """ "3 probes", "1 probe", "" for none."""
    return f"{count} {what}{'' if count == 1 else 's'}" if count else ""


def number(value: float) -> str:
    """Three significant digits, or what there is in place of a number."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def interval(measure: Measure) -> str:
    """The 95 % interval in words, "" where there is none."""
    if measure.low is None or measure.high is None:
        return ""
    return f"{number(measure.low)} to {number(measure.high)}"


def unchecked(found: Diagnosis) -> dict[str, list[str]]:
    """What is lacking -> the probes that lack it."""
    lacking: dict[str, list[str]] = {}
    for each in found.outcomes:
        if each.checked is None:
            lacking.setdefault(each.why, []).append(each.probe)
    return lacking


def lines(found: Diagnosis, page: Path | None = None) -> list[str]:
    """The verdict, two to four lines for each cause, what was not checked, and where the page is."""
    told = [verdict(found)]
    for place, each in enumerate(found.findings, start=1):
        about = f"; follows from {found.follows[each.cause]}" if each.cause in found.follows else ""
        about += f"; not told apart from {', '.join(each.also)}" if each.also else ""
        told += ["", f"{place}. {each.grade}: {title(each.cause)} [{each.cause}{about}]"]
        told += [f"   {one_line(sentence(each.says))}"]
        told += [f"   {one_line(each.do)}"] if each.do else []
        told += [f"   $ {one_line(each.command)}"] if each.command else []
    lacking = unchecked(found)
    told += [""] if lacking else []
    told += [f"not checked: {', '.join(probes)}: {one_line(why)}" for why, probes in lacking.items()]
    return told + ([] if page is None else ["", f"everything that was measured: {page}"])


def one_line(text: str) -> str:
    return " ".join(text.split())


# Plain data.


def to_dict(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON can hold it, in the shape of `dataclasses.asdict`.

    Numbers that JSON lacks are "nan", "inf" and "-inf"; of an exhibit its title is kept; "healthy" and "verdict" are
    added.
    """
    return {"verdict": verdict(found), "healthy": found.healthy, **_plain(found)}


def _plain(value: Any) -> Any:
    if isinstance(value, Exhibit):
        return {"title": value.title}
    if isinstance(value, Measure):  # an interval without an end says nothing
        ends = [None if end is None or not math.isfinite(end) else float(end) for end in (value.low, value.high)]
        return {"name": value.name, "value": _plain(value.value), "low": ends[0], "high": ends[1],
                "bound": value.bound, "unit": value.unit}  # fmt: skip
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if callable(item := getattr(value, "item", None)):  # a number of numpy or torch
        return _plain(item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


# The page.


def write(found: Diagnosis, folder: Path) -> Path:
    """Write doctor.html, which loads nothing, and doctor.json into a folder; returns the page."""
    files.write_json(Path(folder) / DATA, to_dict(found))
    return files.write_text(Path(folder) / PAGE, html(found))


def html(found: Diagnosis) -> str:
    """The whole page: verdict, causes, probes, what was not checked, facts."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files(__package__ or "").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        found=found,
        verdict=verdict(found),
        about=about(found),
        first=found.findings[0].grade if found.findings else "note",
        means=MEANS,
        title=title,
        sentence=sentence,
        heading=lambda cause: title(cause)[:1].upper() + title(cause)[1:],
        places={each.cause: place for place, each in enumerate(found.findings, start=1)},
        probe_of=_probes_of_causes(found),
        probes=[_shown(each) for each in found.outcomes],
        lacking=unchecked(found),
        number=number,
        interval=interval,
        facts=list(_flat(found.facts)),
        settings=list(_flat(found.settings)),
        version=metadata.version("mezzotint"),
    )


def _probes_of_causes(found: Diagnosis) -> dict[str, str]:
    """Cause -> the first probe that named it."""
    named = [(each.cause, outcome.probe) for outcome in found.outcomes if outcome.checked
             for each in outcome.checked.findings]  # fmt: skip
    return dict(reversed(named))


def _shown(outcome: Outcome) -> dict[str, Any]:
    """A probe with its plots and exhibits as data addresses."""
    checked = outcome.checked or Checked()
    return {
        "name": outcome.probe,
        "looked": outcome.checked is not None,
        "why": outcome.why,
        "seconds": outcome.seconds,
        "findings": checked.findings,
        "measures": checked.measures,
        "plots": [(plot, drawing.drawn(plot)) for plot in checked.plots],
        "exhibits": [(each.title, *drawing.picture(each.image)) for each in checked.exhibits],
    }


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (dotted name, value) for people; what is empty is left out."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value not in (None, "", (), []):
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            yield f"{before}{name}", shown
