"""The probability flow of a model, walked finely: what all deterministic samplers approximate.

Not one of `SAMPLERS`' own paths, which start, end and tell the time in ways of their own: this one visits exact levels,
fractional timesteps included, from the noisiest that the model was trained at to the least noisy, and jumps from there
to the clean estimate. Levels are even in atan((sigma / alpha)^(1 / rho)): close together where the picture takes shape,
not too far apart at either end. Steps are UniPC's (Zhao 2023), the sampler of the highest order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL.Image import Image
from torch import Tensor

from mezzotint import images
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.families.adapt import ruled
from mezzotint.families.model import working
from mezzotint.families.settings import Settings, settle, shared
from mezzotint.families.steering import steering
from mezzotint.generate import canvas, denoiser, entrance, equipped, pinned, sights, spread, start_noise
from mezzotint.process import CLEAN, Level, Process, RectifiedFlow
from mezzotint.process.level import from_ratio
from mezzotint.process.schedules import LARGEST_RATIO
from mezzotint.request import Request
from mezzotint.sampling import Path, UniPC, sample, seeded_noise
from mezzotint.sampling.spacing import LOWEST, paired, timestep_of

SOLVER = UniPC()
RHO = 3.0  # 1 leaves too few levels near clean and noise: four times the error at 100 steps on the starter model


def level(process: Process, ratio: float) -> Level[float]:
    """The level at sigma / alpha = ratio with the exact time that the network was trained to be told there."""
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        s = ratio / (1.0 + ratio)
        return Level(schedule.clock * s, 1.0 - s, s)
    return from_ratio(schedule.tick * timestep_of(schedule, ratio), ratio)


def ends(process: Process) -> tuple[float, float]:
    """sigma / alpha of the noisiest and the least noisy level that the model was trained at."""
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        return LARGEST_RATIO, LOWEST / (1.0 - LOWEST)
    return schedule.ratios()[-1], schedule.ratios()[0]


def fine_path(process: Process, steps: int, start: float | None = None) -> Path:
    """A path of `steps` steps, the last one from the least noisy level to the clean estimate; unit noise starts it.

    `start` is the sigma / alpha at which a picture enters.
    """
    high, low = ends(process)
    top, bottom = (math.atan(ratio ** (1 / RHO)) for ratio in (min(high, start or high), low))
    angles = [top + (bottom - top) * i / (steps - 1) for i in range(steps)]
    walk = paired([level(process, math.tan(angle) ** RHO) for angle in angles], CLEAN)
    return Path(tuple(replace(s, order=min(SOLVER.solver_order, steps - i)) for i, s in enumerate(walk)))


def fine_settings(model: Model, requests: Sequence[Request], steps: int) -> Settings:
    """What the requests ask for, but for the way: the fine path, guided on all of it."""
    asked = [replace(request, sampler="unipc", steps=steps, guidance_interval=(0.0, 1.0)) for request in requests]
    facts = model.contract.sampling.model_copy(update={"spacing": "linspace", "offset": 0})
    whole = replace(model, contract=model.contract.model_copy(update={"sampling": facts}))
    settings = shared([settle(whole, request) for request in asked])
    start = None
    if settings.first:  # a picture enters on the way
        now = settings.path.steps[0].now
        start = now.sigma / now.alpha
    return replace(settings, sampler=SOLVER, path=fine_path(model.process, steps, start), first=0)


@torch.inference_mode()
def walked(model: Model, requests: Sequence[Request], steps: int) -> tuple[Tensor, list[Image]]:
    """Latents (B, C, h, w) and pictures of the requests at the end of a fine path; clean estimates are not clipped.

    InputError where a request does not fit the model, and where the result is not finite.
    """
    model = ruled(model, requests[0].lora)
    settings = fine_settings(model, requests, steps)
    model = equipped(model, requests[0])
    counts = [request.count for request in requests]
    pixels, mask = canvas(model, requests, settings)
    draws = [seeded_noise([request.seed + i for i in range(request.count)]) for request in requests]
    noise = start_noise(model, requests, settings, draws)  # (B, C, h, w)
    positive, negative = steering(model, requests, settings.guidance.scale, (settings.width, settings.height))
    seen = sights(model, requests, settings, pixels, mask)
    positive, negative = replace(positive, **seen), replace(negative, **seen) if negative else None
    x, pin = noise, None
    if settings.strength is not None:
        with working(model, "codec"):
            known = spread(model.codec.encode(pixels), counts)
        x = entrance(model, settings, known, noise)
        if settings.masked and model.contract.inpaint is None:
            pin = pinned(model, known, noise, spread(mask, counts))
    with working(model, "backbone"):
        denoise = denoiser(model, settings, positive, negative)
        latents = sample(denoise, x, settings.path, SOLVER, torch.zeros_like, pin)
    with working(model, "codec"):
        drawn = model.codec.decode(latents)
    if not (latents.isfinite().all() and drawn.isfinite().all()):
        raise InputError("the reference gave numbers that are not finite: use --dtype float32, or other weights")
    if settings.masked:
        drawn = torch.where(spread(mask, counts) > 0, drawn, spread(pixels, counts))
    return latents, images.to_images(drawn)


def evaluations(model: Model, request: Request, steps: int) -> int:
    """How often the network sees an image on a fine path."""
    guided = settle(model, request).guidance.scale != 1.0 and not ruled(model, request.lora).contract.guidance.distilled
    return steps * (2 if guided else 1)
