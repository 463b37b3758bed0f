"""`mezzotint sweep` end to end on a tiny model: what is written, kept, recommended and refused."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sweep_parts import gaussian

from mezzotint.cli import sweep
from mezzotint.cli.main import main
from mezzotint.evaluate.sweep import measure as measuring
from mezzotint.evaluate.sweep import reference
from mezzotint.evaluate.sweep import subject as subjects
from mezzotint.families import load

GRID = ["--samplers", "flow_euler", "euler_ancestral", "--steps", "2", "5", "--count", "2", "--batch", "1"]


@pytest.fixture(autouse=True)
def short_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network of random weights converges to is no matter here."""
    monkeypatch.setattr(reference, "STEPS", (10, 20))


def swept(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    assert main(["sweep", "--model", str(folder), "--out", str(out), *GRID, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_sweep_writes_its_page_and_goes_on_where_it_was(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--guidance", "1", "2", "--price-per-hour", "36", "--tolerance", "100"]
    found = swept(tiny_folder, tmp_path, capsys, *more)
    assert len(found["rows"]) == 8 and found["target"] == "guidance 2"  # the contract's own
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["memory"] > 0 and row["money"] == pytest.approx(row["seconds"] / 100)
        assert (row["latent"] is None) == row["setting"]["stochastic"] == (row["setting"]["sampler"] != "flow_euler")
        assert row["evaluations"] == row["setting"]["steps"] * row["setting"]["target"]["guidance"]
    errors = [row["latent"]["value"] for row in found["rows"] if row["latent"]]
    assert errors[0] > errors[1] and errors[2] > errors[3]  # more steps, less error
    setting = found["recommendation"]["setting"]
    assert (setting["sampler"], setting["steps"], setting["target"]["guidance"]) == ("flow_euler", 2, 2.0)
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == found["rows"]
    assert Image.open(tmp_path / "contact_sheet.png").height > 10 * 128

    page = (tmp_path / "sweep.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert (
        reader.open == [] and reader.images == 3 and "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    )
    assert "Use flow_euler, 2 steps, guidance 2" in page

    monkeypatch.setattr(subjects, "generate_batch", lambda *given: pytest.fail("drawn again"))
    monkeypatch.setattr(measuring, "converge", lambda *given: pytest.fail("walked again"))
    assert swept(tiny_folder, tmp_path, capsys, *more) == found


class Reader(HTMLParser):
    """Counts pictures, and keeps the tags that were not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.images += tag == "img"
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_recommended_command_runs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    assert main(["sweep", "--model", str(tiny_folder), "--out", str(out), *GRID, "--label", "mono crack"]) == 0
    said = capsys.readouterr()
    assert "use this" in said.out and f"{out / 'sweep.html'}" in said.out
    assert re.search(r"mezzotint: .*, \d+ of \d+ evaluations", said.err)
    (command,) = re.findall(r"^\$ (mezzotint generate .*)$", said.out, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 1


def test_pictures_are_compared_with_real_ones(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(16):
        Image.fromarray(rng.integers(90, 160, (40, 40), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    found = swept(tiny_folder, tmp_path, capsys, "--data", str(tmp_path / "data"), "--count", "8", "--batch", "4")
    for row in found["rows"]:
        each = row["real"]["frechet"]
        assert each["low"] < each["distance"] < each["high"] and each["floor"] < each["distance"]
        assert row["converged"] is None  # eight converged pictures are too few to be split
    assert any("from real images" in remark for remark in found["remarks"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--tolerance", "0"], "--tolerance must be above 0, not 0"),
        (["--guidance-interval", "0.8:0.2"], "two rising fractions of the path, not '0.8:0.2'"),
        (["--guidance-interval", "half"], "must be LOW:HIGH, like 0.2:0.8, not 'half'"),
        (["--samplers", "unipcc"], "unknown sampler 'unipcc': did you mean 'unipc'"),
        (["--prompt", "a crack", "--label", "1"], "trained without text"),
        (["--label", "mono krack"], "no class 'mono krack': did you mean 'mono crack'"),
        (["--negative", "x", "--label", "1"], "no class 'x'"),
        (["--data", "."], "a distance needs at least 16 images in --data"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    args: list[str], said: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Image.new("L", (32, 32)).save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    usual = ["--samplers", "flow_euler", "--steps", "2", "--count", "1"]
    assert main(["sweep", "--model", str(tiny_folder), "--out", str(tmp_path / "out"), *usual, *args]) == 2
    complaint = capsys.readouterr().err.splitlines()
    complaint = [
        line for line in complaint if "evaluations" not in line and ": loading" not in line and ": judging" not in line
    ]
    assert len(complaint) <= 2 and said in complaint[0]


def test_captions_are_read_and_a_model_of_text_must_be_told(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(("a crack", "a cell", "a crack", ""))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sweep.captions(tmp_path) == ("a crack", "a cell")
    assert sweep.captions(tmp_path / "none") == ()


def test_what_is_tried_where_nothing_is_asked_for(tiny_folder: Path) -> None:
    from mezzotint.evaluate.sweep.setting import STEPS, grid
    from mezzotint.request import Request

    found = grid(load(tiny_folder), Request(label=0))
    assert {setting.target.guidance for setting in found} == {2.0} and "flow_euler" in {s.sampler for s in found}
    tables = grid(gaussian(), Request())
    assert {s.steps for s in tables} == set(STEPS) and not {s.sampler for s in tables} & {"flow_euler", "lcm"}
