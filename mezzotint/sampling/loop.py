"""The one sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mezzotint.process import CLEAN, Estimate, Level
from mezzotint.sampling.path import MEMORY, Denoise, Moment, Path, Rng, Sampler, Step

Pin = Callable[[Tensor, Level[float]], Tensor]
Watch = Callable[[int, Step, Tensor, list[Moment]], None]


def sample(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    sampler: Sampler,
    rng: Rng,
    pin: Pin | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Walk x along the path, float32.

    x (B, ...) is unit noise where the path starts at index 0, else an image noised to `path.steps[0].now`. `pin(x,
    level)` may replace what must stay known (inpainting): after each step, as the next one will see it and clean at
    the end, and where a step looks ahead (Heun). `watch(index, step, x, history)` sees each step, history[-1].clean its
    estimate.
    """
    history: list[Moment] = []
    x = x.float() * path.start_scale
    arrivals = [*(step.now for step in path.steps[1:]), CLEAN]
    for index, step in enumerate(path.steps):
        x = sampler.step(_pinned(denoise, pin, step) if pin else denoise, x, step, history, rng)
        x = pin(x, arrivals[index]) if pin else x
        if watch:
            watch(index, step, x, history)
        del history[:-MEMORY]
    return x


def _pinned(denoise: Denoise, pin: Pin, step: Step) -> Denoise:
    def ahead(x: Tensor, level: Level[float]) -> Estimate:
        return denoise(x if level is step.now else pin(x, level), level)

    return ahead


def seeded_noise(seeds: Sequence[int]) -> Rng:
    """Standard normal noise, one generator per image, drawn on the CPU: an image's noise depends on its seed alone."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(like: Tensor) -> Tensor:
        if len(like) != len(generators):
            raise ValueError(f"{len(generators)} seeds cannot serve a batch of {len(like)}")
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like)

    return draw
