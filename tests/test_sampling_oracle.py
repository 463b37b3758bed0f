"""Every sampler against the reference library: same network, same noise, same image to float rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sampling_oracle import (
    Row,
    difference,
    doubled_network,
    network,
    reference,
    rows,
    run_ours,
    run_reference,
    spaced,
    tensors,
    worst,
)

from mezzotint.process import Prediction, Process, schedules
from mezzotint.sampling import DDIM, DDPM, LCM, SAMPLERS, DPMpp2M, Euler, Heun, Sampler, Spacing, UniPC

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 and the reference

EPS, VEL = Prediction.EPSILON, Prediction.VELOCITY
RULES = {"leading": Spacing("leading", 1), "linspace": Spacing("linspace"), "trailing": Spacing("trailing")}
SOME = (1, 7, 20)


@pytest.mark.parametrize("row", rows(), ids=str)
def test_sampler_equals_the_reference_at_every_step_count_and_start(row: Row) -> None:
    sampler = SAMPLERS[row.sampler]
    assert worst(row, sampler) <= row.tolerance(sampler)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
)
def test_every_spacing_rule_equals_the_reference(name: str, rule: str) -> None:
    row = Row(name, "scaled_linear", EPS)
    sampler = spaced(SAMPLERS[name], RULES[rule])
    error = worst(row, sampler, SOME, timestep_spacing=rule, steps_offset=RULES[rule].offset)
    assert error <= row.tolerance(sampler)


@pytest.mark.parametrize("ramp", ["karras", "exponential"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_ramps_equal_the_reference(name: str, rule: str, ramp: str) -> None:
    row = Row(name, "scaled_linear", VEL)
    sampler = spaced(SAMPLERS[name], replace(RULES[rule], ramp=ramp))
    settings: dict[str, Any] = {
        f"use_{ramp}_sigmas": True,
        "timestep_spacing": rule,
        "steps_offset": RULES[rule].offset,
    }
    assert worst(row, sampler, SOME, **settings) <= row.tolerance(sampler)


@pytest.mark.parametrize("ramp", ["karras", "exponential"])
@pytest.mark.parametrize("schedule", ["flow", "flow_shift3"])
def test_ramps_on_a_flow_equal_the_reference(schedule: str, ramp: str) -> None:
    row = Row("flow_euler", schedule, Prediction.FLOW)
    sampler = spaced(SAMPLERS["flow_euler"], Spacing("linspace", ramp=ramp))
    assert worst(row, sampler, SOME, **{f"use_{ramp}_sigmas": True}) <= 5e-6


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_eta_equals_the_reference(eta: float) -> None:
    row = Row("ddim", "scaled_linear", EPS)
    assert worst(row, DDIM(eta=eta), SOME, exact=True, options={"eta": eta}) <= 5e-6


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_ddim_may_end_on_the_table(schedule: str) -> None:
    sampler = DDIM(spacing=Spacing("leading", 1), last="lowest")
    assert worst(Row("ddim", schedule, EPS), sampler, SOME, set_alpha_to_one=False, steps_offset=1) <= 5e-6


@pytest.mark.parametrize(("name", "steps"), [("dpmpp_2m", (2, 20)), ("dpmpp_2m_sde", (2, 20)), ("unipc", SOME)])
def test_multistep_solvers_may_end_on_the_table(name: str, steps: tuple[int, ...]) -> None:
    row = Row(name, "scaled_linear", EPS)
    sampler = replace(SAMPLERS[name], last="lowest")  # type: ignore[type-var]
    assert worst(row, sampler, steps, final_sigmas_type="sigma_min") <= 5e-6


@pytest.mark.parametrize("lower", [True, False])
def test_dpmpp_lower_order_final(lower: bool) -> None:
    sampler = DPMpp2M(lower_order_final=lower, last="lowest")
    row = Row("dpmpp_2m", "scaled_linear", EPS)
    assert worst(row, sampler, (4, 14, 15), lower_order_final=lower, final_sigmas_type="sigma_min") <= 5e-6


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("objective", [EPS, Prediction.CLEAN, VEL])
def test_unipc_orders(order: int, objective: Prediction) -> None:
    row = Row("unipc", "scaled_linear", objective)
    assert worst(row, UniPC(solver_order=order), solver_order=order) <= 5e-6


def test_dpmpp_first_order_is_ddim() -> None:
    row = Row("dpmpp_2m", "scaled_linear", EPS)
    assert worst(row, DPMpp2M(solver_order=1), SOME, solver_order=1) <= 5e-6


def test_ddpm_large_variance() -> None:
    row = Row("ddpm", "linear", EPS)
    assert worst(row, DDPM(variance="large"), (4, 20), variance_type="fixed_large") <= 5e-6


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize(
    "rule", ["leading", "linspace"]
)  # trailing ends above timestep 0, where the reference adds noise
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learned_variance_equals_the_reference(schedule: str, rule: str, clip: float | None) -> None:
    row, sampler = Row("ddpm", schedule, EPS), DDPM(spacing=Spacing(rule))
    noise, clean = tensors()
    limits = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    for steps in (7, 20, 100):
        for start in (0, steps // 2):
            scheduler = reference(row, variance_type="learned_range", timestep_spacing=rule, **limits)
            theirs = run_reference(scheduler, noise, clean, steps, start, exact=True, net=doubled_network)
            ours = run_ours(sampler, row.process, noise, clean, steps, start, net=doubled_network, clip=clip)
            fixed = run_ours(sampler, row.process, noise, clean, steps, start, clip=clip)
            assert difference(ours, theirs) <= 5e-6
            assert difference(fixed, theirs) > 2e-5


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddpm", "flow_euler")])
def test_other_samplers_leave_a_learned_variance_alone(name: str) -> None:
    process, (noise, clean) = Row(name, "linear", EPS).process, tensors()
    told, silent = (run_ours(SAMPLERS[name], process, noise, clean, 7, 0, net=n) for n in (doubled_network, network))
    assert torch.equal(told, silent)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lcm", "flow_euler")])
def test_rescaled_timesteps_reach_the_network_and_nothing_else(name: str) -> None:
    """Improved DDPM's clock: a network that is told t * 1000 / T and one that divides for itself draw one image."""
    plain = Process(schedules.cosine(4000), EPS)
    ticked = Process(replace(schedules.cosine(4000), tick=0.25), EPS)
    noise, clean = tensors()
    for steps, start in ((7, 0), (20, 10)):
        told = run_ours(SAMPLERS[name], ticked, noise, clean, steps, start)
        counts = run_ours(SAMPLERS[name], plain, noise, clean, steps, start, net=lambda x, t: network(x, 0.25 * t))
        assert torch.equal(told, counts)


@pytest.mark.parametrize("total", [1000, 4000])
def test_improved_diffusion_s_own_respacing_is_ddpm_on_linspace(total: int) -> None:
    """Its "250": strides of (T - 1) / (n - 1) added up and rounded, every one stepping to the next."""
    process = Process(schedules.cosine(total), EPS)
    for steps in (1, 2, 7, 25, 50, 100, 250, 500):
        stride, at, wanted = (total - 1) / (steps - 1) if steps > 1 else 1.0, 0.0, []
        for _ in range(steps):
            wanted.append(float(round(at)))
            at += stride
        walk = DDPM(spacing=Spacing("linspace")).path(process, steps).steps
        assert [step.now.t for step in walk] == wanted[::-1]
        assert [step.next for step in walk[:-1]] == [step.now for step in walk[1:]]


@pytest.mark.parametrize("original", [10, 50, 100])
def test_lcm_chooses_among_the_distilled_steps(original: int) -> None:
    row = Row("lcm", "scaled_linear", EPS)
    assert worst(row, LCM(original_steps=original), (1, 3, 4, 8), original_inference_steps=original) <= 5e-6


# The traps of the reference, one test each.


def times(
    sampler: Sampler, schedule: str = "scaled_linear", steps: int = 20, objective: Prediction = EPS
) -> list[float]:
    row = Row("ddim", schedule, objective)
    return [step.now.t for step in sampler.path(row.process, steps).steps]


@pytest.mark.parametrize("sampler", [DDIM(), DDPM(), Euler(), Heun()])
def test_trap_leading_starts_at_951(sampler: Sampler) -> None:
    assert times(spaced(sampler, Spacing("leading", 1)))[:3] == [951, 901, 851]


@pytest.mark.parametrize("sampler", [DPMpp2M(), UniPC()])
def test_trap_leading_starts_at_941_for_multistep_solvers(sampler: Sampler) -> None:
    assert times(spaced(sampler, Spacing("leading", 1)))[:3] == [941, 894, 847]


def test_trap_linspace_is_rounded_by_ddim_and_kept_by_euler() -> None:
    linspace = Spacing("linspace")
    assert times(spaced(DDIM(), linspace))[1] == 946
    assert times(Euler())[1] == pytest.approx(946.42105, abs=1e-4)


def test_trap_ddim_steps_to_t_minus_stride_and_not_to_the_next_listed() -> None:
    path = DDIM(spacing=Spacing("trailing")).path(Row("ddim", "scaled_linear", EPS).process, 7)
    assert [step.now.t for step in path.steps][:3] == [999, 856, 713]
    assert [step.next.t for step in path.steps][:2] == [857, 714]


def test_trap_start_scale_is_below_one_under_linspace_and_trailing() -> None:
    process = Row("euler", "scaled_linear", EPS).process
    assert Euler().path(process, 20).start_scale == pytest.approx(0.99767, abs=5e-6)
    assert Euler(spacing=Spacing("trailing")).path(process, 20).start_scale == pytest.approx(0.99767, abs=5e-6)
    assert Euler(spacing=Spacing("leading", 1)).path(process, 20).start_scale == 1.0
    assert DPMpp2M().path(process, 20).start_scale == 1.0


def test_trap_karras_times_are_rounded_by_multistep_solvers_and_kept_by_euler() -> None:
    karras = Spacing("linspace", ramp="karras")
    kept, rounded = times(spaced(Euler(), karras)), times(spaced(UniPC(), karras))
    assert rounded == [round(t) for t in kept] and kept != rounded
    cut = times(spaced(DPMpp2M(), karras), "cosine")
    assert cut == [float(int(t)) for t in times(spaced(Euler(), karras), "cosine")]


def test_trap_heun_evaluates_2n_minus_1_times() -> None:
    row = Row("heun", "scaled_linear", EPS)
    scheduler = reference(row)
    scheduler.set_timesteps(20)
    path = Heun().path(row.process, 20)
    assert len(path.steps) == 20
    assert len(scheduler.timesteps) == sum(1 if step.next.sigma == 0.0 else 2 for step in path.steps) == 39


def test_trap_static_shift_is_doubled_at_the_low_end() -> None:
    def last(schedule: schedules.RectifiedFlow) -> float:
        return SAMPLERS["flow_euler"].path(Process(schedule, Prediction.FLOW), 4).steps[-1].now.sigma

    assert last(schedules.sd35()) == pytest.approx(0.00893, abs=5e-6)
    assert last(schedules.rectified_flow(3.0, low_end="once")) == pytest.approx(0.00299, abs=5e-6)
    assert last(schedules.rectified_flow(1.0, low_end="even")) == 0.25


def test_trap_flow_times_are_cut_by_multistep_solvers_and_kept_by_euler() -> None:
    process = Row("flow_euler", "flow_shift3", Prediction.FLOW).process
    for name in ("dpmpp_2m", "unipc"):
        assert all(step.now.t == int(step.now.sigma * 1000) for step in SAMPLERS[name].path(process, 20).steps)
    assert any(step.now.t % 1 for step in SAMPLERS["flow_euler"].path(process, 20).steps)


@pytest.mark.parametrize(("tokens", "steps"), [(4096, 50), (4096, 28), (4096, 4), (1024, 20), (8100, 50)])
def test_trap_flux2_levels(tokens: int, steps: int) -> None:
    import diffusers
    import numpy as np

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=schedules.flux2_mu(tokens, steps))
    path = SAMPLERS["flow_euler"].path(Process(schedules.flux2(), Prediction.FLOW), steps, tokens=tokens)
    ours = [step.now.sigma for step in path.steps] + [path.steps[-1].next.sigma]
    assert ours == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)
    assert [step.now.t for step in path.steps] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
