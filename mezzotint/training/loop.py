"""The one training loop: it draws, backpropagates, steps, averages, checks and saves, and knows no method."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mezzotint import files
from mezzotint.errors import InputError
from mezzotint.training import attest, draws, ema, finish, guard, metrics, parallel, recipe, state, step, weights
from mezzotint.training.methods import Method, Place, method
from mezzotint.training.recipe import Optimiser, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL, CHECKPOINTS, SAMPLES, RECIPE = "model", "checkpoints", "samples", "recipe.toml"


@dataclass(frozen=True, slots=True)
class Watch:
    """What a run tells while it works; every function may be called often and must be quick."""

    prepare: Callable[[str, int, int], None] = lambda what, done, total: None
    say: Callable[[str], None] = lambda text: None  # what the audit of the data found
    step: Callable[[int, int, float], None] = lambda step, total, loss: None
    record: Callable[[metrics.Record], None] = lambda record: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    finished: bool  # False: stopped by Ctrl-C, with a complete checkpoint
    loss: float


def train(plan: Recipe, resume: bool = False, watch: Watch | None = None) -> Outcome:
    """Run a recipe to its end, or until Ctrl-C; the finished model is `out`/model.

    With `resume` it goes on from the newest checkpoint and ends with the weights of a run that was never stopped, bit
    for bit on the same machine and thread count; without a checkpoint it starts from the beginning. InputError where
    the folder holds a run already, the recipe or data changed, the loss is not finite, or the disk is full.
    """
    folder = Path(plan.out)
    if plan.threads:
        torch.set_num_threads(plan.threads)
    if not resume and (state.newest(folder / CHECKPOINTS) or (folder / MODEL).exists()):
        raise InputError(f"{folder} holds a run already: go on with --resume, or choose another with --set out=FOLDER.")
    accelerator = parallel.join(plan)
    heard = watch if watch and accelerator.is_main_process else Watch()
    with parallel.explained(accelerator), contextlib.ExitStack() as held:
        parallel.on_main(accelerator, lambda: held.enter_context(guard.alone(folder)))
        return _run(plan, resume, accelerator, heard)


@dataclass(frozen=True, slots=True)
class Run:
    """A run at work."""

    plan: Recipe
    job: Method
    accelerator: Accelerator
    weights: weights.Weights
    log: metrics.Metrics | None  # the main process's
    watch: Watch
    started: str  # UTC

    @property
    def folder(self) -> Path:
        return Path(self.plan.out)


def _run(plan: Recipe, resume: bool, accelerator: Accelerator, watch: Watch) -> Outcome:
    folder, started = Path(plan.out), attest.now()
    start = state.newest(folder / CHECKPOINTS) if resume else None
    if start is not None:
        parallel.on_main(accelerator, lambda: _check_recipe(plan, start))

    def make() -> Method:
        torch.manual_seed(draws.number(plan.seed, 0, "start"))
        audits = start is None and accelerator.is_main_process
        return method(plan, Place(folder, accelerator.device, watch.prepare, watch.say if audits else None))

    def begin() -> metrics.Metrics:
        files.write_text(folder / RECIPE, recipe.to_toml(plan))
        state.sweep(folder / CHECKPOINTS)
        return metrics.Metrics(folder, int(start.name.split("-")[1]) if start else -1)

    job = parallel.main_first(accelerator, make)
    if start is not None:
        _same(start, job, folder)
    with guard.stop_signals() as stopped, contextlib.ExitStack() as closing:
        try:
            found = weights.prepare(plan, job, accelerator, start)
            log = parallel.on_main(accelerator, begin)
            if log is not None:
                closing.callback(log.close)
            done = int(start.name.split("-")[1]) if start else 0
            return _loop(Run(plan, job, accelerator, found, log, watch, started), done, stopped)
        except OSError as error:
            good = state.newest(folder / CHECKPOINTS)
            left = f"The checkpoint {good} is complete" if good else "There is no checkpoint"
            raise InputError(
                f"cannot write into {folder}: {error.strerror or error}.\n{left}; free space, then --resume."
            ) from error


def _loop(run: Run, done: int, stopped: threading.Event) -> Outcome:
    plan, job, accelerator = run.plan, run.job, run.accelerator
    seen: list[float] = []
    since, loss, stopping = time.perf_counter(), math.nan, False
    if done == 0:
        _report(run, 0, {}, judged=True)  # where it starts from
        since = time.perf_counter()
    batch = job.draw(done) if done < plan.steps else {}
    alone = accelerator.num_processes == 1  # several stop after the same step, once they have heard of it
    while done < plan.steps and not (stopping or (alone and stopped.is_set())):
        rate = learning_rate(plan.optimiser, done, plan.steps)
        computed = step.gradients(plan, job, accelerator, run.weights.networks, batch, done)
        upcoming = job.draw(done + 1) if done + 1 < plan.steps else {}  # while an accelerator still computes
        loss, numbers, stopping = step.agree(plan, job, accelerator, batch, done, computed, stopped.is_set())
        weights.advance(run.weights, plan, done, rate)
        done, batch = done + 1, upcoming
        seen.append(loss)
        run.watch.step(done, plan.steps, loss)
        last = done == plan.steps
        record: metrics.Record = {}
        if last or done % plan.log_every == 0:
            elapsed = max(time.perf_counter() - since, 1e-9)
            record = {"loss": sum(seen) / len(seen), "rate": rate, **numbers}
            record["images_per_second"] = round(len(seen) * plan.batch / elapsed, 3)
            seen, since = [], time.perf_counter()
        pause = time.perf_counter()
        judged = last or done % plan.validation.every == 0
        if record or judged:
            _report(run, done, record, judged)
        if last or done % plan.checkpoints.every == 0:
            _checkpoint(run, done)
        if plan.previews.every and (last or done % plan.previews.every == 0):
            picture = run.folder / SAMPLES / f"step-{done:08d}.png"
            _use(run, lambda network, at=done, path=picture: _preview(job, network, path, at))
        if judged:
            parallel.on_main(accelerator, lambda: metrics.plot(run.folder))
        since += time.perf_counter() - pause
    if done < plan.steps:
        _checkpoint(run, done)
    else:
        model = run.folder / MODEL
        _use(run, lambda network: job.save(network, model))
        facts = (plan, job, model, run.started, {"loss": loss})
        parallel.on_main(accelerator, lambda: attest.attest(*facts))
    return Outcome(run.folder, done, done == plan.steps, loss)


def _report(run: Run, done: int, record: metrics.Record, judged: bool) -> None:
    """Add to the record what validation finds, where it is due, and pass it on."""
    average = run.weights.average

    def note(found: dict[str, float]) -> None:
        if run.log is not None and (record or found):
            run.log.add({"step": done, **record, **found})
            run.watch.record({"step": done, **record, **found})

    with ema.at_rest(average):
        if not judged:
            parallel.on_main(run.accelerator, lambda: note({}))
        elif run.weights.outline is None:
            parallel.on_main(run.accelerator, lambda: note(run.job.validate(average)))
        else:  # a network in shards computes only where all processes do
            found = run.job.validate(average)
            parallel.on_main(run.accelerator, lambda: note(found))


def _checkpoint(run: Run, done: int) -> None:
    plan = run.plan
    facts = {"recipe": plan.model_dump(mode="json"), "digests": run.job.digests, "code": finish.version()}
    content = weights.content(run.weights, run.job)

    def write() -> None:
        if run.log is not None:
            run.log.flush()
        state.save(run.folder / CHECKPOINTS, done, content, facts, plan.checkpoints.keep)

    parallel.on_main(run.accelerator, write)


def _use(run: Run, use: Callable[[nn.Module], object]) -> None:
    """Let the main process do something with the averaged network."""
    with weights.finished(run.weights, run.accelerator) as network:
        parallel.on_main(run.accelerator, lambda: use(network))


def learning_rate(plan: Optimiser, step: int, steps: int) -> float:
    """The rate of step 0, 1, ..., a pure function: a linear rise, then level or half a cosine to `final`.

    cosine: r(u) = rate (final + (1 - final) (1 + cos(pi u)) / 2), u = share of the steps after the warm-up
    (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    if step < plan.warmup:
        return plan.rate * (step + 1) / plan.warmup
    if plan.schedule == "constant":
        return plan.rate
    u = (step - plan.warmup) / max(steps - plan.warmup, 1)
    return plan.rate * (plan.final + (1 - plan.final) * (1 + math.cos(math.pi * u)) / 2)


def _check_recipe(plan: Recipe, checkpoint: Path) -> None:
    """InputError where a checkpoint is damaged or was made by another recipe."""
    stored = recipe.check(state.facts(checkpoint)["recipe"], str(checkpoint / state.STATE))
    differing = recipe.changes(stored, plan)
    if differing:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise InputError(
            f"cannot resume {plan.out}: {differing[0]}{more}.\n"
            "Give the value it was started with, or start another run with --set out=..."
        )


def _same(checkpoint: Path, job: Method, folder: Path) -> None:
    stored = state.read_json(checkpoint / state.STATE)["digests"]
    for name in dict.fromkeys([*stored, *job.digests]):
        if stored.get(name) != job.digests.get(name):
            raise InputError(
                f"cannot resume {folder}: its {name} had digest {str(stored.get(name))[:16]} and now has"
                f" {str(job.digests.get(name))[:16]}. Restore the {name}, or start another run."
            )


def _preview(job: Method, average: nn.Module, path: Path, step: int) -> None:
    from mezzotint.training.grid import grid

    pictures = job.preview(average, step)
    if pictures:
        files.write_with(path, lambda temporary: grid(pictures).save(temporary, format="PNG"))
