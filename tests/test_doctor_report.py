"""A diagnosis on the terminal, as JSON and as a page: nothing lost, nothing let in, nothing loaded from outside."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.doctor import report
from mezzotint.doctor.causes import CAUSES, ranked
from mezzotint.doctor.finding import Checked, Diagnosis, Exhibit, Finding, Measure, Outcome, Plot

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" & $\\alpha$ {{ 7 * 7 }}"

OBJECTIVE = Finding(
    "objective", "broken", "Read as velocity its error is 0.03, as claimed 4.87.", "Say velocity.",
    "mezzotint generate --model m --prediction velocity --out out", 52.0,
    (Measure("gain of the other reading", 5.05, 4.9, 5.21, "at most 0.1"), Measure("as claimed", math.nan)),
)  # fmt: skip
STEPS = Finding(
    "sampler.steps", "harmful", "Pictures still move.", "Draw with 25 steps.", "", 2.0, (), ("latent.scale",)
)
GUIDANCE = Finding("guidance.strong", "harmful", "A third of the pixels is clipped.", "Use 2.5.", "", 3.0)
THREADS = Finding("speed.threads", "note", "1 of 2 cores computes.", "Set OMP_NUM_THREADS=2.")
LINES = Plot("error", "sigma / alpha", "error", {"a": ((0.1, 1.0), (1.0, math.inf)), "b": ((0.1, 0.0),)}, log_y=True)
BARS = Plot("seconds", "part", "s", {"now": ((0, 1.2), (1, np.float64(0.4)))}, "bars", labels=("backbone", "codec"))


def diagnosis(*findings: Finding) -> Diagnosis:
    """What the probes of a small examination said."""
    order, follows = ranked(findings)
    exhibits = (Exhibit("images, and what the codec gives back", Image.new("F", (8, 4), 0.5)),)
    outcomes = (
        Outcome("objective", Checked(tuple(findings), (Measure("error", np.float32(0.25)),), (LINES,)), seconds=3.2),
        Outcome("latent", Checked(measures=(Measure("deviation", 1.0),), plots=(BARS,), exhibits=exhibits), seconds=1),
        Outcome("text", None, "this model reads no text"),
        Outcome("fit", None, "needs images: give --data DIR"),
        Outcome("guidance", None, "needs images: give --data DIR"),
    )
    facts = {"family": "sd2", "process": {"prediction": "epsilon"}, "size": [64, 64]}
    settings = {"data": "cells", "images": 24, "seed": 0, "lora": []}
    return Diagnosis("models/sd2", facts, order, follows, outcomes, 4.5, settings)


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ((), "Healthy: 2 probes found nothing that costs quality or time (3 not checked)."),
        ((THREADS,), "Healthy: 2 probes found nothing that costs quality or time (1 note, 3 not checked)."),
        ((STEPS,), "Harmful: too few steps for this path."),
        ((STEPS, GUIDANCE), "Harmful: guidance is so strong that pictures saturate; 1 more cause found."),
        (
            (THREADS, STEPS, OBJECTIVE, GUIDANCE),
            "Broken: the network answers with another objective than its files say; 2 more causes found, which may "
            "follow from others.",
        ),
    ],
)
def test_the_verdict_is_one_sentence(findings: tuple[Finding, ...], said: str) -> None:
    assert report.verdict(diagnosis(*findings)) == said


def test_lines_keep_the_ranking_and_are_few() -> None:
    found = diagnosis(THREADS, STEPS, OBJECTIVE, GUIDANCE)
    lines = report.lines(found, Path("out/doctor.html"))
    heads = [line for line in lines if re.match(r"\d+\. ", line)]
    assert [head.split(" [")[0] for head in heads] == [
        "1. broken: the network answers with another objective than its files say",
        "2. harmful: guidance is so strong that pictures saturate",
        "3. harmful: too few steps for this path",
        "4. note: fewer threads than the machine has cores",
    ]
    assert "follows from objective" in heads[1] and "follows from" not in heads[0]
    assert "not told apart from latent.scale" in heads[2]
    assert "   $ mezzotint generate --model m --prediction velocity --out out" in lines
    blocks = "\n".join(lines[2:]).split("\n\n")[: len(heads)]
    assert all(2 <= len(block.splitlines()) <= 4 for block in blocks)
    assert "not checked: fit, guidance: needs images: give --data DIR" in lines
    assert lines[-1].endswith("out/doctor.html")


def test_json_has_the_shape_of_the_dataclasses() -> None:
    found = diagnosis(THREADS, STEPS, OBJECTIVE, GUIDANCE)
    plain = json.loads(json.dumps(report.to_dict(found), allow_nan=False))
    assert plain.pop("healthy") is False and plain.pop("verdict").startswith("Broken")
    _same_shape(asdict(found), plain)
    assert plain["outcomes"][1]["checked"]["exhibits"] == [{"title": "images, and what the codec gives back"}]
    assert plain["findings"][0]["measures"][1]["value"] == "nan"
    assert plain["outcomes"][0]["checked"]["plots"][0]["curves"]["a"][1] == [1.0, "inf"]


def test_an_interval_without_an_end_is_none() -> None:
    wide = replace(GUIDANCE, measures=(Measure("one image", 1.0, -math.inf, math.inf),))
    (row,) = report.to_dict(diagnosis(wide))["findings"][0]["measures"]
    assert row == {"name": "one image", "value": 1.0, "low": None, "high": None, "bound": "", "unit": ""}


def _same_shape(want: object, got: object, at: str = "") -> None:
    if isinstance(want, dict):
        assert isinstance(got, dict), at
        keys = {"title"} if "image" in want else {str(key) for key in want}
        assert got.keys() == keys, at
        for key in keys:
            _same_shape(want[key], got[key], f"{at}.{key}")
    elif isinstance(want, (list, tuple)):
        assert isinstance(got, list) and len(got) == len(want), at
        for one, other in zip(want, got, strict=True):
            _same_shape(one, other, at)
    elif isinstance(want, (float, np.floating)):
        assert float(got) == pytest.approx(float(want), nan_ok=True), at  # pyright: ignore[reportArgumentType]
    else:
        assert got == want, at


def test_the_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    page = report.write(diagnosis(THREADS, STEPS, OBJECTIVE), tmp_path)
    html = page.read_text()
    assert page == tmp_path / "doctor.html" and (tmp_path / "doctor.json").is_file()
    loaded = [
        value
        for tag, attributes in Page(html).tags
        for name, value in attributes.items()
        if name in ("src", "href", "poster", "data", "action") and value is not None
    ]
    assert loaded and all(value.startswith(("data:image/png;base64,", "#")) for value in loaded)
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert not any(tag in ("link", "iframe", "object", "form") for tag, _ in Page(html).tags)
    assert json.loads((tmp_path / "doctor.json").read_text())["path"] == "models/sd2"


def test_the_page_keeps_the_ranking_and_says_everything() -> None:
    found = diagnosis(THREADS, STEPS, OBJECTIVE, GUIDANCE)
    html = report.html(found)
    page = Page(html)
    titles = [CAUSES[each.cause].title for each in found.findings]
    cards = [html.index(f"<h3>{title[:1].upper()}{title[1:]}</h3>") for title in titles]
    assert cards == sorted(cards)
    for words in ("nothing good can come out", "costs quality or time", "4.90 to 5.21", "at most 0.1", "not a number",
                  "What was not checked", "this model reads no text", "fit, guidance", "process.prediction", "cells",
                  "images, and what the codec gives back"):  # fmt: skip
        assert words in page.text, words
    assert re.search(r"follows from\s+1, the network answers", page.text)
    assert "Not told apart from: latents are scaled otherwise than in training (latent.scale)" in page.text
    assert '<a href="#cause-1">' in html and '<a href="#probe-objective">' in html


def test_the_page_can_be_read_without_eyes_or_mouse() -> None:
    page = Page(report.html(diagnosis(THREADS, STEPS, OBJECTIVE)))
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert sum(tag == "details" for tag, _ in page.tags) == sum(tag == "summary" for tag, _ in page.tags) == 2
    assert all(attributes.get("tabindex") == "0" for tag, attributes in page.tags if tag == "pre")
    assert ("html", {"lang": "en"}) in page.tags
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert targets <= {f"#{name}" for name in ids}


def test_hostile_words_stay_words() -> None:
    bad = Finding(
        "objective", "broken", HOSTILE, HOSTILE, HOSTILE, 2.0, (Measure(HOSTILE, 1.0, 0, 2, HOSTILE, HOSTILE),)
    )
    plot = Plot(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: ((0, 1.0),), "$": ((0, 2.0),)}, "bars", labels=(HOSTILE,))
    checked = Checked((bad,), bad.measures, (plot,), (Exhibit(HOSTILE, Image.new("RGB", (4, 4))),))
    found = replace(
        diagnosis(bad), path=HOSTILE, facts={HOSTILE: HOSTILE}, settings={"data": HOSTILE, "images": 1},
        outcomes=(Outcome("objective", checked), Outcome("text", None, HOSTILE)),
    )  # fmt: skip
    html = report.html(found)
    page = Page(html)
    assert "<script>alert" not in html and "onerror=alert(1)>" not in html and "<img src=x" not in html
    assert sum(tag == "script" for tag, _ in page.tags) == 1  # our own
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "{{ 7 * 7 }}" in page.text and HOSTILE in page.text
    assert len(report.lines(replace(found, findings=(replace(bad, says="two\nlines"),)))) == 8


def test_numbers_are_short() -> None:
    given = (0.0, 1.0, 0.25, 3.14159, 812.345, 12345.6, 1e-5, 11181073.0, 2.5e15, math.nan, math.inf, -math.inf)
    said = ("0", "1", "0.250", "3.14", "812", "12,346", "1.00e-05", "11,181,073", "2.50e+15", "not a number", "∞", "-∞")
    assert tuple(report.number(value) for value in given) == said


@pytest.mark.parametrize(
    "plot",
    [
        Plot("nothing", "x", "y", {}),
        Plot("no bars", "x", "y", {}, "bars"),
        Plot("not a number", "x", "y", {"a": ((0, math.nan), (1, math.inf))}, log_x=True, log_y=True),
        Plot("constant", "x", "y", {"a": ((1, 1.0), (2, 1.0))}, log_x=True, log_y=True),
        Plot("zero bars", "x", "y", {"a": ((0, 0.0), (1, 0.0))}, "bars", log_y=True),
        Plot("many", "layer", "y", {"a": [(i, i + 1) for i in range(99)]}, "bars", labels=["a block"] * 99),
        Plot("curves", "x", "y", {f"curve {i}": ((0, i), (1, i)) for i in range(12)}),
    ],
    ids=lambda plot: plot.title,
)  # fmt: skip
def test_odd_plots_are_drawn(plot: Plot) -> None:
    assert report.drawing.drawn(plot).startswith("data:image/png;base64,")
