"""A batch of images: good image + mask + class -> image with a defect, written file by file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil

from mezzotint import files, images
from mezzotint.data.masks import Mask
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.generate import generate_batch
from mezzotint.governance.licences import Gate
from mezzotint.governance.prompts import Verdict
from mezzotint.pipeline.admission import admitted, facts_of
from mezzotint.pipeline.house import House, house
from mezzotint.pipeline.record import pixels_digest
from mezzotint.pipeline.release import looked_at
from mezzotint.request import Artifact, Request
from mezzotint.synthesis import classes, leaving, region
from mezzotint.synthesis.recipe import Recipe
from mezzotint.synthesis.shapes import Drawn, Shapes, shapes
from mezzotint.synthesis.tasks import Task

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Painted:
    """What came of a batch."""

    records: dict[int, Record]  # by the number of the image
    stay: list[Verdict]  # why the others are withheld


@dataclass(frozen=True, slots=True)
class Painter:
    """All that painting takes besides what to paint."""

    plan: Recipe
    model: Model
    drawn_from: Shapes
    desk: House
    gates: Mapping[int, Gate]  # by class

    def paint(self, batch: Sequence[Task], step: Callable[..., None] | None = None) -> Painted:
        """Paint a batch and write the images of it that are not finished yet."""
        plan, model, desk = self.plan, self.model, self.desk
        done = {task.index: record for task in batch if (record := finished(plan.out, task.name, model)) is not None}
        new = [i for i, task in enumerate(batch) if task.index not in done]
        if not new:
            return Painted(done, [])
        mode = "L" if model.codec.pixel_channels == 1 else "RGB"
        pictures = [resized(task.source.path, mode, *model.contract.size) for task in batch]
        drawn = [
            self.drawn_from.draw(
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
        leaves = {i: leaving.asked(desk, model, requests[i]) for i in new}
        results = generate_batch(model, requests, step)
        painted = [
            composed(*each)
            for each in zip(pictures, (r.images[0] for r in results), (d.mask for d in drawn), strict=True)
        ]
        stay: list[Verdict] = []
        for i, (verdict, told) in zip(new, looked_at(desk, [painted[i] for i in new], None), strict=True):
            asks = facts_of(self.gates[batch[i].target.index])
            made = leaving.left(desk, model, requests[i], leaves[i], painted[i], verdict, told, asks)
            if made is None:
                stay.append(verdict)
            else:
                done[batch[i].index] = write(plan, model, batch[i], pictures[i], drawn[i], made)
        return Painted(done, stay)


def opened(plan: Recipe, model: Model, targets: Collection[int]) -> Painter:
    """What painting these classes takes; InputError or Refused where masks or the policy do not allow it."""
    kinds = classes.defects(classes.classes(model.contract), plan.kinds)
    drawn_from = shapes(plan.model, plan.masks, kinds, *model.contract.size)
    desk = house(plan.policy)
    return Painter(plan, model, drawn_from, desk, {i: admitted(desk, model, Request(label=i)) for i in targets})


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


def write(plan: Recipe, model: Model, task: Task, source: pil.Image, drawn: Drawn, painted: Artifact) -> Record:
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


def finished(out: Path, name: str, model: Model) -> Record | None:
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
