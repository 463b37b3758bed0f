"""Painting a set, here or by workers elsewhere; file by file, so that a stopped run goes on."""

from __future__ import annotations

import socket
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mezzotint import files
from mezzotint.cluster import Cluster
from mezzotint.errors import InputError, Refused
from mezzotint.families import Model, load
from mezzotint.governance.prompts import Verdict
from mezzotint.synthesis import classes, painter, recipe
from mezzotint.synthesis.painter import Painted, Record, finished
from mezzotint.synthesis.recipe import Recipe
from mezzotint.synthesis.sources import sources
from mezzotint.synthesis.tasks import Task, tasks

BATCH = 8  # images painted at once; batches are cut at fixed places, so a run that went on gives the same images
Watch = Callable[[int, int], None]  # steps of the network done, all


def paint(plan: Recipe, model: Model, watch: Watch | None = None, cluster: Cluster | None = None) -> list[Record]:
    """Paint what is not there yet into `plan.out` and return the records of all images, in order.

    OUT/images, OUT/masks and OUT/sources hold PNGs of the same names; OUT/records/NAME.json, written last, says that an
    image is finished and how it was made. Outside the mask an image is its source at the model's size, to the bit.
    A picture that the policy withholds is left out, with a warning; Refused where none is left. InputError before
    anything is painted where the recipe, the model, the images or the folder do not fit.
    """
    known = classes.classes(model.contract)
    todo = tasks(plan, sources(plan.good, known, plan.type, plan.model), known)
    targets = {task.target.index for task in todo}
    here = painter.opened(plan, model, targets)
    settle_folder(plan, model)
    done = {task.index: record for task in todo if (record := finished(plan.out, task.name, model)) is not None}
    batches = [todo[i : i + BATCH] for i in range(0, len(todo), BATCH)]
    batches = [batch for batch in batches if any(task.index not in done for task in batch)]
    steps = plan.steps or model.contract.sampling.steps
    stay: list[Verdict] = []
    ended = 0

    def step(index: int, *_: object) -> None:
        if watch is not None:
            watch(ended * steps + index + 1, len(batches) * steps)

    def took(painted: Painted) -> None:
        nonlocal ended
        done.update(painted.records)
        stay.extend(painted.stay)
        ended += 1

    if cluster is None or not batches:
        for batch in batches:
            took(here.paint(batch, step))
    else:
        with marked(plan.out) as mark:

            def came(painted: Painted) -> None:
                step(steps - 1)
                took(painted)

            cluster.spread(partial(elsewhere, plan, model.contract.weights, targets, mark), batches, came)
    if stay:
        says = f"policy '{here.desk.policy.name}', {stay[0].rule}: {stay[0].says}"
        if len(stay) == len(todo):
            raise Refused(stay[0].rule, f"refused by the {says}.")
        warnings.warn(f"{len(stay)} of {len(todo)} pictures stay by the {says}", stacklevel=2)
    return [done[task.index] for task in todo if task.index in done]


def elsewhere(plan: Recipe, weights: str, targets: Collection[int], mark: Path) -> Callable[[list[Task]], Painted]:
    """A worker's own painter; InputError where it sees another folder or another model than who sent it."""
    host = socket.gethostname()
    if not mark.exists():
        raise InputError(f"{host} does not see {plan.out} as it is here: put it where all machines share it.")
    model = load(plan.model)
    if model.contract.weights != weights:
        raise InputError(f"{plan.model} is another model on {host} than here: put it where all machines share it.")
    return painter.opened(plan, model, targets).paint


@contextmanager
def marked(out: Path) -> Iterator[Path]:
    """A file in the folder by which others know it for the same."""
    (out / "records").mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".shared.", dir=out / "records") as mark:
        yield Path(mark.name)
    cleared(out)


def settle_folder(plan: Recipe, model: Model) -> None:
    """Begin the folder of the data set with its recipe, or make sure that the recipe there is this one."""
    at = plan.out / recipe.FILE
    if at.is_file():
        cleared(plan.out)
        if changed := recipe.changes(recipe.read(at), plan):
            raise InputError(f"{plan.out} holds a set made otherwise: {'; '.join(changed)}. Choose another folder.")
    elif plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
        raise InputError(f"{plan.out} holds other files: choose an empty or a new folder for the data set.")
    files.write_text(at, recipe.to_toml(plan))


def cleared(out: Path) -> None:
    """Delete what a kill left half-written, under the names of files.write_with."""
    for stray in out.glob("*/.*.??????*"):
        stray.unlink()
