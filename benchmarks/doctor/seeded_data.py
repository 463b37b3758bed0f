"""Faults of data and of training runs: copies, leaks, captions, balance, broken images; records that went wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from patient import Patient, Unfit, copied, rows, traced, uniform
from PIL import Image as pil
from PIL import ImageOps

from mezzotint import files, images
from mezzotint.data import metadata

Seed = Callable[[Patient, Random], Patient]
Lines = list[dict[str, Any]]
SOME = 240  # images of a folder that is written anew


def copies(exact: bool) -> Seed:
    """A third of the images are copies of others: the same bytes, or mirrored, brightened and compressed anew."""

    def seed(patient: Patient, rng: Random) -> Patient:
        def copy(lines: Lines) -> None:
            out = patient.scratch / "data"
            few = rng.sample(lines, max(4, len(lines) // 15))
            for number in range(round(len(lines) * uniform(rng, 0.4, 0.6))):
                line = rng.choice(few)
                name = f"copy-{number:03d}.png"
                picture = images.read(out / line["file_name"])
                if not exact:
                    light = uniform(rng, 0.96, 1.05)
                    picture = picture.point(lambda value, light=light: min(255, value * light))
                    picture = ImageOps.mirror(picture) if rng.random() < 0.3 else picture
                picture.save(out / name)
                lines.append({**line, "file_name": name})

        return rows(patient, copy, SOME)

    return seed


def leak(patient: Patient, rng: Random) -> Patient:
    """Many of the validation images are images of the training under other names; the recipe names both folders."""
    patient = traced(patient)
    train = rows(patient, lambda lines: None, SOME)
    held = replace(patient, data=Path(patient.nest.data("validation")), scratch=patient.scratch / "held")

    def mix(lines: Lines) -> None:
        assert train.data is not None
        for line in rng.sample(lines, round(len(lines) * uniform(rng, 0.2, 0.5))):
            source = rng.choice(metadata.rows(train.data))
            copied(train.data / source["file_name"], held.scratch / "data" / line["file_name"])
            line.update({key: source[key] for key in ("text", "label") if key in source})

    held = rows(held, mix)
    return renamed(train, train.data, held.data)


def renamed(patient: Patient, train: Path | None, held: Path | None) -> Patient:
    """The run's recipe with other folders of data."""
    assert patient.trace is not None and train is not None
    recipe = patient.trace / "recipe.toml"
    text = re.sub(r"(?m)^folder = .*$", f"folder = {json.dumps(str(train.resolve()))}", recipe.read_text(), count=1)
    if held is not None:
        text = re.sub(r"(?m)^validation = .*$", f"validation = {json.dumps(str(held.resolve()))}", text, count=1)
    recipe.write_text(text)
    return patient


def captions_missing(patient: Patient, rng: Random) -> Patient:
    """Half or more of the captions are empty."""

    def empty(lines: Lines) -> None:
        for line in rng.sample(lines, round(len(lines) * uniform(rng, 0.5, 0.9))):
            line["text"] = ""

    return rows(patient, empty, SOME)


def captions_equal(patient: Patient, rng: Random) -> Patient:
    """One caption for all."""
    text = rng.choice(("a solar cell", "a photograph of a solar cell", "solar cell, electroluminescence"))
    return rows(patient, lambda lines: [line.update(text=text) for line in lines], SOME)


def unbalanced(patient: Patient, rng: Random) -> Patient:
    """Nearly all images are of one class."""

    def thin(lines: Lines) -> None:
        labels = sorted({line["label"] for line in lines if line.get("label") is not None})
        most, kept = rng.choice(labels), []
        for label in labels:
            of = [line for line in lines if line.get("label") == label]
            kept += of if label == most else of[: rng.choice((1, 2))]
        lines[:] = kept

    return rows(patient, thin)


def labels_beyond(patient: Patient, rng: Random) -> Patient:
    """Labels of some images count from 1, or were made for more classes than the model has."""
    count = len(patient.contract["classes"]["names"])

    def raised(lines: Lines) -> None:
        for line in rng.sample(lines, round(len(lines) * uniform(rng, 0.2, 0.4))):
            line["label"] = count + rng.randint(0, 3)

    return rows(patient, raised, SOME)


def images_broken(patient: Patient, rng: Random) -> Patient:
    """Images of the run's folder that cannot be read: cut short by a full disk, or no images at all."""
    patient = traced(patient)

    def cut(lines: Lines) -> None:
        for line in rng.sample(lines, round(len(lines) * uniform(rng, 0.1, 0.3))):
            file = patient.scratch / "data" / line["file_name"]
            file.write_bytes(file.read_bytes()[: rng.choice((0, 40, 600))])

    broken = rows(patient, cut, SOME)
    return renamed(replace(broken, data=Path(patient.nest.data("dozen"))), broken.data, None)


def images_blank(patient: Patient, rng: Random) -> Patient:
    """A part of the images is black everywhere, as a failed export leaves them."""

    def blacken(lines: Lines) -> None:
        for line in rng.sample(lines, round(len(lines) * uniform(rng, 0.3, 0.5))):
            file = patient.scratch / "data" / line["file_name"]
            pil.new("L", images.read(file).size, 0).save(file)

    return rows(patient, blacken, SOME)


# Records of runs.


def records(change: Callable[[dict[str, Any], float, Random], object]) -> Seed:
    """`change` edits each record of a copy of the run, told the share of the run that is over."""

    def seed(patient: Patient, rng: Random) -> Patient:
        if patient.trace is None:
            patient = traced(patient)
        else:
            patient = replace(patient, trace=copied(patient.trace, patient.scratch / "run"))
        assert patient.trace is not None
        path = patient.trace / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not lines:
            raise Unfit("its run has no records")
        state = Random(rng.random())
        last = max(line["step"] for line in lines) or 1
        for line in lines:
            change(line, line["step"] / last, state)
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        return patient

    return seed


def keys(record: dict[str, Any], *starts: str) -> list[str]:
    return [key for key, value in record.items() if key.startswith(starts) and isinstance(value, float)]


def times(record: dict[str, Any], factor: float, *starts: str) -> None:
    for key in keys(record, *starts):
        record[key] *= factor


def overfitted(patient: Patient, rng: Random) -> Patient:
    """The validation loss turns and rises while that of the training goes on falling."""
    turn, steep = uniform(rng, 0.25, 0.6), uniform(rng, 0.4, 1.5)

    def change(record: dict[str, Any], share: float, state: Random) -> None:
        late = max(0.0, share - turn) / (1 - turn)
        times(record, 1 + steep * late, "validation")
        times(record, 1 - 0.6 * late, "loss")

    return records(change)(patient, rng)


def diverged(patient: Patient, rng: Random) -> Patient:
    """The loss jumps and stays high from a moment on."""
    at, high = uniform(rng, 0.3, 0.8), uniform(rng, 3.0, 30.0)

    def change(record: dict[str, Any], share: float, state: Random) -> None:
        if share > at:
            times(record, high * uniform(state, 0.7, 1.4), "loss", "validation", "gradient")

    return records(change)(patient, rng)


def not_a_number(patient: Patient, rng: Random) -> Patient:
    """The loss is not a number from a moment on."""
    at = uniform(rng, 0.3, 0.8)

    def change(record: dict[str, Any], share: float, state: Random) -> None:
        if share > at:
            times(record, float("nan"), "loss", "validation", "gradient")

    return records(change)(patient, rng)


def rate(low: float, high: float) -> Seed:
    """Another learning rate in every record; the loss hardly falls where it was small, and jumps where it was large."""

    def seed(patient: Patient, rng: Random) -> Patient:
        factor = uniform(rng, low, high)
        start: dict[str, float] = {}

        def change(record: dict[str, Any], share: float, state: Random) -> None:
            times(record, factor, "rate")
            for key in keys(record, "loss", "validation"):
                first = start.setdefault(key, record[key])
                if factor < 1:
                    record[key] = first + 0.03 * (record[key] - first)
                else:
                    record[key] = 0.5 * (first + record[key]) * uniform(state, 0.75, 1.33)
            if factor > 1:
                times(record, uniform(state, 1.0, 40.0) if state.random() < 0.2 else 1.0, "gradient")

        return records(change)(patient, rng)

    return seed
