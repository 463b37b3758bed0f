"""Painting: good image + mask + class -> image with a defect; file by file, so that a stopped run goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil

from mezzotint import files, images
from mezzotint.data.masks import Mask
from mezzotint.errors import InputError, Refused
from mezzotint.families import Model
from mezzotint.generate import generate_batch
from mezzotint.governance.licences import Gate
from mezzotint.governance.prompts import Verdict
from mezzotint.pipeline.admission import admitted, facts_of
from mezzotint.pipeline.house import House, house
from mezzotint.pipeline.record import pixels_digest
from mezzotint.pipeline.release import looked_at
from mezzotint.request import Artifact, Request
from mezzotint.synthesis import classes, leaving, recipe, region
from mezzotint.synthesis.recipe import Recipe
from mezzotint.synthesis.shapes import Drawn, Shapes, shapes
from mezzotint.synthesis.sources import Source, sources

BATCH = 8  # images painted at once; batches are cut at fixed places, so a run that went on gives the same images
Watch = Callable[[int, int], None]  # steps of the network done, all


@dataclass(frozen=True, slots=True)
class Task:
    """One image to paint: everything but its mask, which follows from the seed."""

    index: int
    source: Source
    target: classes.Class
    seed: int  # of the noise and, with the index, of the mask

    @property
    def name(self) -> str:
        return f"{self.index:06d}"


def tasks(plan: Recipe, good: Sequence[Source], known: Sequence[classes.Class]) -> list[Task]:
    """What to paint on what: every good image in turn, in an order drawn from the seed, kinds of defect in turn.

    Task i depends on the seed, on i and on the good images alone: a larger count goes on where a smaller one ended.
    """
    kinds = classes.defects(known, plan.kinds)
    order = np.random.default_rng(plan.seed).permutation(len(good)).tolist()
    found: list[Task] = []
    for i in range(plan.count):
        source = good[order[i % len(good)]]
        kind = kinds[(i + i // len(good)) % len(kinds)]
        seed = int(np.random.default_rng((plan.seed, i)).integers(2**31))
        found.append(Task(i, source, classes.of(known, source.type, kind), seed))
    return found


def paint(plan: Recipe, model: Model, watch: Watch | None = None) -> list[dict[str, Any]]:
    """Paint what is not there yet into `plan.out` and return the records of all images, in order.

    OUT/images, OUT/masks and OUT/sources hold PNGs of the same names; OUT/records/NAME.json, written last, says that an
    image is finished and how it was made. Outside the mask an image is its source at the model's size, to the bit.
    A picture that the policy withholds is left out, with a warning; Refused where none is left. InputError before
    anything is painted where the recipe, the model, the images or the folder do not fit.
    """
    known = classes.classes(model.contract)
    good = sources(plan.good, known, plan.type, plan.model)
    todo = tasks(plan, good, known)
    drawn_from = shapes(plan.model, plan.masks, classes.defects(known, plan.kinds), *model.contract.size)
    desk = house(plan.policy)
    gates = {target: admitted(desk, model, Request(label=target)) for target in {task.target.index for task in todo}}
    settle_folder(plan, model)
    done = {task.index: record for task in todo if (record := finished(plan.out, task.name, model)) is not None}
    batches = [todo[i : i + BATCH] for i in range(0, len(todo), BATCH)]
    batches = [batch for batch in batches if any(task.index not in done for task in batch)]
    steps = plan.steps or model.contract.sampling.steps
    stay: list[Verdict] = []
    for number, batch in enumerate(batches):

        def step(index: int, *_: object, number: int = number) -> None:
            if watch is not None:
                watch(number * steps + index + 1, len(batches) * steps)

        painted = paint_batch(plan, model, batch, drawn_from, desk, gates, done.keys(), stay, step)
        for task, record in zip(batch, painted, strict=True):
            if record is not None:
                done[task.index] = record
    if stay:
        says = f"policy '{desk.policy.name}', {stay[0].rule}: {stay[0].says}"
        if len(stay) == len(todo):
            raise Refused(stay[0].rule, f"refused by the {says}.")
        warnings.warn(f"{len(stay)} of {len(todo)} pictures stay by the {says}", stacklevel=2)
    return [done[task.index] for task in todo if task.index in done]


def paint_batch(
    plan: Recipe, model: Model, batch: Sequence[Task], drawn_from: Shapes, desk: House, gates: Mapping[int, Gate],
    done: Any, stay: list[Verdict], step: Callable[..., None],
) -> list[dict[str, Any] | None]:  # fmt: skip
    """Paint a batch and write the images that are not in `done`; their records, None for the others.

    Why a picture is withheld is added to `stay`.
    """
    mode = "L" if model.codec.pixel_channels == 1 else "RGB"
    pictures = [resized(task.source.path, mode, *model.contract.size) for task in batch]
    drawn = [
        drawn_from.draw(
            task.target.kind,
            region.inside(grey(picture)),
            region.busbars(grey(picture)),
            np.random.default_rng((task.seed, task.index)),
        )
        for task, picture in zip(batch, pictures, strict=True)
    ]
    requests = [
        Request(
            label=task.target.index, seed=task.seed, image=picture, mask=white(one.mask),
            sampler=plan.sampler, steps=plan.steps, guidance=plan.guidance,
        )
        for task, picture, one in zip(batch, pictures, drawn, strict=True)
    ]  # fmt: skip
    new = [i for i, task in enumerate(batch) if task.index not in done]
    leaves = {i: leaving.asked(desk, model, requests[i]) for i in new}
    results = generate_batch(model, requests, step)
    painted = [
        composed(*each) for each in zip(pictures, (r.images[0] for r in results), (d.mask for d in drawn), strict=True)
    ]
    records: list[dict[str, Any] | None] = [None] * len(batch)
    for i, (verdict, told) in zip(new, looked_at(desk, [painted[i] for i in new], None), strict=True):
        asks = facts_of(gates[batch[i].target.index])
        made = leaving.left(desk, model, requests[i], leaves[i], painted[i], verdict, told, asks)
        if made is None:
            stay.append(verdict)
        else:
            records[i] = write(plan, model, batch[i], pictures[i], drawn[i], made)
    return records


def resized(path: Path, mode: str, width: int, height: int) -> pil.Image:
    """A good image in the model's colours and size."""
    picture = images.read(path).convert(mode)
    return picture if picture.size == (width, height) else picture.resize((width, height), pil.Resampling.LANCZOS)


def grey(picture: pil.Image) -> NDArray[np.uint8]:
    """Grey pixels (H, W)."""
    return np.asarray(picture.convert("L"))


def white(mask: Mask) -> pil.Image:
    """A mask as a picture: white where it is True."""
    return pil.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))


def composed(source: pil.Image, painted: pil.Image, mask: Mask) -> pil.Image:
    """The painted pixels inside the mask, the source's everywhere else."""
    inside = mask if source.mode == "L" else mask[..., None]
    return pil.fromarray(np.where(inside, np.asarray(painted.convert(source.mode)), np.asarray(source)))


def write(plan: Recipe, model: Model, task: Task, source: pil.Image, drawn: Drawn, painted: Artifact) -> dict[str, Any]:
    """Write image, mask and source of one task, then the record that says they are whole."""
    contract, name = model.contract, f"{task.name}.png"
    digests = {"images": files.sha256_file(files.write_bytes(plan.out / "images" / name, painted.data))}
    for folder, picture in (("masks", white(drawn.mask)), ("sources", source)):
        path = files.write_with(plan.out / folder / name, lambda file, picture=picture: picture.save(file, "PNG"))
        digests[folder] = files.sha256_file(path)
    record = {
        "file": f"images/{name}",
        "sha256": digests["images"],
        "mask": {
            "file": f"masks/{name}",
            "sha256": digests["masks"],
            "origin": drawn.origin,
            "from": drawn.file,
            "pixels": int(drawn.mask.sum()),
        },
        "source": {
            "file": str(task.source.path),
            "sha256": files.sha256_file(task.source.path),
            "resized": f"sources/{name}",
            "resized_sha256": digests["sources"],
        },
        "class": {
            "index": task.target.index,
            "name": task.target.name,
            "type": task.target.type,
            "type_known_by": task.source.known_by,
            "kind": task.target.kind,
        },
        "seed": task.seed,
        "sampler": plan.sampler or contract.sampling.sampler,
        "steps": plan.steps or contract.sampling.steps,
        "guidance": contract.guidance.scale if plan.guidance is None else plan.guidance,
        "model": contract.weights,
        "pixels": pixels_digest(painted.image),  # repeats from run to run, which a signed file does not
        "governance": painted.record["governance"],
    }
    files.write_json(record_file(plan.out, task.name), record)
    return record


def record_file(out: Path, name: str) -> Path:
    """Where the record of an image lies."""
    return out / "records" / f"{name}.json"


def finished(out: Path, name: str, model: Model) -> dict[str, Any] | None:
    """The record of an image whose files are all there and as the record says, else None: it is painted again."""
    path = record_file(out, name)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wanted = (
            (record["file"], record["sha256"]),
            (record["mask"]["file"], record["mask"]["sha256"]),
            (record["source"]["resized"], record["source"]["resized_sha256"]),
        )
        if any(files.sha256_file(out / file) != digest for file, digest in wanted):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if record["model"] != model.contract.weights:
        raise InputError(
            f"{out} was painted by another model ({record['model'][:12]}..., now {model.contract.weights[:12]}...). "
            f"Choose another folder."
        )
    return record


def settle_folder(plan: Recipe, model: Model) -> None:
    """Begin the folder of the data set with its recipe, or make sure that the recipe there is this one."""
    at = plan.out / recipe.FILE
    if at.is_file():
        for stray in plan.out.glob("*/.*.??????*"):  # half-written by a kill, under the names of files.write_with
            stray.unlink()
        if changed := recipe.changes(recipe.read(at), plan):
            raise InputError(f"{plan.out} holds a set made otherwise: {'; '.join(changed)}. Choose another folder.")
    elif plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
        raise InputError(f"{plan.out} holds other files: choose an empty or a new folder for the data set.")
    files.write_text(at, recipe.to_toml(plan))
