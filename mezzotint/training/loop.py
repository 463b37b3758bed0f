"""The one training loop: it draws, backpropagates, steps, averages, checks and saves, and knows no method."""

from __future__ import annotations

import contextlib
import fcntl
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mezzotint import files
from mezzotint.errors import InputError
from mezzotint.training import draws, ema, finish, metrics, recipe, state
from mezzotint.training.methods import Batch, Method, Place, method
from mezzotint.training.recipe import Optimiser, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL, CHECKPOINTS, SAMPLES, RECIPE = "model", "checkpoints", "samples", "recipe.toml"


@dataclass(frozen=True, slots=True)
class Watch:
    """What a run tells while it works; every function may be called often and must be quick."""

    prepare: Callable[[str, int, int], None] = lambda what, done, total: None
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
    watch = watch or Watch()
    folder = Path(plan.out)
    if plan.threads:
        torch.set_num_threads(plan.threads)
    if not resume and (state.newest(folder / CHECKPOINTS) or (folder / MODEL).exists()):
        raise InputError(f"{folder} holds a run already: go on with --resume, or choose another with --set out=FOLDER.")
    accelerator = _accelerator(plan)
    with _alone(folder) if accelerator.is_main_process else contextlib.nullcontext():
        return _run(plan, resume, accelerator, watch)


def _run(plan: Recipe, resume: bool, accelerator: Accelerator, watch: Watch) -> Outcome:
    folder = Path(plan.out)
    start = _start(plan, folder) if resume else None
    torch.manual_seed(draws.number(plan.seed, 0, "start"))
    job = method(plan, Place(folder, accelerator.device, watch.prepare))
    if start is not None:
        _same(start, job, folder)
    if accelerator.is_main_process:
        files.write_text(folder / RECIPE, recipe.to_toml(plan))
        state.sweep(folder / CHECKPOINTS)
    with _stop_signals() as stopped:
        try:
            return _loop(plan, job, accelerator, start, watch, stopped)
        except OSError as error:
            good = state.newest(folder / CHECKPOINTS)
            left = f"The checkpoint {good} is complete" if good else "There is no checkpoint"
            raise InputError(
                f"cannot write into {folder}: {error.strerror or error}.\n{left}; free space, then --resume."
            ) from error


def _loop(
    plan: Recipe, job: Method, accelerator: Accelerator, start: Path | None, watch: Watch, stopped: threading.Event
) -> Outcome:
    folder, main = Path(plan.out), accelerator.is_main_process
    average = ema.follow(job.trained[job.averaged]).to(accelerator.device)
    optimisers = {name: _optimiser(plan.optimiser, part, job.rates[name]) for name, part in job.trained.items()}
    modules = {**job.trained, "ema": average}
    done = int(start.name.split("-")[1]) if start else 0
    if start:
        state.restore(start, modules, optimisers)
    originals, plain = dict(job.trained), dict(optimisers)  # as they are, without what accelerate wraps around them
    for name in job.trained:
        job.trained[name], optimisers[name] = accelerator.prepare(job.trained[name], optimisers[name])
    facts = {"recipe": plan.model_dump(mode="json"), "digests": job.digests, "code": finish.version()}
    log = metrics.Metrics(folder, done) if main else None
    seen: list[float] = []
    since, loss = time.perf_counter(), math.nan

    def checkpoint() -> None:
        if main and log is not None:
            log.flush()
            state.save(folder / CHECKPOINTS, done, {**originals, "ema": average}, plain, facts, plan.checkpoints.keep)
        accelerator.wait_for_everyone()

    try:
        while done < plan.steps and not stopped.is_set():
            rate = learning_rate(plan.optimiser, done, plan.steps)
            loss, numbers = _step(plan, job, accelerator, optimisers, done, rate)
            ema.update(average, originals[job.averaged], done, plan.ema.decay, plan.ema.warmup)
            done += 1
            seen.append(loss)
            watch.step(done, plan.steps, loss)
            last = done == plan.steps
            record: metrics.Record = {}
            if done % plan.log_every == 0 or last:
                elapsed = max(time.perf_counter() - since, 1e-9)
                record = {"loss": sum(seen) / len(seen), "rate": rate, **{k: float(v) for k, v in numbers.items()}}
                record["images_per_second"] = round(len(seen) * plan.batch / elapsed, 3)
                seen, since = [], time.perf_counter()
            pause = time.perf_counter()
            if main and (done % plan.validation.every == 0 or last):
                record |= job.validate(average)
            if record and main and log is not None:
                record = {"step": done, **record}
                log.add(record)
                watch.record(record)
            if main and plan.previews.every and (done % plan.previews.every == 0 or last):
                _preview(job, average, folder / SAMPLES / f"step-{done:08d}.png", done)
            if main and (done % plan.validation.every == 0 or last):
                metrics.plot(folder)
            if done % plan.checkpoints.every == 0 or last:
                checkpoint()
            since += time.perf_counter() - pause
        if stopped.is_set():
            checkpoint()
        if main and done == plan.steps:
            job.save(average, folder / MODEL)
    finally:
        if log is not None:
            with contextlib.suppress(OSError):
                log.close()
    return Outcome(folder, done, done == plan.steps, loss)


def _step(
    plan: Recipe, job: Method, accelerator: Accelerator, optimisers: dict[str, Any], step: int, rate: float
) -> tuple[float, dict[str, Any]]:
    """One optimiser step over all pieces of the batch; the loss and the numbers to report."""
    batch = job.draw(step)
    pieces = plan.accumulation * accelerator.num_processes
    mine = range(accelerator.process_index, pieces, accelerator.num_processes)
    torch.manual_seed(draws.number(plan.seed, step, f"network {accelerator.process_index}"))  # dropout in the networks
    total = 0.0
    numbers: dict[str, Any] = {}
    for turn, index in enumerate(mine):
        piece = {key: value.chunk(pieces)[index].to(accelerator.device) for key, value in batch.items()}
        syncing = contextlib.ExitStack()
        if turn < len(mine) - 1:
            for part in job.trained.values():
                syncing.enter_context(accelerator.no_sync(part))
        with syncing:
            loss, numbers = job.loss(piece, step)
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(_broken(job, piece, step, f"the loss is {value}"))
            accelerator.backward(loss / plan.accumulation)
        total += value / len(mine)
    clip = plan.optimiser.clip or math.inf
    for name, optimiser in optimisers.items():
        norm = accelerator.clip_grad_norm_(job.trained[name].parameters(), clip)
        if norm is not None and not math.isfinite(float(norm)):
            raise InputError(_broken(job, batch, step, f"the gradient of the {name} is {float(norm)}"))
        for group in optimiser.param_groups:
            group["lr"] = rate * job.rates[name]
        optimiser.step()
        optimiser.zero_grad()
        numbers = {**numbers, f"gradient/{name}": float(norm) if norm is not None else 0.0}
    return total, numbers


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


def _optimiser(plan: Optimiser, part: nn.Module, rate: float) -> torch.optim.AdamW:
    """Fused AdamW; decay spares biases, norms and other vectors."""
    weights = [p for p in part.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": plan.decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=plan.rate * rate, betas=plan.betas, eps=plan.eps, fused=True)


def _accelerator(plan: Recipe) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise InputError("training needs the package accelerate. Run: pip install 'mezzotint[train]'") from error
    AcceleratorState._reset_state()  # it is one for the process, and the run before may have had another precision
    accelerator = Accelerator(mixed_precision="bf16" if plan.precision == "bfloat16" else "no")
    if plan.batch % (plan.accumulation * accelerator.num_processes):
        raise InputError(
            f"batch {plan.batch} must be a multiple of accumulation x processes,"
            f" {plan.accumulation} x {accelerator.num_processes}"
        )
    return accelerator


def _start(plan: Recipe, folder: Path) -> Path | None:
    """The checkpoint to go on from, after checking that it is whole and was made by this recipe."""
    found = state.newest(folder / CHECKPOINTS)
    if found is None:
        return None
    stored = recipe.check(state.facts(found)["recipe"], str(found / state.STATE))
    differing = recipe.changes(stored, plan)
    if differing:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise InputError(
            f"cannot resume {folder}: {differing[0]}{more}.\n"
            "Give the value it was started with, or start another run with --set out=..."
        )
    return found


def _same(checkpoint: Path, job: Method, folder: Path) -> None:
    stored = state.read_json(checkpoint / state.STATE)["digests"]
    for name in dict.fromkeys([*stored, *job.digests]):
        if stored.get(name) != job.digests.get(name):
            raise InputError(
                f"cannot resume {folder}: its {name} had digest {str(stored.get(name))[:16]} and now has"
                f" {str(job.digests.get(name))[:16]}. Restore the {name}, or start another run."
            )


def _broken(job: Method, batch: Batch, step: int, what: str) -> str:
    names = job.names(batch)
    more = f" and {len(names) - 16} more" if len(names) > 16 else ""
    return (
        f"{what} at step {step}; the batch was {', '.join(names[:16])}{more}.\n"
        "Nothing of this step was kept: look at those files, lower optimiser.rate, or use precision float32."
    )


def _preview(job: Method, average: nn.Module, path: Path, step: int) -> None:
    from mezzotint.training.grid import grid

    pictures = job.preview(average, step)
    if pictures:
        files.write_with(path, lambda temporary: grid(pictures).save(temporary, format="PNG"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, however that ends. InputError where another run has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115 (closed below, after the run)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}. Choose another folder.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is training in {folder}: wait for it, or stop it first.") from error
        yield


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and a polite kill ask the loop to finish its step, save once, and end; repeating them changes nothing."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
