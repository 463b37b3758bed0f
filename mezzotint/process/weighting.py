"""Which levels a training step visits and how much each one counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process.level import Level
from mezzotint.process.prediction import Prediction
from mezzotint.process.process import Process
from mezzotint.process.schedules import RectifiedFlow

Density = Literal["uniform", "logit_normal"]


def draw_times(
    process: Process,
    count: int,
    generator: torch.Generator | None = None,
    density: Density = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float | None = None,
) -> Tensor:
    """Times (count,) on the network's clock: whole timesteps for tables; for flows float32, bent by a shift.

    `shift`, which tables do not have, is the schedule's static one unless it is given (`resolution_shift`).
    logit_normal: u = sigmoid(mean + std z), z standard normal (Esser 2024, eq. 19); a larger mean visits more noise.
    """
    if density == "uniform":
        u = torch.rand(count, generator=generator)
    elif density == "logit_normal":
        u = torch.sigmoid(mean + std * torch.randn(count, generator=generator))
    else:
        raise InputError(f"unknown density '{density}': use 'uniform' or 'logit_normal'")
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        shift = schedule.shift if shift is None else shift
        return schedule.clock * (shift * u / (1.0 + (shift - 1.0) * u))
    if shift is not None:
        raise InputError(f"a shift bends the times of a flow, and this schedule is {schedule.name}: leave it out")
    return (u * schedule.timesteps).long().clamp(max=schedule.timesteps - 1)


def resolution_shift(process: Process, tokens: int, usual: int, steps: int) -> float:
    """The shift for images of `tokens` tokens where the schedule's own is meant for `usual` tokens.

    Esser 2024, eq. 23: shift sqrt(tokens / usual), so that an image is as destroyed at a time whatever its size; where
    the schedule has a rule of its own (FLUX's mu), that rule at `steps` steps.
    """
    schedule = process.schedule
    if not isinstance(schedule, RectifiedFlow):
        raise InputError(f"a shift bends the times of a flow, and this schedule is {schedule.name}: leave it out")
    if schedule.mu != "none":
        return schedule.shift_for(steps, tokens)
    return schedule.shift * (tokens / usual) ** 0.5


def uniform(process: Process, level: Level[Tensor], gamma: float = 5.0) -> Tensor:
    """Every level counts the same on the network's own objective."""
    return torch.ones_like(level.sigma).flatten()


def min_snr(process: Process, level: Level[Tensor], gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the clean image (Hang 2023, eq. 9), carried over to the objective in force.

    An error d of the raw output is an error |d clean / d raw| d of the image, which is sigma / alpha for epsilon, 1 for
    clean and sigma for velocity and flow; so epsilon min(SNR, g) / SNR, velocity min(SNR, g) / (SNR + 1), flow min(SNR,
    g) sigma^2. The SNR is read from the level, so it follows a rescaled schedule.
    """
    alpha, sigma = level.alpha.flatten(), level.sigma.flatten()
    snr = (alpha / sigma) ** 2
    capped = snr.clamp(max=gamma)
    match process.prediction:
        case Prediction.EPSILON:
            return capped / snr
        case Prediction.CLEAN:
            return capped
        case Prediction.VELOCITY | Prediction.FLOW:
            return capped * sigma**2


Weighting = Callable[[Process, Level[Tensor], float], Tensor]
WEIGHTINGS: dict[str, Weighting] = {"uniform": uniform, "min_snr": min_snr}


def weights(process: Process, level: Level[Tensor], name: str = "uniform", gamma: float = 5.0) -> Tensor:
    """Loss weights (B,) of a batch of levels under the weighting `name`; gamma is min-SNR's cap."""
    if name not in WEIGHTINGS:
        raise InputError(f"unknown weighting '{name}': use {' or '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name](process, level, gamma)
