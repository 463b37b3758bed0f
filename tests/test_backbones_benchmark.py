"""The benchmark compares like with like: both of its sides give the same images and the same losses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_both_sides_do_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole guided DDIM run, two training steps (the second after an update) and a decode, on tiny networks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    main = importlib.import_module("against_diffusers").main
    output = tmp_path / "ratios.json"
    rows = main(["--rounds", "1", "--steps", "3", "--tiny", "--output", str(output)])
    assert {row.case for row in rows} == {"unet-loop", "dit-loop", "unet-step", "dit-step", "vae-decode"}
    assert max(row.error for row in rows) < 1e-5
    assert len(json.loads(output.read_text())["rows"]) == len(rows)
