"""The measurement: every setting draws every batch of wishes, in turns, and what is drawn is kept.

In a round every setting draws the same batch from the same noise, one after the other and in another order than in the
round before, so a machine that slows down slows all of them, and the ratio of two settings' times within a round
stands. The first round warms up and measures memory. A run that goes on where another was stopped times its baseline
anew, since the machine may have changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mezzotint.errors import InputError
from mezzotint.evaluate.sweep import looks, meter
from mezzotint.evaluate.sweep.reference import USUAL, Reference, converge, cost, pixel_error
from mezzotint.evaluate.sweep.setting import Setting, Target, evaluations
from mezzotint.evaluate.sweep.store import Cell, Store
from mezzotint.evaluate.sweep.subject import Subject
from mezzotint.files import sha256_json
from mezzotint.pipeline import record
from mezzotint.request import Result

SHOWN = 4  # pictures of each setting that are kept
Say = Callable[[str, float, float], None]  # what is done now, evaluations done, evaluations in all


@dataclass(frozen=True)
class Sweep:
    """What is to be measured and where it is kept; `compares` says whether sets of pictures are compared, too."""

    subject: Subject
    settings: Sequence[Setting]
    store: Store
    compares: bool = False

    @property
    def targets(self) -> list[Target]:
        return list(dict.fromkeys(setting.target for setting in self.settings))

    @property
    def baseline(self) -> Setting:
        """The setting of middling cost, beside which all others are timed."""
        order = sorted(self.settings, key=self.evaluations)
        return order[len(order) // 2]

    def evaluations(self, setting: Setting) -> int:
        """Evaluations an image."""
        return evaluations(self.subject.models[setting.dtype], setting.request(self.subject.wishes[0]))

    def reference_identity(self, target: Target) -> dict[str, Any]:
        """What converged images depend on."""
        model = self.subject.models[self.subject.precise]
        requests = [{**record(model, target.request(wish)), "seed": wish.seed} for wish in self.subject.wishes]
        return {"reference": 1, "requests": requests, "contract": model.contract.model_dump(mode="json")}

    @cached_property
    def reference_keys(self) -> dict[Target, str]:
        """The digest of what converged images depend on."""
        return {target: sha256_json(self.reference_identity(target)) for target in self.targets}

    def identity(self, setting: Setting, index: int) -> dict[str, Any]:
        """What the result of a setting in a round depends on."""
        return {
            "reference": self.reference_keys[setting.target] if self.subject.follows_ode else None,
            **self.subject.identity(setting, self.subject.round(index)),
        }


def measure(sweep: Sweep, say: Say | None = None) -> dict[Target, Reference]:
    """Measure what the store lacks; returns the converged images of each target, {} where the model follows no ODE."""
    subject, store = sweep.subject, sweep.store
    progress = Progress(say, *outstanding(sweep))
    references: dict[Target, Reference] = {}
    for target in sweep.targets if subject.follows_ode else ():
        found = store.read_reference(sweep.reference_identity(target))
        if found is None:
            found = _converged(subject, target, progress)
            store.write_reference(sweep.reference_identity(target), found)
        references[target] = found
    run = f"{time.time():.3f}"
    failed: set[Setting] = set()
    for index in range(subject.rounds):
        missing = [s for s in sweep.settings if lacks(sweep, s, index)]
        timing = index > 0 or subject.rounds == 1
        if missing and timing and sweep.baseline not in missing:
            missing.append(sweep.baseline)  # to be timed beside the others
        shift = index % max(1, len(missing))
        for setting in missing[shift:] + missing[:shift]:
            if setting in failed:
                continue
            progress.say(f"round {index + 1} of {subject.rounds}: {setting.name}")
            cell = _cell(sweep, setting, index, run, references.get(setting.target))
            if cell.failure:
                failed.add(setting)
            progress.add(sweep.evaluations(setting) * len(subject.round(index)))
    return references


def lacks(sweep: Sweep, setting: Setting, index: int) -> bool:
    """Whether the store has no full result of a setting in a round."""
    identity = sweep.identity(setting, index)
    cell = sweep.store.read(identity)
    if cell is None:
        return True
    return sweep.compares and not cell.failure and sweep.store.features(identity) is None


def outstanding(sweep: Sweep) -> tuple[float, float]:
    """Evaluations done already and in all, the references' guessed."""
    subject, done, all = sweep.subject, 0.0, 0.0
    for target in sweep.targets if subject.follows_ode else ():
        count = cost(subject, target) * len(subject.wishes)
        all += count
        done += count * (sweep.store.read_reference(sweep.reference_identity(target)) is not None)
    for setting in sweep.settings:
        each = sweep.evaluations(setting)
        for index in range(subject.rounds):
            count = each * len(subject.round(index))
            all += count
            done += count * (not lacks(sweep, setting, index))
    return done, all


class Progress:
    """Adds up what is done and tells it."""

    def __init__(self, tell: Say | None, done: float, all: float) -> None:
        self.tell, self.done, self.all, self.what = tell, done, all, ""

    def say(self, what: str) -> None:
        self.what = what
        if self.tell is not None:
            self.tell(what, self.done, self.all)

    def add(self, count: float) -> None:
        self.done = min(self.all, self.done + count)
        self.say(self.what)


def _converged(subject: Subject, target: Target, progress: Progress) -> Reference:
    def watch(steps: int, gap: float | None, evaluations: float) -> None:
        if steps > USUAL:
            progress.all += evaluations  # beyond the guess
        moved = f", the last doubling moved it by {gap:.4f}" if gap is not None else ""
        progress.say(f"reference of {target.name}: {steps} steps{moved}")
        progress.add(evaluations)

    found = converge(subject, target, watch)
    progress.all -= (cost(subject, target) - cost(subject, target, min(USUAL, found.steps))) * len(subject.wishes)
    return found


def _cell(sweep: Sweep, setting: Setting, index: int, run: str, reference: Reference | None) -> Cell:
    """Draw one batch with one setting, and keep what came of it."""
    subject, store, identity = sweep.subject, sweep.store, sweep.identity(setting, index)
    wishes = subject.round(index)
    device = subject.models[setting.dtype].device

    def work() -> list[Result]:
        return subject.draw(setting, wishes)

    before = store.read(identity) or Cell()
    try:
        if index == 0:
            results, memory = meter.peak(work, device)
            cell = replace(before, memory=memory)
            if subject.rounds == 1:
                cell = replace(cell, seconds={**before.seconds, run: meter.timed(work, device)[1]})
        else:
            results, seconds = meter.timed(work, device)
            cell = replace(before, seconds={**before.seconds, run: seconds})
    except InputError as error:
        cell = Cell(failure=str(error))
        store.update(identity, cell)
        return cell
    pictures = [result.images[0] for result in results]
    if reference is not None and not setting.stochastic:
        start, end = index * subject.batch, index * subject.batch + len(wishes)
        latents = torch.cat([result.latents for result in results]).float()
        pixel = [pixel_error(a, b) for a, b in zip(pictures, reference.pictures[start:end], strict=True)]
        cell = replace(cell, latent=reference.errors(latents, start), pixel=pixel)
    found = looks.of_pictures(pictures) if sweep.compares else None
    store.write(identity, cell, pictures[:SHOWN] if index == 0 else [], found)
    return cell
