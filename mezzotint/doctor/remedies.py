"""What would make a step quicker, tried on the network itself: each remedy against what is there, in pairs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint.adapters.apply import sharing
from mezzotint.doctor import ceiling, clock
from mezzotint.doctor.case import Case
from mezzotint.doctor.clock import Operators, Paired, Work
from mezzotint.doctor.finding import Finding, Measure
from mezzotint.families.adapt import adapted
from mezzotint.families.model import Model, PartName, working

GAIN = 1.15  # a remedy that gives less is not worth a word; equal twins stayed below 1.1 beside two trainings
THREADS = 1.2  # small networks gain little from threads, and other jobs may want the cores
FORMAT = 1.4  # a number format is slow from here on: float64 was at 1.7 where vectors decide, quick ones are below 1
QUICKER = 1.3  # and another one worth a word
NARROW, SLOW = 16, 0.2  # channels of a head, and the share of the ceiling under which its attention is worth a word


@dataclass(frozen=True, eq=False)
class Seen:
    """A step and what is known of it."""

    case: Case
    work: Work  # at the model's own size
    light: Work  # at a size that can be run often; the same where that is quick
    seconds: float  # of a step
    least: float  # the quickest one
    operators: Operators | None  # of the quickest run by operator; None where the network is compiled
    flops: dict[str, float]
    largest: tuple[int, int]  # channels and side of the commonest convolution

    @property
    def model(self) -> Model:
        return self.work.model

    @property
    def device(self) -> torch.device:
        return self.model.device

    def share(self, kind: str) -> float:
        """Of the step, by kind of layer."""
        if self.operators is None:
            return 0.0
        return self.operators.seconds[kind] / max(self.operators.total, self.least)

    @property
    def place(self) -> str:
        """Where pairs were run, if not at the model's own size."""
        size = self.light.settings
        return "" if self.light is self.work else f" (at {size.width}x{size.height})"


Tried = tuple[list[Finding], list[Measure]]


def measure(name: str, found: Paired, bound: str = "") -> Measure:
    return Measure(name, found.value, found.low, found.high, bound, "times")


def number_format(seen: Seen) -> Tried:
    """The model's number format against float32, by the operations that it spends its time in."""
    model, device = seen.model, str(seen.device)
    name = str(model.dtype).removeprefix("torch.")
    if model.dtype is not torch.float32:
        found = ceiling.times_slower(device, model.dtype, torch.float32, seen.flops, *seen.largest)
        told = [measure("dtype", found, f"below {FORMAT:g}")]
        if not found.beyond(FORMAT):
            return [], told
        says = f"this machine computes {name} {found.value:.1f} times as slowly as float32"
        return [Finding(
            "speed.dtype", "harmful", says, "Load the model in float32.",
            f"mezzotint generate --model {seen.case.path} --dtype float32 --out out", found.value / FORMAT, tuple(told),
        )], told  # fmt: skip
    if "bfloat16" not in model.contract.dtypes.backbone or seen.operators is None or not _fits(seen, 0.5):
        return [], []
    promised = ceiling.times_slower(device, torch.float32, torch.bfloat16, seen.flops, *seen.largest)
    if not promised.beyond(QUICKER):  # single operations promise more than a network keeps
        return [], []
    half = replace(model, backbone=_cast(model.backbone, torch.bfloat16))
    positive, negative = (
        told and told.map(lambda tensor: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
        for told in seen.light.told
    )
    assert positive is not None
    other = replace(seen.light, told=(positive, negative)).by(half)
    found = clock.paired(seen.light.step, other.step, seen.device, bound=QUICKER)  # for a note one look is enough
    if not found.beyond(QUICKER):
        return [], [measure("dtype.bfloat16", found)]
    says = f"in bfloat16, which its contract allows, a step takes {1 / found.value:.2f} of the time{seen.place}"
    return [Finding(
        "speed.dtype", "note", says, "Load the model in bfloat16 where speed counts, and compare the pictures.",
        f"mezzotint generate --model {seen.case.path} --dtype bfloat16 --out out", found.value / QUICKER,
    )], [measure("dtype.bfloat16", found)]  # fmt: skip


def adapters(seen: Seen) -> Tried:
    """Adapters beside the weights against the same merged into copies of them."""
    case = seen.case
    if not case.lora or case.model is case.bare or not _fits(seen, 1.0):
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


def memory_format(seen: Seen) -> Tried:
    """Convolutions with weights as they lie against the other order of axes."""
    maps = [p for p in seen.model.backbone.parameters() if p.ndim == 4 and max(p.shape[2:]) > 1]
    if seen.share("convolution") < 1 - 1 / GAIN or not maps or not _fits(seen, 1.0):
        return [], []
    plain = all(weight.is_contiguous() for weight in maps)
    order = torch.channels_last if plain else torch.contiguous_format
    other = seen.light.by(replace(seen.model, backbone=_ordered(seen.model.backbone, order)))
    found = clock.proven(GAIN, seen.light.step, other.step, seen.device)
    told = [measure("format", found, f"below {GAIN:g}")]
    if not found.beyond(GAIN):
        return [], told
    name = "channels last" if plain else "the usual order"
    says = f"with the convolutions' weights in {name} a step takes {1 / found.value:.2f} of the time{seen.place}"
    do = f"In Python: model.backbone.to(memory_format={order})."
    grade = "note" if plain else "harmful"  # the usual order is nobody's fault, and no option of a verb changes it
    return [Finding("speed.kernel", grade, says, do, "", found.value / GAIN, tuple(told))], told


def attention(seen: Seen) -> Tried:
    """Attention by product, softmax and product against the fused kernel, at the network's own shapes."""
    ops = seen.operators
    if ops is None:
        return [], []
    told: list[Measure] = []
    found: list[Finding] = []
    share, rate = seen.share("attention"), 0.0
    if share > 0:
        rate = seen.flops.get("attention", 0.0) / ops.seconds["attention"]
        told.append(Measure("rate.attention", rate / 1e9, unit="GFLOP/s"))
    if ops.softmaxes and share > 1 - 1 / GAIN:
        batch, rows, width = max((q for q, _ in ops.softmaxes), key=lambda shape: shape[0] * shape[1] ** 2)
        columns = next(k[-1] for q, k in ops.softmaxes if q == (batch, rows, width))
        pair = _attended(batch, rows, columns, width, seen)
        gain = 1 / (1 - share * (1 - 1 / pair.value))
        told += [measure("attention", pair), Measure("attention.gain", gain, bound=f"below {GAIN:g}", unit="times")]
        if pair.beyond(GAIN) and gain >= GAIN:
            off = not torch.backends.cuda.flash_sdp_enabled()
            do = "Let attention use torch.nn.functional.scaled_dot_product_attention."
            if off:
                do = "Switch the fused kernel on again: torch.backends.cuda.enable_flash_sdp(True)."
            says = (
                f"attention by an explicit softmax takes {100 * share:.0f} % of a step and {pair.value:.1f} times as "
                f"long as the fused kernel: without it a step would take {1 / gain:.2f} of the time"
            )
            found.append(Finding("speed.kernel", "harmful", says, do, "", gain / GAIN, tuple(told)))
    width = min((shape[-1] for shape in ops.attended), default=NARROW + 1)
    roof = ceiling.ceiling(str(seen.device), seen.model.dtype, torch.get_num_threads(), *seen.largest)
    if not found and width <= NARROW and share > 1 - 1 / GAIN and rate < SLOW * roof.matrix:
        says = (
            f"attention in heads of {width} channels takes {100 * share:.0f} % of a step at {rate / 1e9:.0f} GFLOP/s, "
            f"{100 * rate / roof.matrix:.0f} % of what matrix products reach"
        )
        do = "Give a network of this kind fewer and wider heads, 40 channels or more, when it is next trained."
        found.append(Finding("speed.kernel", "note", says, do, "", SLOW * roof.matrix / rate))
    return found, told


def _attended(batch: int, rows: int, columns: int, width: int, seen: Seen) -> Paired:
    """The explicit way over the fused one, (batch, rows, width) looking at `columns` places."""
    like = {"device": seen.device, "dtype": seen.model.dtype}
    q, k, v = (torch.randn(1, batch, n, width, **like) for n in (rows, columns, columns))

    def explicit() -> Tensor:
        return ((q @ k.transpose(-1, -2)) * width**-0.5).softmax(-1) @ v

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.inference_mode(), sdpa_kernel(kernels):
        return clock.proven(GAIN, explicit, lambda: F.scaled_dot_product_attention(q, k, v), seen.device)


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


def compiled(network: nn.Module) -> bool:
    """Whether a network or a part of it goes through torch.compile."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in network.modules()
    )


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


def _ordered(network: nn.Module, order: torch.memory_format) -> nn.Module:
    """A twin that shares all but the maps of convolutions, which it has in another order of axes."""
    twin = sharing(network)
    for module in twin.modules():
        for name, value in module._parameters.items():
            if value is not None and value.ndim == 4:
                module._parameters[name] = nn.Parameter(value.detach().contiguous(memory_format=order), False)
    return twin


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A twin with floating-point tensors of its own in another number format."""
    twin = sharing(network)
    for module in twin.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None and value.is_floating_point():
                    other: Any = value.detach().to(dtype)
                    table[name] = nn.Parameter(other, False) if isinstance(value, nn.Parameter) else other
    return twin


def _fits(seen: Seen, times: float) -> bool:
    """Whether a copy of so many times the network's size leaves half of the free memory."""
    need = times * sum(p.nbytes for p in seen.model.backbone.parameters())
    if seen.device.type == "cuda":
        return need < torch.cuda.mem_get_info(seen.device)[0] / 2
    free = ceiling.memory().available
    return free is None or need < free / 2
