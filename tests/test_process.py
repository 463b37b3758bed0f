"""Schedules, objectives and weighting against closed forms and the published numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process import Level, Prediction, Process, RectifiedFlow, prediction, schedules, weighting

VP = [schedules.linear(), schedules.scaled_linear(), schedules.cosine()]
VP += [schedules.zero_terminal_snr(VP[0])]
FLOWS = [schedules.rectified_flow(), schedules.sd35(), schedules.flux2()]
FLOWS += [schedules.rectified_flow(2.0, "even", clock=1.0)]
PROCESSES = [
    *(Process(schedule, p) for schedule in VP[:3] for p in (Prediction.EPSILON, Prediction.CLEAN, Prediction.VELOCITY)),
    *(Process(VP[3], p) for p in (Prediction.CLEAN, Prediction.VELOCITY)),
    *(Process(schedule, p) for schedule in FLOWS for p in (Prediction.CLEAN, Prediction.FLOW)),
]


def named(process: Process) -> str:
    return f"{process.schedule.name}-{process.prediction}"


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Schedules.


def test_trap_stable_diffusion_ends_at_signal_0_0683() -> None:
    assert schedules.scaled_linear().level(999).alpha == pytest.approx(0.0683, abs=5e-5)


def test_trap_stable_diffusion_sigma_range() -> None:
    ratios = schedules.scaled_linear().ratios()
    assert ratios[0] == pytest.approx(0.0292, abs=5e-5)
    assert ratios[-1] == pytest.approx(14.615, abs=5e-4)


def test_trap_sdxl_is_not_cosine() -> None:
    cosine, sdxl = schedules.cosine().level(999).alpha, schedules.scaled_linear().level(999).alpha
    assert cosine == pytest.approx(4.9e-5, rel=0.01)
    assert sdxl / cosine > 1000


def test_trap_latent_diffusion_linear_is_linear_in_the_root() -> None:
    table = schedules.scaled_linear(0.0015, 0.0195).alpha_bar()
    betas = [1 - b / a for a, b in zip((1.0, *table), table, strict=False)]
    roots = [math.sqrt(beta) for beta in betas]
    assert roots[0] == pytest.approx(math.sqrt(0.0015), rel=1e-4)
    assert roots[500] - roots[0] == pytest.approx((math.sqrt(0.0195) - math.sqrt(0.0015)) * 500 / 999, rel=1e-3)


def test_trap_dit_and_ddpm_are_linear_1e4_to_002() -> None:
    exact = 1.0
    for i in range(1000):
        exact *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    assert schedules.linear().alpha_bar()[-1] == pytest.approx(exact, rel=1e-4)
    assert schedules.linear().alpha_bar()[258] == pytest.approx(0.5, abs=0.005)
    assert schedules.cosine().alpha_bar()[495] == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("schedule", VP, ids=lambda s: s.name)
def test_log_snr_falls_and_signal_and_noise_are_unit(schedule: schedules.Discrete) -> None:
    table = schedule.alpha_bar()
    assert all(a > b for a, b in pairwise(table))
    for t in (0, 1, 500, 998, 999):
        level = schedule.level(t)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_table_equals_the_reference(kind: str, rescaled: bool) -> None:
    from diffusers import DDIMScheduler

    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}.get(kind, (1e-4, 0.02))
    theirs = DDIMScheduler(
        beta_start=ends[0], beta_end=ends[1], beta_schedule=kind, rescale_betas_zero_snr=rescaled
    ).alphas_cumprod
    ours = {"linear": VP[0], "scaled_linear": VP[1], "squaredcos_cap_v2": VP[2]}[kind]
    ours = schedules.zero_terminal_snr(ours) if rescaled else ours
    assert torch.equal(torch.tensor(ours.alpha_bar()), theirs)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_level() -> None:
    plain, zero = schedules.scaled_linear(), schedules.zero_terminal_snr(schedules.scaled_linear())
    assert (zero.level(999).alpha, zero.level(999).sigma) == (0.0, 1.0)
    assert zero.level(0).alpha == pytest.approx(plain.level(0).alpha, rel=1e-7)


def test_zero_terminal_snr_velocity_at_pure_noise_is_minus_clean() -> None:
    process = Process(schedules.zero_terminal_snr(schedules.linear()), Prediction.VELOCITY)
    raw, x = drawn(2, 3), drawn(2, 3)
    parts = prediction.estimate(process.prediction, raw, x, process.level(999))
    assert torch.equal(parts.clean, -raw) and torch.equal(parts.noise, x)


def test_fractions_lie_between_their_neighbours_in_sigma_over_alpha() -> None:
    schedule = schedules.scaled_linear()
    level, ratios = schedule.level(500.25), schedule.ratios()
    assert level.sigma / level.alpha == pytest.approx(0.75 * ratios[500] + 0.25 * ratios[501], rel=1e-12)


@pytest.mark.parametrize(("steps", "mu"), [(50, 2.0234), (28, 2.1514), (4, 2.2912)])
def test_trap_flux2_mu_depends_on_tokens_and_steps(steps: int, mu: float) -> None:
    assert schedules.flux2_mu(4096, steps) == pytest.approx(mu, abs=5e-5)
    assert schedules.flux2_mu(4301, steps) == pytest.approx(0.00016927 * 4301 + 0.45666666, rel=1e-12)


def test_linear_mu_runs_from_half_at_256_tokens_to_1_15_at_4096() -> None:
    assert (schedules.linear_mu(256), schedules.linear_mu(4096)) == (0.5, pytest.approx(1.15))


def test_trap_sd35_shift_is_3() -> None:
    assert schedules.sd35().shift_for(28, None) == 3.0
    assert schedules.shifted(0.5, 3.0) == 0.75
    assert schedules.shifted(0.4, math.exp(2.0)) == pytest.approx(math.exp(2.0) / (math.exp(2.0) + 1 / 0.4 - 1))


def test_a_shift_by_tokens_asks_for_the_tokens() -> None:
    with pytest.raises(InputError, match="number of image tokens"):
        schedules.flux2().shift_for(20, None)


@pytest.mark.parametrize("t", [-1.0, 1000.5])
def test_times_outside_the_clock_are_refused(t: float) -> None:
    for schedule in (schedules.linear(), schedules.rectified_flow()):
        with pytest.raises(InputError, match="outside"):
            schedule.level(t)


def test_rescaled_timesteps_change_what_the_network_is_told_and_nothing_else() -> None:
    """Improved DDPM: T = 4000, the network is told t * 1000 / 4000 (Nichol 2021)."""
    plain = schedules.cosine(4000)
    ticked = replace(plain, tick=0.25)
    for t in (0, 1, 2049, 3999):
        assert ticked.level(t) == replace(plain.level(t), t=t / 4)
    assert ticked.level(10.5).t == 2.625 and ticked.level(10.5).sigma == plain.level(10.5).sigma
    t = torch.tensor([0, 7, 3999])
    assert torch.equal(ticked.levels(t).t, t / 4) and torch.equal(ticked.levels(t).alpha, plain.levels(t).alpha)
    assert (ticked.clock, plain.clock) == (1000.0, 4000.0)
    with pytest.raises(InputError, match="tick"):
        replace(plain, tick=0.0)


def test_a_tick_is_written_only_where_it_is_not_one() -> None:
    plain = Process(schedules.linear(), Prediction.EPSILON)
    ticked = Process(replace(schedules.linear(), tick=0.25), Prediction.EPSILON)
    assert set(plain.to_dict()["schedule"]) == {
        "kind", "betas", "beta_start", "beta_end", "timesteps", "zero_terminal_snr",
    }  # fmt: skip
    assert ticked.to_dict()["schedule"]["tick"] == 0.25
    assert Process.from_dict(json.loads(json.dumps(ticked.to_dict()))) == ticked != plain


# Objectives.


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_estimate_inverts_target_at_double_precision(process: Process) -> None:
    clean, noise = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4).flip(0)
    for fraction in (0.001, 0.3, 0.7, 0.95):
        level = process.level(float(int(fraction * 999)) if process.schedule.clock != 1.0 else fraction)
        if level.sigma == 0.0:
            continue
        x = process.noised(clean, noise, level)
        raw = prediction.target(process.prediction, clean, noise, level)
        parts = prediction.estimate(process.prediction, raw, x, level)
        assert float((parts.clean - clean).abs().max()) <= 1e-13 / max(level.alpha, 1e-3)
        assert float((parts.noise - noise).abs().max()) <= 1e-13 / max(level.sigma, 1e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_both_parts_always_add_up_to_x(process: Process) -> None:
    raw, x = drawn(2, 3), drawn(2, 3).flip(0)
    level = process.level(0.5 if process.schedule.clock == 1.0 else 500.0)
    parts = prediction.estimate(process.prediction, raw, x, level)
    assert float((process.noised(parts.clean, parts.noise, level) - x).abs().max()) <= 1e-14 / level.alpha


def test_batched_levels_equal_single_ones() -> None:
    for process in PROCESSES:
        clock = process.schedule.clock
        t = torch.tensor([0.1, 0.5, 0.9]) if clock == 1.0 else torch.tensor([1, 500, 999])
        batch = process.levels(t)
        assert batch.t.shape == (3,) and batch.alpha.shape == batch.sigma.shape == (3, 1, 1, 1)
        for i in range(3):
            single = process.level(float(t[i]))
            assert float(batch.alpha[i]) == pytest.approx(single.alpha, rel=2e-7, abs=1e-9)
            assert float(batch.sigma[i]) == pytest.approx(single.sigma, rel=2e-7, abs=1e-9)


def test_twice_the_channels_are_a_prediction_and_a_variance() -> None:
    raw, x, level = drawn(2, 6, 4, 4), drawn(2, 3, 4, 4), Level(500.0, 0.8, 0.6)
    first, variance = prediction.split(raw, 3)
    assert variance is not None and torch.equal(torch.cat((first, variance), 1), raw)
    assert prediction.split(first, 3) == (first, None)
    parts = prediction.estimate(Prediction.EPSILON, first.bfloat16(), x, level, variance.bfloat16())
    assert parts.variance is not None and parts.variance.dtype == torch.float64
    for objective in Prediction:
        told = prediction.estimate(objective, first, x, level, variance)
        silent = prediction.estimate(objective, first, x, level)
        assert torch.equal(told.clean, silent.clean) and torch.equal(told.noise, silent.noise)
        assert told.variance is not None and torch.equal(told.variance, variance) and silent.variance is None


def test_a_clipped_estimate_keeps_its_noise_or_still_adds_up_to_x() -> None:
    raw, x, level = 3 * drawn(2, 3), 3 * drawn(2, 3).flip(0), Level(500.0, 0.8, 0.6)
    parts = prediction.estimate(Prediction.EPSILON, raw, x, level, variance=raw)
    kept = prediction.clipped(parts, 0.7, x, level, noise_follows=False)
    follows = prediction.clipped(parts, 0.7, x, level, noise_follows=True)
    assert torch.equal(kept.clean, parts.clean.clamp(-0.7, 0.7)) and torch.equal(kept.noise, parts.noise)
    assert torch.equal(follows.clean, kept.clean) and float((kept.clean - parts.clean).abs().max()) > 1
    assert torch.allclose(level.alpha * follows.clean + level.sigma * follows.noise, x, rtol=0, atol=1e-14)
    assert kept.variance is follows.variance is parts.variance


def test_half_precision_outputs_become_float32_estimates() -> None:
    parts = prediction.estimate(Prediction.FLOW, drawn(2, 3).bfloat16(), drawn(2, 3).bfloat16(), Level(500.0, 0.5, 0.5))
    assert parts.clean.dtype == parts.noise.dtype == torch.float32


@pytest.mark.parametrize(
    ("schedule", "objective", "said"),
    [
        (schedules.zero_terminal_snr(schedules.linear()), Prediction.EPSILON, "zero terminal SNR"),
        (schedules.rectified_flow(), Prediction.EPSILON, "rectified_flow"),
        (schedules.rectified_flow(), Prediction.VELOCITY, "alpha\\^2"),
        (schedules.cosine(), Prediction.FLOW, "alpha \\+ sigma"),
    ],
)
def test_trap_objectives_that_do_not_fit_are_refused(
    schedule: schedules.Schedule, objective: Prediction, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Process(schedule, objective)
    assert str(objective) in str(caught.value)


# Weighting.


def level_of(process: Process, t: list[float]) -> Level[Tensor]:
    return process.levels(torch.tensor(t))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_equals_its_closed_forms(gamma: float) -> None:
    times = [10.0, 400.0, 900.0]
    for schedule in VP[:3]:
        snr = torch.tensor([schedule.level(t).alpha ** 2 / schedule.level(t).sigma ** 2 for t in times])
        capped = snr.clamp(max=gamma)
        forms = {
            Prediction.EPSILON: capped / snr,
            Prediction.CLEAN: capped,
            Prediction.VELOCITY: capped / (snr + 1),
        }
        for objective, expected in forms.items():
            process = Process(schedule, objective)
            ours = weighting.weights(process, level_of(process, times), "min_snr", gamma)
            assert torch.allclose(ours, expected, rtol=2e-5)
    process = Process(schedules.rectified_flow(), Prediction.FLOW)
    sigma = torch.tensor(times) / 1000
    expected = torch.minimum(((1 - sigma) / sigma) ** 2, torch.tensor(gamma)) * sigma**2
    assert torch.allclose(weighting.weights(process, level_of(process, times), "min_snr", gamma), expected, rtol=1e-5)


def test_min_snr_weighs_the_same_image_error_alike_whatever_the_objective() -> None:
    """weight * |error of raw|^2 must be min(SNR, gamma) * |error of clean|^2 for every objective."""
    for schedule, objectives in (
        (schedules.scaled_linear(), (Prediction.EPSILON, Prediction.CLEAN, Prediction.VELOCITY)),
        (schedules.rectified_flow(), (Prediction.CLEAN, Prediction.FLOW)),
    ):
        for t in (50.0, 300.0, 800.0):
            level = schedule.level(t)
            clean, noise, error = drawn(1, 1, 4, 4), drawn(1, 1, 4, 4).flip(-1), 1e-3 * drawn(1, 1, 4, 4).flip(-2)
            x = level.alpha * clean + level.sigma * noise
            for objective in objectives:
                process = Process(schedule, objective)
                raw = prediction.target(objective, clean, noise, level)
                wrong = raw + error
                weight = float(weighting.weights(process, level_of(process, [t]), "min_snr"))
                image = (prediction.estimate(objective, wrong, x, level).clean - clean).square().mean()
                expected = min((level.alpha / level.sigma) ** 2, 5.0) * float(image)
                assert weight * float(error.square().mean()) == pytest.approx(expected, rel=1e-4)


def test_pain_07_snr_weights_follow_the_rescaled_schedule() -> None:
    plain = Process(schedules.scaled_linear(), Prediction.VELOCITY)
    zero = Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY)
    times = [900.0, 999.0]
    a, b = (weighting.weights(process, level_of(process, times), "min_snr") for process in (plain, zero))
    level = zero.schedule.level(900)
    snr = (level.alpha / level.sigma) ** 2
    assert float(b[0]) == pytest.approx(snr / (snr + 1), rel=1e-5)
    assert float(b[1]) == 0.0 < float(a[1])
    assert abs(float(a[0] - b[0])) > 1e-3


def test_uniform_weights_are_one_and_unknown_names_are_refused() -> None:
    process = PROCESSES[0]
    assert torch.equal(weighting.weights(process, level_of(process, [1.0, 2.0])), torch.ones(2))
    with pytest.raises(InputError, match="min_snr"):
        weighting.weights(process, level_of(process, [1.0]), "minsnr")


def test_logit_normal_times_have_their_median_and_quartiles() -> None:
    process = Process(schedules.rectified_flow(), Prediction.FLOW)
    t = weighting.draw_times(process, 40_000, torch.Generator().manual_seed(0), "logit_normal", mean=0.5, std=1.2)
    for q, z in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        exact = 1000 / (1 + math.exp(-(0.5 + 1.2 * z)))
        assert float(t.quantile(q)) == pytest.approx(exact, abs=8)


def test_uniform_times_cover_the_clock_and_the_static_shift_bends_them() -> None:
    table = weighting.draw_times(PROCESSES[0], 20_000, torch.Generator().manual_seed(0))
    assert table.dtype == torch.int64 and int(table.min()) == 0 and int(table.max()) == 999
    assert float(table.float().mean()) == pytest.approx(499.5, abs=8)
    shifted = weighting.draw_times(Process(schedules.sd35(), Prediction.FLOW), 20_000, torch.Generator().manual_seed(0))
    assert float(shifted.median()) == pytest.approx(750, abs=8)


# Plain data.


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_a_process_survives_json(process: Process) -> None:
    assert Process.from_dict(json.loads(json.dumps(process.to_dict()))) == process


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prediction": "eps"}, "did you mean 'epsilon'"),
        ({"predicton": "epsilon"}, "did you mean 'prediction'"),
        ({"schedule": {"kind": "discret", "betas": "linear"}}, "did you mean 'discrete'"),
        ({"schedule": {"kind": "discrete", "betas": "scaled-linear"}}, "did you mean 'scaled_linear'"),
        ({"schedule": {"kind": "discrete", "betas": "linear", "beta_strt": 1}}, "did you mean 'beta_start'"),
        ({"schedule": {"kind": "discrete", "betas": "linear", "beta_start": "small"}}, "must be a number"),
        ({"schedule": {"kind": "discrete"}}, "needs the key 'betas'"),
        ({"schedule": {"kind": "rectified_flow", "low_end": "double"}}, "value of 'low_end'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(change: dict[str, object], said: str) -> None:
    data = {"prediction": "epsilon", "schedule": {"kind": "discrete", "betas": "linear"}, **change}
    with pytest.raises(InputError, match=said):
        Process.from_dict(data)


@pytest.mark.parametrize("numbers", [{"beta_end": 1.5}, {"beta_start": 0.1}, {"timesteps": 1}])
def test_impossible_tables_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(InputError, match="schedule"):
        schedules.Discrete("linear", **numbers)  # type: ignore[arg-type]


def test_impossible_flows_are_refused() -> None:
    for make in (lambda: schedules.rectified_flow(0.0), lambda: schedules.rectified_flow(clock=-1.0)):
        with pytest.raises(InputError, match="above 0"):
            make()


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="'prediction' and 'schedule'"):
        Process.from_dict({"prediction": "epsilon"})


def test_flows_are_told_apart_from_tables() -> None:
    assert isinstance(schedules.sd35(), RectifiedFlow) and schedules.sd35().low_end == "twice"
