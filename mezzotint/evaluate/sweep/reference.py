"""Where the model leads: its probability flow's own end from the same noise, made finer until it no longer moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.evaluate.sweep.ode import evaluations, walked
from mezzotint.evaluate.sweep.setting import Target
from mezzotint.evaluate.sweep.subject import Subject

STEPS = (50, 100, 200, 400, 800)  # of the paths tried, each twice as fine as the one before
USUAL = 200  # where most models have converged, for an estimate of the time
CONVERGED = 0.01  # change by the last doubling, of the pictures' deviation, from which a path counts as converged
Watch = Callable[[int, float | None, float], None]  # steps of the path, change by the last doubling, evaluations done


@dataclass(frozen=True, eq=False)
class Reference:
    """The converged images of all wishes for one target; errors below `gap` may be the reference's own."""

    target: Target
    latents: Tensor  # (N, C, h, w), on the CPU
    pictures: list[Image]
    steps: int
    gap: float  # mean change of an image by the last doubling, of the pictures' deviation

    @property
    def converged(self) -> bool:
        return self.gap <= CONVERGED

    def errors(self, latents: Tensor, start: int) -> list[float]:
        """The error of each image of a batch whose first image is number `start` of all."""
        return apart(latents.cpu(), self.latents[start : start + len(latents)], deviation(self.latents)).tolist()


def deviation(latents: Tensor) -> float:
    """Root mean square of latents about the mean of each channel: how much pictures differ from none."""
    return float((latents - latents.mean((0, 2, 3), keepdim=True)).square().mean().sqrt())


def apart(mine: Tensor, ends: Tensor, size: float) -> Tensor:
    """(B,) root mean square differences of latents (B, C, h, w), in units of `size`."""
    return (mine - ends).square().flatten(1).mean(1).sqrt() / size


def pixel_error(mine: Image, other: Image) -> float:
    """Root mean square difference of two pictures in grey levels of 255."""
    a, b = (np.asarray(picture, dtype=np.float64) for picture in (mine, other))
    difference: NDArray[np.float64] = a - b
    return float(np.sqrt((difference**2).mean()))


def converge(subject: Subject, target: Target, watch: Watch | None = None) -> Reference:
    """Draw all wishes along finer and finer paths; the last one drawn is the reference, converged or not.

    InputError where the model follows no ODE.
    """
    if not subject.follows_ode:
        raise InputError("a model distilled to few steps follows no ODE: there is no converged image")
    model, before = subject.models[subject.precise], None
    latents, pictures, steps, gap = torch.empty(0), list[Image](), 0, math.inf
    for steps in STEPS:
        parts: list[Tensor] = []
        pictures = []
        for index in range(subject.rounds):
            asked = [target.request(wish) for wish in subject.round(index)]
            ends, drawn = walked(model, asked, steps)
            parts.append(ends.cpu().float())
            pictures += drawn
            if watch is not None:
                done = evaluations(model, asked[0], steps) * len(asked)
                watch(steps, gap if math.isfinite(gap) else None, done)
        latents = torch.cat(parts)
        if before is not None:
            gap = float(apart(latents, before, deviation(latents)).mean())
            if gap <= CONVERGED:
                break
        before = latents
    return Reference(target, latents, pictures, steps, gap)


def cost(subject: Subject, target: Target, most: int = USUAL) -> int:
    """Evaluations an image of all paths up to `most` steps."""
    model, wish = subject.models[subject.precise], target.request(subject.wishes[0])
    return sum(evaluations(model, wish, steps) for steps in STEPS if steps <= most)
