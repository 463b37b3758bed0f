"""A plan: what runs one after the other, which weights are there while it does, and what each of it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mezzotint.plan.machines import Machine
from mezzotint.plan.trace import Traced

Sum = tuple[tuple[str, float], ...]  # what adds up to a figure: name, bytes


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of work: a run of it is traced, and it happens `times` over."""

    name: str  # text, denoise, decode, encode, step
    traced: Traced
    times: float
    resident: Sum  # weights and what else stays on the device meanwhile, by part
    extra: Sum = ()  # beside activations while it runs: a dequantised matrix, inputs
    said: str = ""  # what a run is: "one call of the network for 2 images"

    @property
    def flops(self) -> float:
        """Of all its runs."""
        return self.traced.flops * self.times

    @property
    def memory(self) -> float:
        """The most bytes on the device while it runs."""
        return sum(size for _, size in (*self.resident, *self.extra)) + self.traced.peak

    @property
    def parts(self) -> dict[str, float]:
        """The same by part, as it adds up."""
        found = dict(self.resident)
        for name, size in (*self.extra, *self.traced.at_peak.items()):
            found[name] = found.get(name, 0.0) + size
        return found

    def seconds(self, machine: Machine) -> float | None:
        """Of all its runs, on a machine; None where its speed is not known."""
        once = machine.seconds(self.traced.calls)
        return None if once is None else once * self.times


@dataclass(frozen=True)
class Plan:
    """Everything that a job costs."""

    what: str  # generate, or a training method
    model: str
    title: str
    licence: str
    settings: Mapping[str, Any]
    parameters: Mapping[str, int]
    trained: int  # parameters that move; 0 when generating
    phases: tuple[Phase, ...]
    machine: Machine
    images: int  # that come out, or that the phases before training read
    host: float  # bytes of weights that rest off the device
    notes: tuple[str, ...] = ()
    files: Mapping[str, float] = field(default_factory=dict[str, float])  # bytes on disk, by what is written

    @property
    def peak(self) -> float:
        """The most bytes on the device at any time."""
        return self.machine.base + max(phase.memory for phase in self.phases)

    @property
    def at(self) -> Phase:
        """The phase that decides it."""
        return max(self.phases, key=lambda phase: phase.memory)

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole job, a multiplication and an addition being two."""
        return sum(phase.flops for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Of the whole job, without loading; None where the machine's speed is not known."""
        spans = [phase.seconds(self.machine) for phase in self.phases]
        return None if None in spans else sum(span for span in spans if span is not None)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the machine's memory; None where that is not known."""
        return None if self.machine.memory is None else self.peak <= self.machine.memory

    def cost(self, price: float) -> float | None:
        """Money, at so much an hour."""
        return None if self.seconds is None else price * self.seconds / 3600
