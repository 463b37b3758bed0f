"""What costs time beside the arithmetic: adapters, threads, hooks, text, training mode, moves, compilation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mezzotint.doctor import ceiling, clock
from mezzotint.doctor.clock import Paired, Work
from mezzotint.doctor.finding import Finding, Measure
from mezzotint.doctor.remedies import GAIN, Seen, Tried, compiled, fits, measure
from mezzotint.families.adapt import adapted
from mezzotint.families.model import PartName, working

THREADS = 1.1  # small networks gain little from threads, and other jobs may want the cores


def adapters(seen: Seen) -> Tried:
    """Adapters beside the weights against the same merged into copies of them."""
    case = seen.case
    if not case.lora or case.model is case.bare or not fits(seen, 1.0):
        return [], []
    merged = adapted(case.bare, case.lora, merged=True)
    with working(merged, "backbone"):
        found = clock.proven(GAIN, seen.light.step, seen.light.by(merged).step, seen.device)
    told = [measure("adapters", found, f"below {GAIN:g}")]
    if not found.beyond(GAIN):
        return [], told
    says = f"with adapters beside the weights a step takes {found.value:.2f} times as long as merged{seen.place}"
    do = "Merge them into copies of the weights: mezzotint.families.adapt.adapted(model, lora, merged=True)."
    return [Finding("speed.adapters", "harmful", says, do, "", found.value / GAIN, tuple(told))], told


def threads(seen: Seen) -> Tried:
    """As many threads as are set against as many as there are cores."""
    now, most = torch.get_num_threads(), ceiling.cores()
    told = [Measure("threads", now, bound=f"{most} cores")]
    if seen.device.type != "cpu" or now >= most:
        return [], told
    step, sides = seen.light.step, (lambda: _threads(now), lambda: _threads(most))
    try:
        # beside other jobs threads wait for each other at every operator: a single product shows it, and is soon over
        product = ceiling.product(str(seen.device), seen.model.dtype)
        found = clock.paired(product, product, seen.device, sides, THREADS)
        if found.beyond(THREADS):
            found = clock.proven(THREADS, step, step, seen.device, sides)
    finally:
        torch.set_num_threads(now)
    told.append(measure("threads.gain", found, f"below {THREADS:g}"))
    if not found.beyond(THREADS):
        return [], told
    says = f"{now} of {most} cores at work: with {most} threads a step takes {1 / found.value:.2f} of the time"
    do = f"Let torch use {most} threads: set OMP_NUM_THREADS, or torch.set_num_threads({most}) in Python."
    command = f"OMP_NUM_THREADS={most} mezzotint generate --model {seen.case.path} --out out"
    return [Finding("speed.threads", "harmful", says + seen.place, do, command, found.value / THREADS)], told


def hooks(seen: Seen) -> Tried:
    """Time in hooks that were left on modules: of the same steps, with it and without."""
    spent: list[float] = []
    count = 0
    with contextlib.ExitStack() as undone:
        for module in seen.model.backbone.modules():
            for table in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(table.items()):
                    count += 1
                    table[key] = _timed(hook, spent)
                    undone.callback(table.__setitem__, key, hook)
        if not count:
            return [], []
        found = _within(seen, spent)
    told = [measure("hooks", found, f"below {GAIN:g}")]
    if not found.beyond(GAIN):
        return [], told
    says = f"{count} hooks on modules make a step {found.value:.2f} times as long{seen.place}"
    do = "Remove the hooks that were left on the network: keep what register_forward_hook returns, and call remove()."
    return [Finding("speed.python", "harmful", says, do, "", found.value / GAIN, tuple(told))], told


def text_within(seen: Seen) -> Tried:
    """Time of the text encoder inside a step, where it has nothing to do."""
    spent: list[float] = []
    depth: list[float] = []

    def enter(module: nn.Module, given: Any) -> None:
        depth.append(time.perf_counter())

    def leave(module: nn.Module, given: Any, out: Any) -> None:
        start = depth.pop()
        if not depth:
            spent.append(time.perf_counter() - start)

    with contextlib.ExitStack() as undone:
        for network in seen.model.networks("text").values():
            for module in network.modules():
                undone.callback(module.register_forward_pre_hook(enter).remove)
                undone.callback(module.register_forward_hook(leave).remove)
        seen.light.step()
        if not spent:
            return [], []
        found = _within(seen, spent)
    if not found.beyond(GAIN):
        return [], [measure("text.within", found)]
    says = f"the text encoder runs inside every step, which makes it {found.value:.2f} times as long{seen.place}"
    do = "Encode a prompt once and hand its conditioning to all steps, as mezzotint.generate does."
    return [Finding("speed.text", "harmful", says, do, "", found.value / GAIN)], [measure("text.within", found)]


def untidy(seen: Seen) -> Tried:
    """A network left in training against the same ready to draw; parameters that ask for gradients count where the
    caller records them."""
    network = seen.model.backbone
    training = sum(module.training for module in network.modules())
    asking = [p for p in network.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    if not training and not asking:
        return [], []
    states = [(module, module.training) for module in network.modules()]
    work = seen.light
    level = work.settings.path.steps[len(work.settings.path.steps) // 2].now

    @contextlib.contextmanager
    def tidied() -> Iterator[None]:
        network.eval()
        for parameter in asking:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for module, state in states:
                module.training = state
            for parameter in asking:
                parameter.requires_grad_(True)

    def as_left() -> object:
        return work.denoise(work.noise, level) if asking else work.step()

    found = clock.proven(GAIN, as_left, work.step, seen.device, (contextlib.nullcontext, tidied))
    told = [measure("untidy", found, f"below {GAIN:g}")]
    what = [f"{training} modules in training mode"] * bool(training)
    what += [f"{len(asking)} parameters that ask for gradients"] * bool(asking)
    slow = found.beyond(GAIN)
    if not slow and not training:
        return [], told
    says = f"the network has {' and '.join(what)}: a step takes {found.value:.2f} times as long{seen.place}"
    do = "Make it ready to draw: model.backbone.eval().requires_grad_(False), and draw under torch.inference_mode()."
    return [Finding("speed.python", "harmful" if slow else "note", says, do, "", max(1.0, found.value / GAIN))], told


def offload(seen: Seen, request: float) -> Tried:
    """A part's first run after it came to the device against its next one: what moving costs a request of so many
    seconds."""
    model = seen.model
    if model.works_on is None or seen.seconds > clock.LONG:
        return [], []
    cold: dict[PartName, list[float]] = {"backbone": [], "codec": []}
    latents = seen.work.noise.to(model.device)

    def act(part: PartName) -> object:
        with torch.inference_mode():
            return seen.work.step() if part == "backbone" else model.codec.decode(latents)

    for _ in range(5):
        for part, extra in cold.items():
            start = time.perf_counter()
            with working(model, part):
                clock.settled(lambda part=part: act(part), seen.device)
                middle = time.perf_counter()
                warm = clock.settled(lambda part=part: act(part), seen.device)
                end = time.perf_counter()
            extra.append(middle - start + (time.perf_counter() - end) - warm)
    ratios = tuple(1 + max(0.0, sum(moved)) / request for moved in zip(*cold.values(), strict=True))
    found = Paired(ratios)
    told = [measure("offload", found, f"below {GAIN:g}")]
    if not found.beyond(GAIN):
        return [], told
    share = 100 * (1 - 1 / found.value)
    says = f"parts move at every use: {share:.0f} % of the time of a request goes into that"
    do = "Load the model without offload where the device has the memory, or draw more images at once."
    command = f"mezzotint generate --model {seen.case.path} --device {model.device} --count 8 --out out"
    return [Finding("speed.offload", "harmful", says, do, command, found.value / GAIN, tuple(told))], told


def recompiled(seen: Seen, other: Work | None) -> Tried:
    """Compilations while a compiled network works at two sizes by turns."""
    if not compiled(seen.model.backbone) or other is None:
        return [], []
    from torch._dynamo.utils import counters

    counts: list[int] = []
    for work in (seen.work, other, seen.work, other, seen.work):
        before = counters["stats"]["unique_graphs"]
        work.step()
        counts.append(counters["stats"]["unique_graphs"] - before)
    first, again = sum(counts[:2]), sum(counts[2:])
    told = [Measure("compiled.first", first), Measure("compiled.again", again, bound="0")]
    if not again:
        return [], told
    says = f"the network was compiled {again} times again for two sizes that it had seen"
    do = "Compile it with dynamic=True, and attach adapters before compiling."
    return [Finding("speed.recompiled", "harmful", says, do, "", float(1 + again), tuple(told))], told


def _within(seen: Seen, spent: list[float]) -> Paired:
    """Steps over what is left of them without the time that they add to `spent`."""
    ratios: list[float] = []
    seen.light.step()
    for _ in range(5):
        spent.clear()
        whole = clock.settled(seen.light.step, seen.device)
        ratios.append(whole / max(whole - sum(spent), 1e-6))
    return Paired(tuple(ratios))


def _timed(hook: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(*given, **named)
        finally:
            spent.append(time.perf_counter() - start)

    return timed


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    yield
