"""The benchmark of claims: its verdicts follow from the numbers, and its pairs differ in one thing alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from sweep_parts import setting, subject

from mezzotint.evaluate.sweep.measure import Sweep, measure
from mezzotint.evaluate.sweep.results import gather
from mezzotint.evaluate.sweep.store import Store

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "sweep"


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARK)
    return importlib.import_module("verdicts")


def test_two_settings_are_compared_image_by_image(verdicts: Any, tmp_path: Path) -> None:
    asked = subject(count=4, batch=2)
    sweep = Sweep(asked, [setting("ddim", 5), setting("ddim", 40), setting("unipc", 20)], Store(tmp_path))
    swept = verdicts.Swept("gaussian", sweep, gather(sweep, measure(sweep), tolerance=4.0))
    better = verdicts.nearer("finer is better", swept, ("ddim", 40), ("ddim", 5), 1.0)
    assert better.holds == "yes" and "times as fast" in better.measured
    assert verdicts.nearer("coarser is better", swept, ("ddim", 5), ("ddim", 40), 1.0).holds == "no"
    errors = swept.errors(setting("ddim", 5))
    assert len(errors) == 4 and swept.row("ddim", 5, 1.0).latent.value == pytest.approx(sum(errors) / 4)
    assert verdicts.within("close", swept, ("ddim", 40), 1.0, 100.0).holds == "yes"
    assert verdicts.within("close", swept, ("ddim", 5), 1.0, 1e-3).holds == "no"


def test_differences_carry_their_interval(verdicts: Any) -> None:
    mean, low, high = verdicts.difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert mean == 2.0 and low == pytest.approx(2 - 1.96 / 3**0.5) and high == pytest.approx(2 + 1.96 / 3**0.5)


def test_distances_that_overlap_tell_nothing(verdicts: Any) -> None:
    def found(distance: float) -> dict[str, Any]:
        return {"frechet": {"distance": distance, "low": distance - 1, "high": distance + 1, "floor": 0.5}}

    answers = [verdicts.closer("c", "m", ("a", found(3.0)), ("b", found(b))).holds for b in (3.5, 6.0, 0.5)]
    assert answers == ["not told apart", "yes", "no"]


def test_pairs_differ_in_one_thing_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mezzotint.training import recipe

    monkeypatch.syspath_prepend(BENCHMARK)
    pairs = importlib.import_module("pairs")
    plain = tmp_path / "like.toml"
    plain.write_text(
        'method = "full"\nsteps = 100\nbatch = 4\n[data]\nfolder = "x"\nsize = [64, 64]\n[backbone]\nname = "unet"\n'
        '[backbone.config]\nblock_out_channels = [48, 96]\n[process]\nprediction = "velocity"\n[process.schedule]\n'
        'kind = "discrete"\nbetas = "linear"\n[checkpoints]\nkeep = 1\n[validation]\nbands = 5\n[previews]\ncount = 2\n'
    )
    monkeypatch.setattr(pairs, "LIKE", plain)
    read = []
    for name in pairs.PROCESSES:
        place = tmp_path / f"{name}.toml"
        place.write_text(pairs.toml(pairs.recipe(name, 1, 80)))
        read.append(recipe.read(place).model_dump(exclude={"out"}))
    linear, cosine, velocity = read
    for other, key in ((cosine, "schedule"), (velocity, "prediction")):
        assert {k for k in linear if linear[k] != other[k]} == {"process"}
        a, b = (each["process"] for each in (linear, other))
        a, b = (each if isinstance(each, dict) else each.to_dict() for each in (a, b))
        assert {k for k in a if a[k] != b[k]} == {key}
