"""The reference library's schedulers run beside ours: one fake network, one noise, two roads to the image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import diffusers
import torch
from torch import Tensor

from mezzotint.process import Estimate, Level, Prediction, Process, RectifiedFlow, prediction, schedules
from mezzotint.process.level import from_ratio
from mezzotint.process.schedules import LARGEST_RATIO
from mezzotint.sampling import SAMPLERS, Rng, Sampler, Spacing, bounded, sample

Network = Callable[[Tensor, float], Tensor]

STEPS = (1, 2, 4, 7, 20, 50)
SHAPE = (2, 3, 2, 2)

OBJECTIVES = {
    Prediction.EPSILON: "epsilon",
    Prediction.CLEAN: "sample",
    Prediction.VELOCITY: "v_prediction",
    Prediction.FLOW: "flow_prediction",
}
SCHEDULES: dict[str, schedules.Schedule] = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "zero_snr": schedules.zero_terminal_snr(schedules.scaled_linear()),
    "flow": schedules.rectified_flow(),
    "flow_shift3": schedules.sd35(),
}
VP = ("linear", "scaled_linear", "cosine")

# sampler -> (reference class, extra settings, accuracy lost to its sigma-only coordinates)
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "lcm": ("LCMScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a sampler on a process."""

    sampler: str
    schedule: str
    objective: Prediction

    @property
    def process(self) -> Process:
        return Process(SCHEDULES[self.schedule], self.objective)

    @property
    def doubled(self) -> bool:
        """Rows where the reference loses more than 5e-6 to its own float32 arithmetic, and is run in double precision.

        Euler and Heun carry x / alpha, up to 20,000 times x on the cosine schedule; DDPM takes differences of numbers
        near 1; FlowMatchHeun divides a difference by a small sigma. The tables stay the reference's float32 ones.
        """
        return self.sampler in ("ddpm", "euler", "euler_ancestral", "heun")

    def first(self, level: Level[float], told: float) -> Level[float]:
        """The reference's own first level where it differs from ours by a fault that we do not copy.

        At zero terminal SNR its Euler clamps alpha_bar to 2^-24, ours steps from alpha = 0. Where a multistep
        solver cuts chosen times to whole ones, float32 logarithms turn 999 into 998.99999 and so 998; ours says 999.
        """
        if level.alpha == 0.0 and self.schedule == "zero_snr" and self.sampler.startswith("euler"):
            return from_ratio(level.t, LARGEST_RATIO)
        if (level.t, told) == (999.0, 998.0) and self.sampler.startswith(("dpmpp", "unipc")):
            return replace(level, t=told)
        return level

    def tolerance(self, sampler: Sampler) -> float:
        """5e-6; Heun in EDM's coordinates multiplies float32 rounding by alpha'/alpha, 157 in two steps on `linear`."""
        if self.sampler != "heun" or self.schedule == "flow":
            return 5e-6
        paths = [sampler.path(self.process, steps).steps for steps in STEPS]
        reach = max(step.next.alpha / step.now.alpha for path in paths for step in path[:-1] if step.now.alpha > 0.0)
        return max(5e-6, reach * 2.0**-24)

    def __str__(self) -> str:
        return f"{self.sampler}-{self.schedule}-{self.objective}"


def rows() -> list[Row]:
    """Every sampler x schedule x objective that the reference supports."""
    found: list[Row] = []
    for name in SAMPLERS:
        objectives = [Prediction.EPSILON, Prediction.CLEAN, Prediction.VELOCITY]
        if name == "euler_ancestral":
            objectives.remove(Prediction.CLEAN)  # the reference has not implemented it
        if name != "flow_euler":
            found += [Row(name, schedule, objective) for schedule in VP for objective in objectives]
        if name not in ("heun", "flow_euler"):  # the reference's Heun has no zero terminal SNR
            found += [Row(name, "zero_snr", objective) for objective in objectives[1:]]
        if name in ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "flow_euler", "heun"):
            found += [Row(name, schedule, Prediction.FLOW) for schedule in ("flow", "flow_shift3")]
    return found


def network(x: Tensor, t: float) -> Tensor:
    """A smooth function of (x, t) that grows no faster than x."""
    t = torch.tensor(t, dtype=torch.float32)
    return x * (0.5 + 0.3 * torch.cos(t / 200)) + 0.4 * torch.sin(x + t / 300)


def doubled_network(x: Tensor, t: float) -> Tensor:
    """The same beside a variance between -1 and 1 that differs from pixel to pixel: twice the channels."""
    return torch.cat((network(x, t), torch.sin(3.0 * x + t / 100)), 1)


def reference(row: Row, **settings: Any) -> Any:
    """The reference's scheduler for this row, its defaults otherwise."""
    name, extra = REFERENCES[row.sampler]
    schedule = SCHEDULES[row.schedule]
    if isinstance(schedule, RectifiedFlow):
        if row.sampler in ("flow_euler", "heun"):
            name = {"flow_euler": name, "heun": "FlowMatchHeunDiscreteScheduler"}[row.sampler]
            return getattr(diffusers, name)(shift=schedule.shift, **settings)
        numbers: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": schedule.shift}
    else:
        numbers = {
            "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(schedule.betas, schedule.betas),
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
        }
        if schedule.zero_terminal_snr:
            numbers["rescale_betas_zero_snr"] = True
    return getattr(diffusers, name)(**{"prediction_type": OBJECTIVES[row.objective], **numbers, **extra, **settings})


def widened(scheduler: Any) -> None:
    """Let the reference do its own arithmetic in double precision on its float32 tables."""
    for table in ("sigmas", "alphas_cumprod", "one"):
        if isinstance(getattr(scheduler, table, None), Tensor):
            setattr(scheduler, table, getattr(scheduler, table).double())


@contextmanager
def borrowed(scheduler: Any, noise: Rng, exact: bool) -> Iterator[None]:
    """The reference's module with our noise; `exact`: and with its casts to float32 going to double precision."""
    module, wide = sys.modules[type(scheduler).__module__], ModuleType("torch")
    wide.__getattr__ = lambda name: torch.float64 if name == "float32" else getattr(torch, name)  # pyright: ignore
    before = {name: getattr(module, name) for name in ("torch", "randn_tensor") if hasattr(module, name)}
    module.torch = wide if exact else torch
    module.randn_tensor = lambda shape, **_: noise(torch.empty(shape)).to(torch.float64 if exact else torch.float32)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def shared_noise() -> Rng:
    generator = torch.Generator().manual_seed(5)
    return lambda like: torch.randn(like.shape, generator=generator)


def run_reference(
    scheduler: Any,
    start_noise: Tensor,
    clean: Tensor,
    steps: int,
    start: int,
    exact: bool = False,
    net: Network = network,
    **kwargs: Any,
) -> Tensor:
    """The reference's loop, entered at `start` as image-to-image does; `exact` runs it in double precision."""
    scheduler.set_timesteps(steps)
    name = type(scheduler).__name__
    begin = start * (2 if "Heun" in name else 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if exact:
        widened(scheduler)
        start_noise, clean = start_noise.double(), clean.double()
    times = scheduler.timesteps[begin:]
    if start == 0:
        x = start_noise * getattr(scheduler, "init_noise_sigma", 1.0)
    elif hasattr(scheduler, "scale_noise"):
        x = scheduler.scale_noise(clean, times[:1], start_noise)
    else:
        x = scheduler.add_noise(clean, start_noise, times[:1])
    with borrowed(scheduler, shared_noise(), exact):
        for t in times:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(net(scaled, float(t)), t, x, return_dict=False, **kwargs)[0]
    return x


def run_ours(
    sampler: Sampler,
    process: Process,
    start_noise: Tensor,
    clean: Tensor,
    steps: int,
    start: int,
    first: Callable[[Level[float]], Level[float]] = lambda level: level,
    net: Network = network,
    clip: float | None = None,
) -> Tensor:
    """Our loop; `first` puts the reference's first level in place of ours."""
    path = sampler.path(process, steps, start)
    if start == 0:
        path = replace(path, steps=(replace(path.steps[0], now=first(path.steps[0].now)), *path.steps[1:]))
    x = start_noise if start == 0 else process.noised(clean, start_noise, path.steps[0].now)

    def denoise(x: Tensor, level: Level[float]) -> Estimate:
        raw, variance = prediction.split(net(x, level.t), x.shape[1])
        return prediction.estimate(process.prediction, raw, x, level, variance)

    return sample(bounded(denoise, sampler, clip), x, path, sampler, shared_noise())


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def worst(
    row: Row,
    sampler: Sampler,
    counts: tuple[int, ...] = STEPS,
    exact: bool | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> float:
    """The largest difference over step counts and start indices; `options` go to every step of the reference."""
    noise, clean = tensors()
    exact = row.doubled if exact is None else exact
    errors: list[float] = []
    for steps in counts:
        for start in sorted({0, steps // 2}):
            scheduler = reference(row, **settings)
            theirs = run_reference(scheduler, noise, clean, steps, start, exact, **(options or {}))
            told = float(scheduler.timesteps[0])
            ours = run_ours(
                sampler, row.process, noise, clean, steps, start, lambda level, told=told: row.first(level, told)
            )
            errors.append(difference(ours, theirs))
    return max(errors)


def spaced(sampler: Sampler, spacing: Spacing) -> Sampler:
    return replace(sampler, spacing=spacing)  # pyright: ignore
