"""Samplers on data whose denoiser is known exactly: order of convergence, mean and variance, and no hidden state."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import Estimate, Level, Prediction, Process, schedules
from mezzotint.process.level import from_ratio
from mezzotint.sampling import (
    DDIM,
    DDPM,
    LCM,
    SAMPLERS,
    DPMpp2M,
    Euler,
    Path,
    Sampler,
    Spacing,
    Step,
    UniPC,
    sample,
    seeded_noise,
)

VP = Process(schedules.scaled_linear(), Prediction.EPSILON)
FLOW = Process(schedules.rectified_flow(low_end="even"), Prediction.FLOW)
MEANS, SPREADS, SHARES = torch.tensor([-1.2, 0.9]).double(), torch.tensor([0.5, 0.3]).double(), (0.35, 0.65)

Denoise = Callable[[Tensor, Level[float]], Estimate]


def exact(mean: float, spread: float) -> Denoise:
    """The denoiser of N(mean, spread^2): clean = mean + a spread^2 / (a^2 spread^2 + s^2) (x - a mean)."""

    def denoise(x: Tensor, level: Level[float]) -> Estimate:
        a, s = level.alpha, level.sigma
        variance = a * a * spread * spread + s * s
        rest = x - a * mean
        return Estimate(mean + a * spread * spread / variance * rest, s / variance * rest)

    return denoise


def mixture(x: Tensor, level: Level[float]) -> Estimate:
    """The denoiser of a mixture of two Gaussians: each one's, weighted by how likely x came from it."""
    a, s = level.alpha, level.sigma
    variance = a * a * SPREADS**2 + s * s
    rest = x[..., None] - a * MEANS
    log = torch.tensor(SHARES).double().log() - 0.5 * variance.log() - 0.5 * rest**2 / variance
    belief = torch.softmax(log, -1)
    return Estimate(
        (belief * (MEANS + a * SPREADS**2 / variance * rest)).sum(-1), (belief * s / variance * rest).sum(-1)
    )


def below(x: Tensor, level: Level[float]) -> Tensor:
    """How much of the mixture at this level lies below x: what the probability flow keeps, in one dimension."""
    deviation = (level.alpha**2 * SPREADS**2 + level.sigma**2).sqrt()
    return (torch.tensor(SHARES).double() * torch.special.ndtr((x[..., None] - level.alpha * MEANS) / deviation)).sum(
        -1
    )


def carried(x: Tensor, start: Level[float], end: Level[float]) -> Tensor:
    """Where the exact probability flow takes x, by bisection on `below`."""
    wanted = below(x, start)
    low, high = torch.full_like(x, -8.0), torch.full_like(x, 8.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        under = below(middle, end) < wanted
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return 0.5 * (low + high)


def vp_levels(count: int) -> list[Level[float]]:
    return [from_ratio(float(i), 10.0 * 0.02 ** (i / count)) for i in range(count + 1)]


def flow_levels(count: int) -> list[Level[float]]:
    sigmas = [0.9 - 0.8 * i / count for i in range(count + 1)]
    return [Level(1000 * s, 1 - s, s) for s in sigmas]


def walked(sampler: Sampler, denoise: Denoise, x: Tensor, levels: list[Level[float]]) -> Tensor:
    """The sampler's steps alone, in double precision, at full order."""
    history = []
    for now, next in pairwise(levels):
        x = sampler.step(denoise, x, Step(now, next, 2), history, torch.zeros_like)
    return x


DETERMINISTIC = {
    "ddim": 1,
    "euler": 1,
    "flow_euler": 1,
    "heun": 2,
    "dpmpp_2m": 2,
    "dpmpp_2m_karras": 2,
    "unipc": 3,  # UniC raises the predictor's order by one
    "unipc_karras": 3,
}


@pytest.mark.parametrize("grid", [vp_levels, flow_levels])
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name: str, data: str, grid: Callable[[int], list[Level[float]]]) -> None:
    denoise = mixture if data == "mixture" else exact(0.7, 0.4)
    start, end = grid(8)[0], grid(8)[-1]
    z = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)
    if data == "gaussian":
        spread = [math.hypot(level.alpha * 0.4, level.sigma) for level in (start, end)]
        x, truth = start.alpha * 0.7 + spread[0] * z, end.alpha * 0.7 + spread[1] * z
    else:
        x = z
        truth = carried(x, start, end)
    counts = (100, 200, 400)
    errors = [float((walked(SAMPLERS[name], denoise, x, grid(n)) - truth).abs().max()) for n in counts]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] > DETERMINISTIC[name] - 0.25, (errors, slopes)
    if data == "mixture":  # on a single Gaussian 2M's leading error nearly cancels
        assert slopes[-1] < DETERMINISTIC[name] + 0.25, (errors, slopes)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_whole_paths_reach_the_exact_image(name: str) -> None:
    denoise, z = exact(0.7, 0.4), torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    for process in (VP, FLOW):
        if name == "flow_euler" and process is VP:
            continue
        errors: list[float] = []
        for steps in (10, 40, 160):
            path = SAMPLERS[name].path(process, steps)
            first = path.steps[0].now
            x = first.alpha * 0.7 + math.hypot(first.alpha * 0.4, first.sigma) * z
            image = sample(denoise, x / path.start_scale, path, SAMPLERS[name], torch.zeros_like)
            errors.append(float((image - (0.7 + 0.4 * z)).abs().max()))
        assert errors[2] < errors[0] / 5 and errors[2] < 0.02, (process, errors)


@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize(
    "sampler",
    [DDPM(), DDIM(1.0), Euler(1.0), DPMpp2M(0.5), SAMPLERS["dpmpp_2m_sde"], SAMPLERS["dpmpp_2m_sde_karras"]],
    ids=["ddpm", "ddim", "euler_ancestral", "dpmpp_2m_half", "dpmpp_2m_sde", "dpmpp_2m_sde_karras"],
)
def test_stochastic_samplers_keep_mean_and_variance(sampler: Sampler, process: Process) -> None:
    path = sampler.path(process, 900)
    first = path.steps[0].now
    rng = seeded_noise([0])
    z = rng(torch.empty(1, 10_000))
    x = first.alpha * 0.7 + math.hypot(first.alpha * 0.4, first.sigma) * z
    image = sample(exact(0.7, 0.4), x / path.start_scale, path, sampler, rng)
    assert float(image.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(image.std()) == pytest.approx(0.4, rel=0.025)
    assert abs(float(torch.corrcoef(torch.stack([image.flatten(), z.flatten()]))[0, 1])) < 0.3  # really redrawn


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_with_the_exact_consistency_function_keeps_the_distribution(steps: int) -> None:
    def consistent(x: Tensor, level: Level[float]) -> Estimate:
        z = (x - level.alpha * 0.7) / math.hypot(level.alpha * 0.4, level.sigma)
        return Estimate(0.7 + 0.4 * z, z)

    rng = seeded_noise([1])
    path = LCM().path(VP, steps)
    first = path.steps[0].now
    x = first.alpha * 0.7 + math.hypot(first.alpha * 0.4, first.sigma) * rng(torch.empty(1, 40_000))
    image = sample(consistent, x, path, LCM(), rng)
    assert float(image.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(image.std()) == pytest.approx(0.4, rel=0.02)


# One rule, five samplers.


def test_trap_one_rule_serves_five_samplers() -> None:
    """Between the same levels DDIM, Euler and flow Euler are one step; so are DDPM, DDIM at eta 1, ancestral Euler."""
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for levels in (vp_levels(8), flow_levels(8)):
        step = Step(levels[2], levels[4])
        plain = [
            s.step(exact(0.3, 1.0), x, step, [], torch.zeros_like) for s in (DDIM(), Euler(), SAMPLERS["flow_euler"])
        ]
        drawn = [s.step(exact(0.3, 1.0), x, step, [], lambda _: noise) for s in (DDPM(), DDIM(1.0), Euler(1.0))]
        assert all(torch.equal(plain[0], other) for other in plain)
        assert all(torch.equal(drawn[0], other) for other in drawn)


def test_ddpm_posterior_equals_its_closed_form() -> None:
    """Ho 2020, eq. 6 and 7, written out."""
    table = VP.schedule.alpha_bar()  # type: ignore[union-attr]
    now, before = table[500], table[450]
    beta = 1 - now / before
    x, clean, noise = torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    mean = before**0.5 * beta / (1 - now) * clean + (now / before) ** 0.5 * (1 - before) / (1 - now) * x
    deviation = {"small": math.sqrt((1 - before) / (1 - now) * beta), "large": math.sqrt(beta)}
    step = Step(VP.level(500), VP.level(450))
    for variance, d in deviation.items():
        ours = DDPM(variance=variance).step(
            lambda x, level: Estimate(clean, (x - level.alpha * clean) / level.sigma), x, step, [], lambda _: noise
        )
        assert float((ours - (mean + d * noise)).abs().max()) < 1e-12


# No hidden state, one generator an image.


def net(x: Tensor, level: Level[float]) -> Estimate:
    raw = 0.7 * x + 0.2 * torch.sin(x + level.t / 300)
    return Estimate((x - level.sigma * raw) / max(level.alpha, 0.05), raw)


def run(sampler: Sampler, seeds: list[int], process: Process = VP, steps: int = 6) -> Tensor:
    rng = seeded_noise(seeds)
    return sample(net, rng(torch.empty(len(seeds), 3, 4, 4)), sampler.path(process, steps), sampler, rng)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    process = FLOW if name == "flow_euler" else VP
    together = run(SAMPLERS[name], [7, 8, 9], process)
    alone = torch.cat([run(SAMPLERS[name], [seed], process) for seed in (7, 8, 9)])
    assert float((together - alone).abs().max()) <= 1e-6 * float(alone.abs().max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_pain_23_interleaved_runs_equal_separate_ones(name: str) -> None:
    sampler, process = SAMPLERS[name], FLOW if name == "flow_euler" else VP
    separate = [run(sampler, [1], process, 6), run(sampler, [2], process, 9)]

    rngs = [seeded_noise([1]), seeded_noise([2])]
    paths = [sampler.path(process, 6), sampler.path(process, 9)]
    images = [rng(torch.empty(1, 3, 4, 4)) * path.start_scale for rng, path in zip(rngs, paths, strict=True)]
    histories = [[], []]
    for i in range(9):
        for k in (0, 1):
            if i < len(paths[k].steps):
                images[k] = sampler.step(net, images[k], paths[k].steps[i], histories[k], rngs[k])
    assert all(torch.equal(a, b) for a, b in zip(images, separate, strict=True))


def test_pain_23_threads_sharing_a_sampler_do_not_disturb_each_other() -> None:
    sampler, found = SAMPLERS["unipc"], {}
    jobs = [threading.Thread(target=lambda s=s: found.update({s: run(sampler, [s], steps=5 + s)})) for s in range(6)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert all(torch.equal(found[s], run(sampler, [s], steps=5 + s)) for s in range(6))


def test_seeds_alone_decide_the_noise() -> None:
    a, b = seeded_noise([3, 4])(torch.empty(2, 5)), seeded_noise([4, 3])(torch.empty(2, 5))
    assert torch.equal(a, b.flip(0)) and not torch.equal(a[0], a[1])
    with pytest.raises(ValueError, match="2 seeds"):
        seeded_noise([3, 4])(torch.empty(3, 5))


# The loop.


def test_pin_and_watch_see_every_step() -> None:
    known, keep = torch.full((1, 1, 2, 2), 0.25), torch.tensor([[True, False], [False, False]])
    seen: list[tuple[int, float, bool]] = []
    rng = seeded_noise([0])
    path = SAMPLERS["dpmpp_2m"].path(VP, 5)
    image = sample(
        net,
        rng(torch.empty(1, 1, 2, 2)),
        path,
        SAMPLERS["dpmpp_2m"],
        rng,
        pin=lambda x, level: torch.where(keep, level.alpha * known, x),
        watch=lambda i, step, x, history: seen.append((i, step.now.t, history[-1].level == step.now)),
    )
    assert seen == [(i, step.now.t, True) for i, step in enumerate(path.steps)]
    assert float(image[0, 0, 0, 0]) == 0.25


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_path_entered_in_the_middle_is_the_rest_of_the_whole(name: str) -> None:
    process = FLOW if name == "flow_euler" else VP
    whole, rest = SAMPLERS[name].path(process, 10), SAMPLERS[name].path(process, 10, start=4)
    assert rest == Path(whole.steps[4:], 1.0)
    assert SAMPLERS[name].path(process, 10, start=9).steps[0].now == whole.steps[9].now


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"flow_euler"}))
@pytest.mark.parametrize(
    "process",
    [
        Process(schedules.zero_terminal_snr(schedules.linear()), Prediction.VELOCITY),
        Process(schedules.cosine(), Prediction.CLEAN),
        FLOW,
        Process(schedules.flux2(), Prediction.FLOW),
        Process(schedules.rectified_flow(clock=1.0), Prediction.CLEAN),
    ],
    ids=lambda p: p.schedule.name,
)
@pytest.mark.parametrize("steps", [2, 9])
def test_every_sampler_serves_every_process_that_it_does_not_refuse(name: str, process: Process, steps: int) -> None:
    path = SAMPLERS[name].path(process, steps, tokens=1024)
    z = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    image = sample(exact(0.7, 0.4), z, path, SAMPLERS[name], seeded_noise([0]))
    assert bool(image.isfinite().all())
    if (name, process.schedule.name) != ("heun", "cosine"):  # sigma / alpha falls from 20,000 in one stride: too coarse
        assert float((image - 0.7).abs().max()) < 2.0
    assert path.steps[-1].next.sigma == 0.0


# What cannot be served.


def test_flow_euler_names_the_schedule_it_cannot_serve() -> None:
    with pytest.raises(InputError, match="'flow_euler' cannot serve schedule 'scaled_linear'"):
        SAMPLERS["flow_euler"].path(VP, 4)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"flow_euler"}))
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts_are_refused(name: str, steps: int) -> None:
    with pytest.raises(InputError, match=str(steps)):
        SAMPLERS[name].path(VP, steps)


def test_start_outside_the_path_is_refused() -> None:
    with pytest.raises(InputError, match="start index 5"):
        SAMPLERS["ddim"].path(VP, 5, start=5)


def test_unknown_spacing_words_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'leading'"):
        DDIM(spacing=Spacing("leadin")).path(VP, 5)
    with pytest.raises(InputError, match="did you mean 'karras'"):
        DPMpp2M(spacing=Spacing("linspace", ramp="karas")).path(VP, 5)
    with pytest.raises(InputError, match="did you mean 'lowest'"):
        UniPC(last="lowst").path(VP, 5)


@pytest.mark.parametrize("rule", ["leading", "linspace"])
def test_steps_that_fall_on_each_other_are_refused(rule: str) -> None:
    with pytest.raises(InputError, match="use fewer"):
        DPMpp2M(spacing=Spacing(rule)).path(VP, 1000)


def test_an_offset_that_leaves_the_table_is_refused() -> None:
    with pytest.raises(InputError, match="outside the schedule"):
        DDIM(spacing=Spacing("leading", 1)).path(VP, 1000)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DDIM(eta=1.5), "eta 1.5"),
        (lambda: Euler(eta=-0.1), "eta -0.1"),
        (lambda: DPMpp2M(eta=2.0), "eta 2"),
        (lambda: DPMpp2M(solver_order=3), "solver order 3"),
        (lambda: UniPC(solver_order=4), "solver order 4"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Sampler], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_an_unknown_variance_is_refused() -> None:
    step = Step(VP.level(500), VP.level(450))
    with pytest.raises(InputError, match="did you mean 'large'"):
        DDPM(variance="larg").step(net, torch.zeros(1, 1, 2, 2), step, [], torch.zeros_like)


def test_options_are_fields_of_a_frozen_sampler() -> None:
    ddim = SAMPLERS["ddim"]
    assert replace(ddim, eta=0.3) == DDIM(eta=0.3)  # type: ignore[type-var]
    with pytest.raises(AttributeError):
        ddim.eta = 1.0  # type: ignore[attr-defined]
