"""What a linear filter makes of the user's images: all that a spectrum knows, and the least that training must add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.doctor import readings
from mezzotint.doctor.case import Case
from mezzotint.process import Level


def log_error(case: Case, clean: Tensor, ratios: Sequence[float]) -> Tensor:
    """(N, K) logarithm of its error against the scalar filter's on latents (N, C, h, w), at ratios of noise."""
    deviation = float(clean.std())
    levels = [readings.level_at(case.model.process.schedule, ratio * deviation) for ratio in ratios]
    columns = [(linear_error(clean, case.noise, x) / readings.scalar_error(clean, x)).log() for x in levels]
    return torch.stack(columns, dim=1)


def linear_error(clean: Tensor, noise: Tensor, level: Level[float]) -> Tensor:
    """(N,) error of the best filter that is linear and the same everywhere, made of the other images each time.

    Around their mean image the spectrum S of theirs gives the gain alpha S / (alpha^2 S + sigma^2) (Wiener 1949).
    """
    found: list[Tensor] = []
    for i in range(len(clean)):
        others = torch.cat([clean[:i], clean[i + 1 :]]) if len(clean) > 1 else clean
        centre = others.mean(0)  # (C, h, w)
        spectrum = torch.fft.fft2(others - centre, norm="ortho").abs().square().sum(0) / max(len(others) - 1, 1)
        gain = level.alpha * spectrum / (level.alpha**2 * spectrum + level.sigma**2)
        x = level.alpha * (clean[i] - centre) + level.sigma * noise[i]
        estimate = torch.fft.ifft2(gain * torch.fft.fft2(x)).real
        found.append((estimate - (clean[i] - centre)).square().mean())
    return torch.stack(found)
