"""What would make a step quicker, tried on the network itself: each remedy against what is there, in pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint.adapters.apply import sharing
from mezzotint.doctor import ceiling, clock
from mezzotint.doctor.case import Case
from mezzotint.doctor.clock import Paired, Work
from mezzotint.doctor.finding import Finding, Measure
from mezzotint.doctor.operators import Operators
from mezzotint.families.model import Model

GAIN = 1.15  # a remedy that gives less is not worth a word; equal twins stayed below 1.1 beside two trainings
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
    if "bfloat16" not in model.contract.dtypes.backbone or seen.operators is None or not fits(seen, 0.5):
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


def memory_format(seen: Seen) -> Tried:
    """Convolutions with weights as they lie against the other order of axes."""
    maps = [p for p in seen.model.backbone.parameters() if p.ndim == 4 and max(p.shape[2:]) > 1]
    if seen.share("convolution") < 1 - 1 / GAIN or not maps or not fits(seen, 1.0):
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


def compiled(network: nn.Module) -> bool:
    """Whether a network or a part of it goes through torch.compile."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in network.modules()
    )


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


def fits(seen: Seen, times: float) -> bool:
    """Whether a copy of so many times the network's size leaves half of the free memory."""
    need = times * sum(p.nbytes for p in seen.model.backbone.parameters())
    if seen.device.type == "cuda":
        return need < torch.cuda.mem_get_info(seen.device)[0] / 2
    free = ceiling.memory().available
    return free is None or need < free / 2
