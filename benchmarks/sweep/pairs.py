"""Pairs of small models that differ in one thing alone: the schedule, or what the network predicts.

`trained(name, seed)` gives the folder of one, trained first where it is missing: about ten minutes on one quiet core;
what was stopped goes on. Data, codec and network are those of the doctor benchmark's `unet-zsnr`.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from mezzotint import files
from mezzotint.cli.main import main
from mezzotint.process import Prediction, Process, schedules

ROOT = Path("runs/sweep/pairs")
SEED = 6  # of the nursery
NURSERY = Path(f"runs/doctor/seed-{SEED}")
REAL = Path(f"runs/doctor/data/validation-{SEED % 2}")  # cells that none of its models trains on
LIKE = NURSERY / "recipes" / "unet-zsnr.toml"
STEPS = 1200

PROCESSES = {
    "linear-epsilon": Process(schedules.linear(), Prediction.EPSILON),
    "cosine-epsilon": Process(schedules.cosine(), Prediction.EPSILON),
    "linear-velocity": Process(schedules.linear(), Prediction.VELOCITY),
}


def recipe(name: str, seed: int, steps: int) -> dict[str, Any]:
    """The nursery's recipe with another process, and every loss unweighted: what the network is asked is all there is.

    `every` validation and checkpoint follow the number of steps.
    """
    plain = tomllib.loads(LIKE.read_text())
    every = max(1, steps // 8)
    changes: dict[str, Any] = {
        "out": str(run(name, seed)), "steps": steps, "seed": seed, "process": PROCESSES[name].to_dict(),
        "checkpoints": {**plain["checkpoints"], "every": every},
        "validation": {**plain["validation"], "every": every},
        "previews": {**plain["previews"], "every": steps},
    }  # fmt: skip
    return {**plain, **changes}


def run(name: str, seed: int) -> Path:
    """The run folder of a training."""
    return ROOT / f"{name}-{seed}"


def trained(name: str, seed: int, steps: int = STEPS) -> Path:
    """The model's folder; trained, or trained further, where it is not finished."""
    at = run(name, seed)
    if (at / "model").is_dir():
        return at / "model"
    if not LIKE.is_file():
        sys.exit(f"{LIKE} is missing: run `python benchmarks/doctor/nursery.py --seed {SEED}` first")
    resume = ["--resume"] if (at / "recipe.toml").is_file() else []
    place = files.write_text(ROOT / "recipes" / f"{name}-{seed}.toml", toml(recipe(name, seed, steps)))
    if code := main(["train", str(place), *resume]):
        sys.exit(code)
    return at / "model"


def toml(tables: dict[str, Any], within: str = "") -> str:
    """Plain nested tables as TOML: values first, then the tables inside."""
    values = [f"{name} = {json.dumps(value)}" for name, value in tables.items() if not isinstance(value, dict)]
    inner = [
        f"\n[{within}{name}]\n{toml(value, f'{within}{name}.')}"
        for name, value in tables.items()
        if isinstance(value, dict)
    ]
    return "\n".join(values + inner) + "\n"
