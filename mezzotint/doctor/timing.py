"""A request of one picture, timed by part: text, the steps by kind of layer, the codec."""

from __future__ import annotations

import contextlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.conditioning import Conditioning
from mezzotint.doctor import ceiling, clock, operators, remedies
from mezzotint.doctor.case import Case
from mezzotint.doctor.clock import Work
from mezzotint.doctor.finding import Measure
from mezzotint.doctor.operators import Operators
from mezzotint.doctor.remedies import Seen
from mezzotint.errors import InputError
from mezzotint.families.model import Model, working
from mezzotint.families.steering import steering
from mezzotint.layers.operators import KINDS
from mezzotint.request import Request

LEAST = 8  # latents a side of the smallest picture that a network is tried at
QUICK = 0.6  # seconds: a step that long can be run in pairs
LONGEST = 30.0  # seconds: what is foreseen to take longer is measured at a smaller size
CONVOLUTION = (64, 32)  # channels and side to measure the ceiling at, for a network that has none

Told = tuple[Conditioning, Conditioning | None]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of repetitions."""

    name: str
    spans: tuple[float, ...]
    note: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.spans)

    @property
    def measure(self) -> Measure:
        return Measure(self.name, self.value, min(self.spans), max(self.spans), self.note, "s")


def asked(case: Case) -> Request:
    """One picture, as the contract has it."""
    model = case.model
    width, height = model.contract.size
    prompt, label = "", None
    if model.text is not None:
        captions = () if case.data is None else case.data.captions
        prompt = next((caption for caption in captions if caption), "a photograph")
    if model.contract.classes is not None and model.contract.classes.null is None:
        label = 0
    return Request(prompt=prompt, label=label, seed=case.seed, width=width, height=height)


def area(request: Request) -> int:
    """Pixels of the picture."""
    return (request.width or 1) * (request.height or 1)


def encoding(model: Model, request: Request) -> tuple[Told, Timed]:
    """What steers the network, and the time that it takes to make that of a prompt."""
    scale, size = model.contract.guidance.scale, (request.width or 0, request.height or 0)

    def encode() -> Told:
        return steering(model, [request], scale, size)

    with torch.no_grad():  # not in inference mode: what is kept must serve a step that records gradients, too
        told = encode()
        return told, Timed("text", clock.spans(encode, model.device) if model.text else (0.0,))


def sizes(model: Model, request: Request, told: Told) -> list[tuple[Work, float]]:
    """The work of a step with its seconds, from the smallest size to the model's own or the last that is quick enough.

    The way up foresees what the next one takes; sizes that a network refuses, other than its own, are left out.
    """
    multiple = model.codec.factor * getattr(model.backbone.config, "patch_size", 1)
    sides = [(request.width or 0, request.height or 0)]
    while all(side % (2 * multiple) == 0 and side // 2 >= LEAST * model.codec.factor for side in sides[0]):
        sides.insert(0, (sides[0][0] // 2, sides[0][1] // 2))
    if remedies.compiled(model.backbone):
        sides = sides[-2:]  # each is compiled
    found: list[tuple[Work, float]] = []
    for width, height in sides:
        if found and found[-1][1] * width * height / area(found[-1][0].request) > LONGEST:
            break
        work = clock.prepared(model, replace(request, width=width, height=height), told)
        try:
            spent = clock.settled(work.step, model.device)
        except (InputError, RuntimeError, ValueError):
            if (width, height) == sides[-1]:
                raise
            continue
        found.append((work, spent if spent > QUICK else min(spent, clock.settled(work.step, model.device))))
    return found


def step_of(case: Case, works: Sequence[tuple[Work, float]]) -> tuple[Seen, Timed, list[Timed], list[int]]:
    """The largest work by kind of layer, its time, the time by kind, and the pages that each step read from disk."""
    work, expected = works[-1]
    quick = [each for each, spent in works if spent <= QUICK]
    device, slow, eager = work.model.device, expected > clock.LONG, not remedies.compiled(work.model.backbone)
    with contextlib.nullcontext() if eager else torch.compiler.set_stance("force_eager"):
        counted = operators.flops(work.step)
    rounds = clock.rounds_of(expected)
    runs = [operators.timed(work.step, device) for _ in range(min(rounds, 5))] if eager else []
    spans: list[float] = []
    faults: list[int] = []
    for _ in range(rounds):
        before = ceiling.memory().faults
        spans.append(clock.settled(work.step, device))
        faults.append(ceiling.memory().faults - before)
    if slow:
        spans.append(expected)
    size, whole = work.settings, area(work.request) == case.model.contract.size[0] * case.model.contract.size[1]
    step = Timed("step", tuple(spans), "" if whole else f"measured at {size.width}x{size.height}")
    maps = Counter(runs[0].convolved if runs else ())
    largest = max(maps, key=lambda each: maps[each] * (each[0] * each[1]) ** 2, default=CONVOLUTION)
    best = min(runs, key=lambda run: run.total, default=None)
    light = quick[-1] if quick else works[0][0]
    seen = Seen(case, work, light, step.value, min(spans), best, counted, (max(8, largest[0]), max(4, largest[1])))
    return seen, step, by_kind(runs, step.value, device), faults


def by_kind(runs: Sequence[Operators], step: float, device: torch.device) -> list[Timed]:
    """Seconds of a step by kind of layer; what is left is Python's, where operators do not outlast their calls."""
    scales = [min(1.0, step / run.total) for run in runs]
    if device.type != "cpu":  # waiting after each operator makes all of them longer
        scales = [step / run.total for run in runs]
    found = [
        Timed(f"step.{kind}", tuple(run.seconds[kind] * scale for run, scale in zip(runs, scales, strict=True)))
        for kind in (KINDS if runs else ())
    ]
    if runs and device.type == "cpu":
        found.append(Timed("step.python", tuple(max(0.0, step - run.total) for run in runs)))
    return found


def codec(model: Model, works: Sequence[Work]) -> tuple[Timed, Timed]:
    """Decoding and encoding one picture, at the largest size that is foreseen to be quick enough."""
    found: dict[str, Timed] = {}
    width, height = model.contract.size
    cells = (width // model.codec.factor) * (height // model.codec.factor)
    with working(model, "codec"), torch.inference_mode():
        for name in ("codec.decode", "codec.encode"):
            for work in works:
                latents = work.noise
                shape = (1, model.codec.pixel_channels, *(side * model.codec.factor for side in latents.shape[2:]))
                pixels = torch.zeros(shape, device=latents.device)

                def act(latents: Tensor = latents, pixels: Tensor = pixels, name: str = name) -> Tensor:
                    return model.codec.decode(latents) if name == "codec.decode" else model.codec.encode(pixels)

                grown = cells / latents[0, 0].numel()
                spent = clock.settled(act, model.device)
                if work is works[-1] or spent * grown > LONGEST:
                    spans = clock.spans(act, model.device) if spent < clock.LONG else (spent,)
                    note = "" if grown == 1 else f"foreseen from {work.settings.width}x{work.settings.height}"
                    found[name] = Timed(name, tuple(each * grown for each in spans), note)
                    break
    return found["codec.decode"], found["codec.encode"]
