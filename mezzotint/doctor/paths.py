"""Where paths end: latents from the same noise along the contract's path and along one that has converged."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from mezzotint.doctor.case import Case
from mezzotint.doctor.statistics import Mean, mean
from mezzotint.families import Model
from mezzotint.process import Discrete, RectifiedFlow
from mezzotint.sampling import LCM, SAMPLERS

PICTURES = 6
REFERENCE, CONVERGED = "dpmpp_2m", 60  # sampler and steps that stand for the end of the path


def paths(case: Case) -> tuple[Tensor, Tensor]:
    """Latents from the same noise along the path that has converged and along the contract's own."""

    def run() -> tuple[Tensor, Tensor]:
        steps, guidance = converged(case.model), case.model.contract.guidance.scale
        ends = case.draw(trailing(case.model), PICTURES, sampler=REFERENCE, steps=steps, guidance=guidance)
        return ends.latents, case.draw(case.model, PICTURES).latents

    return case.once("paths", run)


def converged(model: Model) -> int:
    """Steps of the reference path, as many as the schedule can place."""
    schedule = model.process.schedule
    most = schedule.timesteps // 2 if isinstance(schedule, Discrete) else CONVERGED
    return max(2, min(CONVERGED, most, max(40, 2 * model.contract.sampling.steps)))


def noisy(name: str) -> bool:
    """Whether a sampler draws fresh noise on its way, so that the same start does not lead to the same picture."""
    sampler = SAMPLERS[name]
    return name == "ddpm" or isinstance(sampler, LCM) or getattr(sampler, "eta", 0.0) > 0


def apart(mine: Tensor, ends: Tensor) -> Mean:
    """Distance from the converged latents, of their deviation, over pictures."""
    centre = ends.mean((0, 2, 3), keepdim=True)
    size = (ends - centre).square().mean().sqrt()
    return mean(((mine - ends) ** 2).flatten(1).mean(1).sqrt() / size)


def roughness(mine: Tensor, ends: Tensor) -> float:
    """Root mean square difference of log10 power by radial frequency, (C, bands)."""
    return float((spectrum(mine) - spectrum(ends)).square().mean().sqrt())


def spectrum(latents: Tensor, bands: int = 4) -> Tensor:
    """(C, bands) log10 of the mean power by radial frequency, without the mean."""
    height, width = latents.shape[-2:]
    power = torch.fft.fft2(latents - latents.mean((2, 3), keepdim=True)).abs().square().mean(0)  # (C, h, w)
    radius = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None] ** 2).sqrt()
    edges = torch.linspace(0, 0.5, bands + 1)
    rows = [power[:, (radius > a) & (radius <= b)].mean(1) for a, b in pairwise(edges.tolist())]
    return torch.stack(rows, 1).clamp(min=1e-12).log10()


def trailing(model: Model) -> Model:
    """The model with a path that starts at the last timestep, as flows always do."""
    if isinstance(model.process.schedule, RectifiedFlow):
        return model
    sampling = model.contract.sampling.model_copy(update={"spacing": "trailing", "offset": 0})
    return replace(model, contract=model.contract.model_copy(update={"sampling": sampling}))


def shifted(model: Model, shift: float) -> Model:
    """The model with another shift of its path."""
    schedule = model.process.schedule
    assert isinstance(schedule, RectifiedFlow)
    process = replace(model.process, schedule=replace(schedule, shift=shift))
    return replace(model, contract=model.contract.model_copy(update={"process": process}))
