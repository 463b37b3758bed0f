"""A model whose score is known: pixels that are each N(mean, spread^2), so that every path has a closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from parts import model, pixel_codec
from torch import Tensor, nn

from mezzotint.contract import SamplingFacts
from mezzotint.evaluate.sweep.setting import Setting, Target
from mezzotint.evaluate.sweep.subject import Subject
from mezzotint.families import Model
from mezzotint.process import Prediction, Process, RectifiedFlow, schedules
from mezzotint.process.level import from_ratio
from mezzotint.request import Request

MEAN, SPREAD, SIDE = 0.1, 0.6, 16
VP = Process(schedules.scaled_linear(), Prediction.EPSILON)
FLOW = Process(schedules.rectified_flow(low_end="even"), Prediction.FLOW)


class Gaussian(nn.Module):
    """The exact network for independent pixels N(MEAN, SPREAD^2): what it predicts follows from the time alone."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.config, self.calls = process, SimpleNamespace(), 0
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, conditioning: object) -> Tensor:
        self.calls += 1
        schedule = self.process.schedule
        now = schedule.level(float(t[0]))
        variance = (now.alpha * SPREAD) ** 2 + now.sigma**2
        rest = (x.double() - now.alpha * MEAN) / variance
        clean, noise = MEAN + now.alpha * SPREAD**2 * rest, now.sigma * rest
        raw = {
            Prediction.EPSILON: noise,
            Prediction.VELOCITY: now.alpha * noise - now.sigma * clean,
            Prediction.FLOW: noise - clean,
        }
        return raw[self.process.prediction].float()


def end(process: Process, noise: Tensor) -> Tensor:
    """Where the flow takes unit noise at the noisiest level: kept in deviations, then the last jump to clean."""
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        first, last = schedule.level(1000.0 * (1 - 1e-7)), schedule.level(1.0)
    else:
        first, last = from_ratio(999.0, schedule.ratios()[-1]), from_ratio(0.0, schedule.ratios()[0])
    z = (noise.double() - first.alpha * MEAN) / math.hypot(first.alpha * SPREAD, first.sigma)
    width = math.hypot(last.alpha * SPREAD, last.sigma)
    return MEAN + last.alpha * SPREAD**2 / width * z  # E(clean | x) at the last level


def gaussian(process: Process = VP, **facts: Any) -> Model:
    facts.setdefault("sampling", SamplingFacts(sampler="ddim", steps=10))
    return model(Gaussian(process), pixel_codec(1), process=process, size=(SIDE, SIDE), **facts)


def subject(process: Process = VP, count: int = 4, batch: int = 2, **facts: Any) -> Subject:
    return Subject({"float32": gaussian(process, **facts)}, tuple(Request(seed=i) for i in range(count)), batch)


def setting(sampler: str, steps: int, guidance: float = 1.0, **more: Any) -> Setting:
    return Setting(sampler, steps, Target(guidance), **more)


def noise_of(count: int) -> Tensor:
    rows = [torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return torch.stack(rows)
