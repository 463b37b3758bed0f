"""Plans for training: latents and captions once, then steps; every method by the graph that its loss really makes."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from mezzotint.errors import InputError
from mezzotint.layers.recompute import recompute
from mezzotint.plan import formats, kernels
from mezzotint.plan.encoders import spoken
from mezzotint.plan.generating import codec_dtype, resident, text_dtype
from mezzotint.plan.machines import Machine
from mezzotint.plan.methods import METHODS
from mezzotint.plan.objective import Critics, Prepared, Training
from mezzotint.plan.operators import Call
from mezzotint.plan.phases import Phase, Plan, Sum
from mezzotint.plan.subject import Subject
from mezzotint.plan.trace import Traced, imaginary, imagined, trace

LATENTS, CAPTIONS = 32, 64  # images and captions that are encoded at a time before training
MOMENT = 8  # bytes of AdamW's two moments for each number that trains
AVERAGE = 4  # bytes of its moving average


def training(subject: Subject, job: Training, machine: Machine, critics: Critics | None = None) -> Plan:
    """The plan of a training run; InputError where the model cannot be trained so.

    `critics` are what judges an autoencoder beside the distance, which the method `vae` needs: they belong to training.
    """
    if job.method not in METHODS:
        near = difflib.get_close_matches(job.method, METHODS, n=1, cutoff=0.0)
        raise InputError(f"no training method '{job.method}': did you mean '{near[0]}'? Valid: {', '.join(METHODS)}")
    size = job.size or subject.contract.size
    check(subject, size, job)
    subject.contract.process.levels(torch.zeros(1))  # whose tables are numbers, made before numbers are gone
    with imagined():
        prepared = METHODS[job.method](subject, job, size, critics)
        phases = [] if job.method in ("vae", "patch-pca") else before(subject, job, size, machine, prepared)
        phases.append(stepping(subject, job, machine, prepared))
        trained = sum(p.numel() for network in prepared.trained for p in moving(network))
    told = asdict(job) | {"size": f"{size[0]}x{size[1]}", "device": machine.name}
    each = 4.0 + MOMENT + (AVERAGE if job.ema else 0)  # bytes of a number that trains, in a checkpoint
    files = {"weights": float(prepared.written), "checkpoint": each * trained, **caches(subject, job, size, prepared)}
    return Plan(
        job.method, subject.name, subject.title, subject.contract.licence.weights, told, subject.parameters, trained,
        tuple(phases), machine, job.images, 0.0, (*subject.notes, *prepared.notes), files,
    )  # fmt: skip


def check(subject: Subject, size: tuple[int, int], job: Training) -> None:
    """InputError for a size that the model cannot have, and for numbers that make no sense."""
    cell = subject.contract.latent.factor * int(getattr(subject.backbone[1], "patch_size", 1) or 1)
    if size[0] % cell or size[1] % cell or min(size) < cell:
        w, h = (max(cell, round(side / cell) * cell) for side in size)
        raise InputError(f"size {size[0]}x{size[1]} is not a multiple of {cell}, which this model needs: use {w}x{h}")
    if job.batch % job.accumulation:
        raise InputError(f"batch {job.batch} must be a multiple of accumulation {job.accumulation}")


def before(
    subject: Subject, job: Training, size: tuple[int, int], machine: Machine, prepared: Prepared
) -> list[Phase]:  # fmt: skip
    """What is done once: the latents of all images, the text of all captions; parts rest in their files till then."""
    workspace = kernels.on_cpu if machine.kind == "cpu" else None
    dtype = formats.DTYPES[job.dtype]
    everything = dict(resident(subject, dtype))
    phases: list[Phase] = []

    def there(*parts: str) -> Sum:
        return tuple((name, size) for name, size in everything.items() if name.partition(".")[0] in parts)

    # on a CPU the pages of text encoders are there from the check of their digests until their own work is done
    mapped = ("text",) if machine.kind == "cpu" else ()

    def ran(act: Callable[[], object], networks: Iterable[nn.Module]) -> Traced:
        def quietly() -> object:
            with torch.no_grad():
                return act()

        given = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        return trace(quietly, given, workspace=workspace)

    if subject.contract.latent.factor > 1:
        codec = subject.model(dtype, codec_dtype(subject, torch.float32)).codec
        count = min(LATENTS, job.images)
        width, height = size
        shape = count, codec.pixel_channels, height, width
        traced = ran(lambda: codec.encode(torch.zeros(shape)), [codec.autoencoder])
        said = f"{count} images at a time through the encoder, kept in the cache"
        phases.append(Phase("latents", traced, job.images / count, there("codec", *mapped), (), said))
    if subject.encoders and not prepared.reads_text:
        text = subject.contract.text
        networks = [imaginary(subject.outline(e.folder), text_dtype(subject, dtype)) for e in subject.encoders]
        count = min(CAPTIONS, job.images)
        width, pooled = (text.width, text.pooled) if text else (0, None)
        traced = ran(lambda: spoken(subject.encoders, networks, count, width, pooled, subject.zeros), networks)
        said = f"{count} captions at a time, kept in the cache; a caption for each image, and none"
        phases.append(Phase("captions", traced, (job.images + 1) / count, there("text"), (), said))
    return phases


def caches(subject: Subject, job: Training, size: tuple[int, int], prepared: Prepared) -> dict[str, float]:
    """Bytes on disk of the latents of all images, of one mirroring, and of their captions, if no two are alike.

    Training maps these files, so they take no part of the peak.
    """
    found: dict[str, float] = {}
    latent, text = subject.contract.latent, subject.contract.text
    if job.method in ("vae", "patch-pca"):
        return found
    if latent.factor > 1:
        cells = (size[0] // latent.factor) * (size[1] // latent.factor)
        found["latent cache"] = 4.0 * job.images * latent.channels * cells
    if text is not None and subject.encoders and not prepared.reads_text:
        numbers = subject.tokens * text.width + (text.pooled or 0)
        found["text cache"] = float(
            text_dtype(subject, formats.DTYPES[job.dtype]).itemsize * (job.images + 1) * numbers
        )
    return found


def stepping(subject: Subject, job: Training, machine: Machine, prepared: Prepared) -> Phase:
    """A step: losses of all pieces of a batch with their gradients, AdamW, the moving average."""
    networks = nn.ModuleList(prepared.trained)
    if job.recompute:
        recompute(networks)
    pieces, piece = job.accumulation, job.batch // job.accumulation
    parameters = [p for network in prepared.trained for p in moving(network)]
    precise: Any = contextlib.nullcontext
    if job.precision == "bfloat16":
        precise = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731

    def act() -> None:
        for _ in range(min(pieces, 2)):  # from the second one on, gradients are there already
            with precise():
                loss = prepared.loss(piece)
            loss.backward()
            del loss

    given = [
        t for network in (*prepared.trained, *prepared.frozen) for t in (*network.parameters(), *network.buffers())
    ]
    with without_random_state():
        ran = trace(
            act, given, lambda: [p.grad for p in parameters if p.grad is not None],
            kernels.on_cpu if machine.kind == "cpu" else None,
        )  # fmt: skip
    numbers = sum(p.numel() for p in parameters)
    calls = {call: count * pieces / min(pieces, 2) for call, count in ran.calls.items()}
    for call in updates(numbers, job.ema):
        calls[call] = calls.get(call, 0) + 1
    traced = Traced(calls, ran.peak, ran.at_peak, ran.kept)
    held = (*prepared.weights.items(), ("AdamW's moments", float(MOMENT * numbers)))
    if job.ema:
        held += (("moving average", float(prepared.averaged)),)
    said = f"a batch of {job.batch}" + (f" in {pieces} pieces" if pieces > 1 else "")
    return Phase("step", traced, job.steps, held, (), said)


def updates(numbers: int, ema: bool) -> list[Call]:
    """What follows a backward pass: the norm of all gradients, their scaling, AdamW in one pass, the average."""

    def pass_over(name: str, each: int) -> Call:
        return Call(name, "update", "float32", (numbers,), 0.0, float(each * numbers))

    found = [pass_over("gradient norm", 4), pass_over("clipping", 8), pass_over("AdamW", 28)]
    return [*found, pass_over("moving average", 12)] if ema else found


def moving(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in network.parameters() if p.requires_grad]


@contextlib.contextmanager
def without_random_state() -> Any:
    """Blocks that run again put the generator back, which cannot be read where tensors have no numbers."""
    real = torch.get_rng_state, torch.set_rng_state
    torch.get_rng_state, torch.set_rng_state = lambda: torch.empty(0, dtype=torch.uint8), lambda state: None
    try:
        yield
    finally:
        torch.get_rng_state, torch.set_rng_state = real
