"""The pieces of consistency distillation against the reference's schedulers, and against data whose answer is known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.guidance.guidance import mixed
from mezzotint.process import CLEAN, Level, Prediction, Process, prediction, schedules
from mezzotint.sampling import DDIM, LCM, SAMPLERS, Step
from mezzotint.training.consistency import consistent, huber, ladder, rungs, scales, solved

diffusers = pytest.importorskip("diffusers")

SAMPLER = LCM()
EPSILON = Process(schedules.scaled_linear(), Prediction.EPSILON)
FLOW = Process(schedules.rectified_flow(), Prediction.FLOW)
TABLES = {
    "epsilon": EPSILON,
    "velocity": Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY),
    "sample": Process(schedules.linear(), Prediction.CLEAN),
}
FLOWS = {
    "plain": FLOW,
    "once": Process(schedules.rectified_flow(3.0, low_end="once"), Prediction.CLEAN),
    "sd35": Process(schedules.sd35(), Prediction.FLOW),
    "flux2": Process(schedules.flux2(), Prediction.FLOW),
}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_boundary_is_that_of_the_reference_and_of_our_sampler() -> None:
    theirs = diffusers.LCMScheduler(timestep_scaling=10.0)
    times = torch.tensor([0.0, 1.0, 19.0, 499.0, 999.0])
    c_skip, c_out = SAMPLER.scalings(times)
    for i, t in enumerate(times.tolist()):
        expected = [float(value) for value in theirs.get_scalings_for_boundary_condition_discrete(t)]
        assert list(SAMPLER.scalings(t)) == pytest.approx(expected, rel=1e-12)
        assert [c_skip[i].item(), c_out[i].item()] == pytest.approx(expected, rel=1e-6)
    assert (c_skip[0].item(), c_out[0].item()) == (1.0, 0.0)  # f(x, 0) = x, exactly
    # what one step of the sampler gives back is the function that is trained
    x, raw = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    for process in (*TABLES.values(), *FLOWS.values()):
        (step,) = SAMPLER.path(process, 1, tokens=64).steps
        denoise = lambda x, at, p=process: prediction.estimate(p.prediction, raw, x, at)  # noqa: E731
        sampled = SAMPLER.step(denoise, x, step, [], torch.zeros_like)
        steps = ladder(process, 50, SAMPLER, 64)
        ours = consistent(process, raw, x, rungs(steps, torch.full((3,), len(steps) - 1)), SAMPLER)
        assert torch.allclose(sampled, ours, rtol=1e-5, atol=1e-5 * sampled.abs().max().item())


@pytest.mark.parametrize("total", [1000, 4000])
def test_a_table_is_distilled_on_the_published_timesteps(total: int) -> None:
    """solver_steps levels i T / steps - 1, each with the one below, or 0; all that the sampler visits is among them."""
    process = Process(replace(schedules.scaled_linear(), timesteps=total, tick=1000 / total), Prediction.EPSILON)
    steps = ladder(process, 50, SAMPLER)
    starts = np.arange(1, 51) * (total // 50) - 1
    ends = np.maximum(starts - total // 50, 0)
    tick = 1000 / total
    assert [round(now.t / tick) for _, now in pairwise(steps)] == starts.tolist()
    assert [round(next.t / tick) for next, _ in pairwise(steps)] == ends.tolist()
    scheduler = diffusers.LCMScheduler(num_train_timesteps=total, original_inference_steps=50)
    for count in range(1, 9):
        scheduler.set_timesteps(count)
        ours = [step.now for step in SAMPLER.path(process, count).steps]
        assert [round(level.t / tick) for level in ours] == scheduler.timesteps.tolist()
        assert all(level in steps for level in ours)
    table = diffusers.DDIMScheduler(
        num_train_timesteps=total, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).alphas_cumprod
    found = rungs(steps, torch.arange(1, 51))
    assert torch.allclose(found.alpha.flatten(), table[starts].sqrt(), rtol=2e-6)
    assert torch.allclose(found.sigma.flatten(), (1 - table[starts]).sqrt(), rtol=2e-6)
    assert found.alpha.shape == (50, 1, 1, 1) and found.alpha.dtype == torch.float32


def test_levels_that_the_sampler_would_visit_untaught_are_refused() -> None:
    assert len(ladder(EPSILON, 100, SAMPLER)) == 101  # a finer path passes through the coarse one's levels
    with pytest.raises(InputError, match="solver_steps 30 leaves out timestep 19, which sampler 'lcm' visits: use 50"):
        ladder(EPSILON, 30, SAMPLER)
    with pytest.raises(InputError, match="solver_steps 2000 cannot be placed on 1000 timesteps"):
        ladder(EPSILON, 2000, SAMPLER)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("solver_steps", [20, 50])
def test_a_flow_is_distilled_on_the_levels_that_the_sampler_visits(name: str, solver_steps: int) -> None:
    process, tokens = FLOWS[name], 256
    steps = ladder(process, solver_steps, SAMPLER, tokens)
    assert steps[0] == CLEAN and steps[-1].sigma == 1.0
    assert all(below.sigma + 9e-7 < above.sigma for below, above in pairwise(steps))
    largest = max(above.sigma - below.sigma for below, above in pairwise(steps))
    grid = [step.now.sigma for step in SAMPLERS["flow_euler"].path(process, solver_steps, tokens=tokens).steps]
    assert largest <= max(high - low for high, low in pairwise([*grid, 0.0])) + 1e-9  # no step longer than the grid's
    sigmas = np.array([level.sigma for level in steps])
    for count in range(1, 9):
        for step in SAMPLER.path(process, count, tokens=tokens).steps:
            assert np.abs(sigmas - step.now.sigma).min() < 1e-6
    assert all(level.t == pytest.approx(1000 * level.sigma, abs=1e-3) for level in steps)


def test_few_steps_on_a_flow_are_spread_over_its_levels() -> None:
    """As on a table: of two steps the second is half-way down, where a grid of two levels would end near clean."""

    def sigmas(process: Process, steps: int, sampler: LCM = SAMPLER) -> list[float]:
        return [round(step.now.sigma, 3) for step in sampler.path(process, steps, tokens=256).steps]

    assert sigmas(FLOW, 1) == [1.0] and sigmas(FLOW, 2) == [1.0, 0.49] and sigmas(FLOW, 4) == [1.0, 0.755, 0.49, 0.246]
    assert sigmas(FLOWS["sd35"], 2) == [1.0, 0.743]  # 3 s / (1 + 2 s), over a low end that is shifted as well
    assert sigmas(FLOW, 50) == [round(s, 3) for s in np.linspace(1.0, 0.001, 50)]
    assert sigmas(FLOW, 4, LCM(reach=0.6)) == [0.592, 0.45, 0.286, 0.144]  # a picture is entered at this share


@pytest.mark.parametrize("name", TABLES)
def test_the_solver_steps_as_ddim_does(name: str) -> None:
    """Every image of a batch at a level of its own: the reference's DDIM and our sampler, at each of them."""
    process = TABLES[name]
    schedule: Any = process.schedule
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=schedule.betas, beta_start=schedule.beta_start, beta_end=schedule.beta_end, clip_sample=False,
        set_alpha_to_one=False, prediction_type={"velocity": "v_prediction"}.get(name, name),
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
    )  # fmt: skip
    scheduler.set_timesteps(50)
    steps = ladder(process, 50, SAMPLER)
    index = torch.arange(1, 51)
    x, raw = noise(50, 3, 4, 4), noise(50, 3, 4, 4, seed=1)
    ours = solved(process, raw, x, rungs(steps, index), rungs(steps, index - 1))
    for i, (next, now) in enumerate(pairwise(steps)):
        reference = scheduler.step(raw[i], int(now.t), x[i]).prev_sample
        assert torch.allclose(ours[i], reference, rtol=1e-5, atol=2e-6 * max(1.0, reference.abs().max().item()))
        denoise = lambda x, at, i=i: prediction.estimate(process.prediction, raw[i], x, at)  # noqa: E731
        stepped = DDIM().step(denoise, x[i], Step(now, next), [], torch.zeros_like)
        assert torch.allclose(ours[i], stepped, rtol=1e-5, atol=2e-6 * max(1.0, reference.abs().max().item()))


def test_the_solver_steps_along_a_flow_as_euler_does() -> None:
    process = FLOWS["sd35"]
    steps = ladder(process, 50, SAMPLER)
    index = torch.arange(1, len(steps))
    x, raw = noise(len(index), 3, 4, 4), noise(len(index), 3, 4, 4, seed=1)
    ours = solved(process, raw, x, rungs(steps, index), rungs(steps, index - 1))
    change = torch.tensor([below.sigma - above.sigma for below, above in pairwise(steps)]).view(-1, 1, 1, 1)
    assert (ours - (x + change * raw)).abs().max() < 2e-6
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == len(index)
    for i, t in zip(reversed(range(50)), scheduler.timesteps, strict=True):
        assert torch.allclose(ours[i], scheduler.step(raw[i], t, x[i]).prev_sample, atol=2e-6)


@pytest.mark.parametrize("process", [*TABLES.values(), FLOW], ids=[*TABLES, "flow"])
def test_guidance_on_raw_outputs_is_guidance_on_both_parts(process: Process) -> None:
    """The guided ODE of the paper extrapolates the clean and the noise estimate; mixing raw outputs is the same."""
    steps = ladder(process, 50, SAMPLER)
    index = torch.tensor([1, 10, 30, len(steps) - 2])
    now, next = rungs(steps, index), rungs(steps, index - 1)
    x, conditional, empty = (noise(4, 3, 4, 4, seed=seed) for seed in range(3))
    w = torch.tensor([2.0, 5.0, 8.0, 14.0]).view(-1, 1, 1, 1)  # the paper's, the scale less 1
    with_text, without = (prediction.estimate(process.prediction, raw, x, now) for raw in (conditional, empty))
    clean = with_text.clean + w * (with_text.clean - without.clean)
    direction = with_text.noise + w * (with_text.noise - without.noise)
    expected = next.alpha * clean + next.sigma * direction
    ours = solved(process, mixed(conditional, empty, w + 1), x, now, next)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_distance_is_the_pseudo_huber_norm_without_its_cancellation() -> None:
    d = torch.tensor([0.0, 1e-6, 1e-4, 1e-3, 0.1, 3.0], requires_grad=True)
    found = huber(d, torch.zeros(6), 0.001)
    exact = (d.detach().double() ** 2 + 0.001**2).sqrt() - 0.001
    assert torch.allclose(found.detach().double(), exact, rtol=1e-6, atol=1e-14)
    assert found[1].item() == pytest.approx(5e-10, rel=1e-3)  # as written in the paper float32 gives 0 here
    found.sum().backward()
    assert torch.allclose(d.grad, (d / (d**2 + 1e-6).sqrt()).detach(), rtol=1e-5) and d.grad[0] == 0


def test_guidance_scales_are_uniform_between_their_ends() -> None:
    drawn = scales(3.0, 13.0, 20000, torch.Generator().manual_seed(1))
    assert drawn.min() >= 3.0 and drawn.max() <= 13.0
    assert drawn.mean().item() == pytest.approx(8.0, abs=0.1)
    assert drawn.std().item() == pytest.approx(10 / math.sqrt(12), abs=0.05)
    assert (scales(7.5, 7.5, 4, torch.Generator()) == 7.5).all()


# Data whose answer is known: a Gaussian N(MEAN, DEVIATION^2).

MEAN, DEVIATION = 0.4, 0.6


def denoised(x: Tensor, level: Level[Tensor]) -> Tensor:
    """E[clean | x] = m + alpha s^2 (x - alpha m) / (alpha^2 s^2 + sigma^2)."""
    variance = (level.alpha * DEVIATION) ** 2 + level.sigma**2
    return MEAN + level.alpha * DEVIATION**2 * (x - level.alpha * MEAN) / variance


def teacher(process: Process, x: Tensor, level: Level[Tensor]) -> Tensor:
    clean = denoised(x, level)
    noise = (x - level.alpha * clean) / level.sigma.clamp_min(1e-12)  # on a clean image nothing depends on it
    return prediction.target(process.prediction, clean, noise, level)


def exact(x: Tensor, level: Level[Tensor], end: Level[Tensor]) -> Tensor:
    """Where the ODE carries x at `level` to at `end`: the deviation from the mean keeps its share of the marginal's."""
    now, then = (((at.alpha * DEVIATION) ** 2 + at.sigma**2).sqrt() for at in (level, end))
    return end.alpha * MEAN + then / now * (x - level.alpha * MEAN)


def drawn(count: int, level: Level[Tensor], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    clean = MEAN + DEVIATION * noise(count, 1, 1, 1, seed=seed, dtype=dtype)
    return level.alpha * clean + level.sigma * noise(count, 1, 1, 1, seed=seed + 1, dtype=dtype)


def double(level: Level[Tensor]) -> Level[Tensor]:
    return Level(level.t, level.alpha.double(), level.sigma.double())


@pytest.mark.parametrize("process", [EPSILON, TABLES["velocity"], FLOW], ids=["epsilon", "velocity", "flow"])
def test_the_exact_consistency_function_has_no_loss_and_the_teacher_has(process: Process) -> None:
    """The loss of the true map is the solver's own error, of second order in the step; one estimate is far from it."""
    found: dict[int, tuple[float, float]] = {}
    for solver_steps in (50, 100, 200):
        steps = ladder(process, solver_steps, SAMPLER)
        index = torch.arange(2, len(steps)).repeat(40)
        now, next, end = (double(rungs(steps, i)) for i in (index, index - 1, torch.zeros_like(index)))
        x = drawn(len(index), now, seed=3, dtype=torch.float64)
        raw = teacher(process, x, now)
        lower = solved(process, raw, x, now, next)
        true = huber(exact(x, now, end), exact(lower, next, end), 1e-3).mean().item()
        estimates = [consistent(process, teacher(process, at, level), at, level, SAMPLER) for at, level in
                     ((x, now), (lower, next))]  # fmt: skip
        found[solver_steps] = (true, huber(*estimates, 1e-3).mean().item())
    assert all(true < 0.02 * one for true, one in found.values())
    assert found[200][0] < found[100][0] / 2.5 < found[50][0] / 6


class Student(nn.Module):
    """The teacher and a small correction, which begins at 0."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.body = nn.Sequential(nn.Linear(4, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor, level: Level[Tensor]) -> Tensor:
        seen = torch.cat([x, level.t.view(-1, 1, 1, 1) / 1000, level.alpha, level.sigma], 1).flatten(1)
        return teacher(self.process, x, level) + self.body(seen).view(-1, 1, 1, 1)


@pytest.mark.parametrize("process", [TABLES["velocity"], FLOW], ids=["velocity", "flow"])
def test_a_distilled_student_comes_to_the_exact_map(process: Process) -> None:
    """One step from noise: the teacher gives the mean, the student the place that the whole ODE leads to."""
    torch.manual_seed(0)
    steps = ladder(process, 50, SAMPLER)
    student = Student(process)
    target = copy.deepcopy(student).requires_grad_(False)
    optimiser = torch.optim.Adam(student.parameters(), lr=4e-3)
    top, end = (rungs(steps, torch.full((512,), i)) for i in (len(steps) - 1, 0))
    start = noise(512, 1, 1, 1, seed=99)

    def distance() -> float:
        with torch.no_grad():
            one = consistent(process, student(start, top), start, top, SAMPLER)
        return (one - exact(start, top, end)).square().mean().sqrt().item()

    before = distance()
    for step in range(500):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 + math.cos(math.pi * step / 500))
        rng = torch.Generator().manual_seed(step)
        index = torch.randint(1, len(steps), (256,), generator=rng)
        now, next = rungs(steps, index), rungs(steps, index - 1)
        x = drawn(256, now, seed=10 * step)
        ours = consistent(process, student(x, now), x, now, SAMPLER)
        with torch.no_grad():
            lower = solved(process, teacher(process, x, now), x, now, next)
            theirs = consistent(process, target(lower, next), lower, next, SAMPLER)
        huber(ours, theirs, 1e-3).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        for mine, new in zip(target.parameters(), student.parameters(), strict=True):
            mine.data.lerp_(new.data, 0.2)
    after = distance()
    assert before > 0.5 * DEVIATION  # the teacher's single estimate knows nothing of the noise it started from
    assert after < 0.25 * before
