"""A sampler made to fit a model: where its steps fall and end, and how far its estimates may reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from mezzotint.process import Estimate, Level, prediction
from mezzotint.sampling.ddim import DDIM
from mezzotint.sampling.ddpm import DDPM
from mezzotint.sampling.dpmpp_2m import DPMpp2M
from mezzotint.sampling.euler import Euler, FlowEuler
from mezzotint.sampling.heun import Heun
from mezzotint.sampling.lcm import LCM
from mezzotint.sampling.path import Denoise, Sampler
from mezzotint.sampling.unipc import UniPC

Rule = Literal["leading", "linspace", "trailing"]


def fresh(sampler: Sampler) -> bool:
    """Whether noise is drawn on the way, so that the end does not follow from the start alone."""
    return isinstance(sampler, DDPM | LCM) or getattr(sampler, "eta", 0.0) > 0.0


def fitted(
    sampler: Sampler,
    spacing: Rule | None = None,
    offset: int = 0,
    last: Literal["clean", "lowest"] | None = None,
    variance: Literal["small", "large"] | None = None,
) -> Sampler:
    """The sampler under a model's own facts; None leaves the sampler's own choice, and what it lacks is ignored.

    `spacing` and `offset` replace the rule and keep the ramp (karras); LCM keeps the timesteps it was distilled on.
    `last` is DDIM's alone, as it is for a published file that says set_alpha_to_one; the others end clean or are told
    otherwise by their own options. `variance` is DDPM's.
    """
    if isinstance(sampler, DDPM | DDIM | Euler | FlowEuler | Heun | DPMpp2M | UniPC):
        now = sampler.spacing
        sampler = replace(sampler, spacing=replace(now, rule=spacing or now.rule, offset=offset))
    if isinstance(sampler, DDIM) and last is not None:
        sampler = replace(sampler, last=last)
    if isinstance(sampler, DDPM) and variance is not None:
        sampler = replace(sampler, variance=variance)
    return sampler


def bounded(denoise: Denoise, sampler: Sampler, bound: float | Literal["default"] | None) -> Denoise:
    """The denoiser with clean estimates kept within +-bound, for the samplers that do so; None: as it is.

    DDPM and Heun let the noise follow from the kept clean, DDIM and LCM keep the noise as predicted. Euler,
    DPM-Solver++ and UniPC do not clip: the reference does not either. `default`, for files that say nothing, is what
    the reference's own samplers do then: DDPM and DDIM clip at 1.
    """
    if bound == "default":
        bound = 1.0 if isinstance(sampler, DDPM | DDIM) else None
    if bound is None or not isinstance(sampler, DDPM | DDIM | Heun | LCM):
        return denoise
    follows = isinstance(sampler, DDPM | Heun)

    def within(x: Tensor, level: Level[float]) -> Estimate:
        return prediction.clipped(denoise(x, level), bound, x, level, follows)

    return within
