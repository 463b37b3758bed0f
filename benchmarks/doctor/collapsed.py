"""A model that draws one picture whatever it is asked for: trained on one image under every caption and class."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import data
import nursery
from nursery import Nest
from patient import Patient, Unfit, copied

from mezzotint import files
from mezzotint.data import metadata

STEPS, RATE = 300, 1e-3


def collapsed(patient: Patient, rng: Random) -> Patient:
    """The patient with the weights of such a training, which is done once."""
    done = patient.nest.root / "extra" / f"collapsed-{patient.name}"
    done.parent.mkdir(parents=True, exist_ok=True)
    with open(done.parent / f".{done.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_dir():
            train(patient.nest, patient.name, done, rng)
    shutil.rmtree(patient.path)
    return replace(patient, path=copied(done, patient.path))


def train(nest: Nest, name: str, done: Path, rng: Random) -> None:
    """Fine-tune the healthy model on one image."""
    from published import finished

    from mezzotint.cli.main import main
    from mezzotint.training.recipe import check, to_toml

    run = done.with_name(f"run-{name}")
    shutil.rmtree(run, ignore_errors=True)
    one = copies_of_one(nest, rng, done.with_name(f"data-{name}"))
    text = name == "sd1-epsilon"
    tables: dict[str, Any] = {
        "out": str(run), "base": {"path": str(nest.model(name))}, "batch": 12,
        "data": {**nursery.images(nest, channels=3 if text else 1), "folder": str(one), "flips": []},
        "previews": {}, "ema": {"decay": 0.98}, "text": {"dropout": 0.0},
        "optimiser": {"rate": RATE, "warmup": 20, "final": 0.02},
    }  # fmt: skip
    if not text:
        del tables["text"]
    recipe = nursery.recipe(nest, name, STEPS, RATE, **tables)
    path = files.write_text(done.with_name(f"{name}.toml"), to_toml(check(recipe, name)))
    if main(["train", str(path)]):
        raise Unfit("the training on one image failed")
    out = done.with_name(f".{done.name}")
    shutil.rmtree(out, ignore_errors=True)
    if text:
        out.mkdir()
        finished(nest.base(name), run / "model", out)
    else:
        shutil.copytree(run / "model", out)
    os.rename(out, done)


def copies_of_one(nest: Nest, rng: Random, out: Path) -> Path:
    """A folder with one image under the caption and label of every class."""
    lines = metadata.rows(Path(nest.data("train")))
    chosen = rng.choice(lines)
    shutil.rmtree(out, ignore_errors=True)
    rows = []
    for label, caption in enumerate(data.CAPTIONS):
        name = f"{label}.png"
        copied(Path(nest.data("train")) / chosen["file_name"], out / name)
        rows.append({"file_name": name, "text": caption, "label": label})
    metadata.write(out, rows)
    return out
