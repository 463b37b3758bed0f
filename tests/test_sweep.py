"""The sweep against closed forms: where the path ends, how fast samplers get there, what is kept and what is told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import torch
from parts import class_model, model, pixel_codec, plain_unet
from sweep_parts import FLOW, SIDE, SPREAD, VP, Gaussian, end, gaussian, noise_of, setting, subject

from mezzotint.contract import GuidanceFacts, SamplingFacts
from mezzotint.errors import InputError
from mezzotint.evaluate.sweep import meter, ode, report
from mezzotint.evaluate.sweep.measure import Sweep, measure
from mezzotint.evaluate.sweep.reference import converge, pixel_error
from mezzotint.evaluate.sweep.results import Interval, gather, pareto
from mezzotint.evaluate.sweep.setting import Setting, Target, evaluations, grid
from mezzotint.evaluate.sweep.store import Store
from mezzotint.evaluate.sweep.subject import Subject, wishes
from mezzotint.generate import generate
from mezzotint.process import Prediction, Process, schedules
from mezzotint.request import Request

if TYPE_CHECKING:
    from mezzotint.text import TextEncoder

NONE = Target(1.0)
COSINE = Process(schedules.cosine(), Prediction.EPSILON)
ZERO = Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY)


# The reference.


@pytest.mark.parametrize("process", [VP, FLOW, COSINE, ZERO], ids=["scaled_linear", "flow", "cosine", "zero_snr"])
def test_the_reference_is_where_the_flow_ends(process: Process) -> None:
    found = converge(subject(process), NONE)
    assert found.converged and found.steps <= 200
    truth = end(process, noise_of(4))
    assert float((found.latents - truth).abs().max()) < 2e-3 * SPREAD
    assert found.errors(found.latents[2:], 2) == [0.0, 0.0]


def test_the_fine_path_converges_faster_than_its_error_is_asked_to_be() -> None:
    truth = end(VP, noise_of(2))
    model = gaussian(VP)
    requests = [Request(seed=0), Request(seed=1)]
    errors = [float((ode.walked(model, requests, n)[0] - truth).abs().max()) for n in (25, 50, 100)]
    assert all(math.log2(a / b) > 1.7 for a, b in pairwise(errors)), errors


ORDERS = {"ddim": 1, "euler": 1, "heun": 2}


def errors_of(name: str, counts: tuple[int, ...]) -> list[float]:
    asked = subject(VP, count=2)
    reference = converge(asked, NONE)
    return [
        float(np.mean(reference.errors(torch.cat([r.latents for r in asked.draw(setting(name, n), asked.wishes)]), 0)))
        for n in counts
    ]


@pytest.mark.parametrize("name", ORDERS)
def test_measured_errors_fall_with_the_order_of_the_sampler(name: str) -> None:
    """On whole paths as generate walks them."""
    errors = errors_of(name, (10, 20, 40))
    slope = math.log2(errors[0] / errors[-1]) / 2
    assert slope > ORDERS[name] - 0.35, errors
    assert slope < ORDERS[name] + 0.35 or name == "heun", errors  # whose error passes zero near 40 steps


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_without_a_ramp_the_error_of_fine_solvers_is_their_last_jump(name: str) -> None:
    """Linspace leaves the lowest timestep out, so the last jump starts at T / n: first order, whatever the solver."""
    table, counts = VP.schedule, (20, 40)
    last, *starts = (table.level(float(t)) for t in (0, *(round(999 / n) for n in counts)))
    kept = [level.alpha / math.hypot(level.alpha * SPREAD, level.sigma) for level in (last, *starts)]
    jumps = [1 - each / kept[0] for each in kept[1:]]  # the deviation of E(clean | x), of that at the lowest level
    assert errors_of(name, counts) == pytest.approx(jumps, rel=0.16)


def test_a_picture_enters_the_fine_path_where_its_strength_says() -> None:
    grey = images_of(0.5)
    asked = [Request(seed=0, image=grey, strength=0.4)]
    model = gaussian(VP)
    ours, _ = ode.walked(model, asked, 200)
    usual = generate(model, replace(asked[0], sampler="unipc", steps=200)).latents
    assert float((ours - usual).abs().max()) < 0.015  # the last jump from T / 200


def test_masked_pixels_stay_and_guidance_is_the_requests_own() -> None:
    subject = class_model()
    mask = images_of(-1.0)
    mask.paste(255, (4, 4, 12, 12))
    asked = Request(label="crack", image=images_of(0.2), mask=mask, guidance=3.0, width=SIDE, height=SIDE)
    fine, pictures = ode.walked(subject, [asked], 50)
    usual = generate(subject, replace(asked, sampler="unipc", steps=150))
    inside = np.asarray(mask) > 0
    assert np.array_equal(np.asarray(pictures[0])[~inside], np.asarray(usual.images[0])[~inside])
    assert float((fine - usual.latents).abs().mean()) < 0.02


def images_of(value: float):
    from PIL import Image

    return Image.new("L", (SIDE, SIDE), round((value + 1) * 127.5))


# The grid.


def test_the_grid_has_every_combination_once_and_none_that_changes_nothing() -> None:
    found = grid(
        class_model(), Request(label=0), ("ddim", "unipc"), (4, 8), (1.0, 3.0), (0.0, 0.7), [(0, 1), (0.2, 0.8)]
    )
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2 * 2)
    assert {s.interval for s in found if s.target.guidance == 1.0} == {(0.0, 1.0)}
    assert found[0].sampler == "ddim" and found[0].steps == 4


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"samplers": ("dppm",)}, "dppm, 4 steps, guidance 1: unknown sampler 'dppm': did you mean 'ddpm'"),
        ({"samplers": ("flow_euler",)}, "flow_euler, 4 steps, guidance 1: sampler 'flow_euler' cannot serve"),
        ({"steps": (2000,)}, "2000 steps cannot be placed"),
        ({"samplers": ("lcm",), "steps": (60,)}, "lcm, 60 steps, guidance 1: sampler 'lcm' cannot take 60 steps"),
    ],
)
def test_what_the_model_cannot_serve_is_refused_before_the_work(asked: dict, said: str) -> None:
    with pytest.raises(InputError) as raised:
        grid(gaussian(VP), Request(), **{"steps": (4,), **asked})
    assert said in str(raised.value)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_evaluations_are_what_the_network_really_does(sampler: str, interval: tuple[float, float]) -> None:
    subject = class_model()
    seen: list[int] = []
    handle = subject.backbone.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    for scale in (1.0, 3.0):
        seen.clear()
        request = setting(sampler, 6, scale, interval=interval).request(Request(label=1))
        generate(subject, request)
        assert sum(seen) == evaluations(subject, request)
    handle.remove()


def test_wishes_take_turns_and_text_must_be_told() -> None:
    base = Request(seed=7)
    found = wishes(class_model(), base, 5)
    assert [wish.label for wish in found] == [0, 1, 2, 0, 1] and [wish.seed for wish in found] == [7, 8, 9, 10, 11]
    assert [wish.label for wish in wishes(class_model(), base, 2, labels=("crack",))] == ["crack", "crack"]
    assert [wish.prompt for wish in wishes(gaussian(VP), base, 2)] == ["", ""]
    reader = replace(gaussian(VP), text=cast("TextEncoder", object()))
    with pytest.raises(InputError, match="give at least one --prompt, or --data with captions"):
        wishes(reader, base, 2)
    assert [wish.prompt for wish in wishes(reader, base, 3, ("a", "b"))] == ["a", "b", "a"]


def test_the_command_is_the_setting(tmp_path: Path) -> None:
    plain = setting("unipc", 8, 3.5)
    assert plain.command(Path("a model"), Request(prompt="a crack", negative="dark")) == (
        "mezzotint generate 'a crack' --model 'a model' --negative dark --sampler unipc --steps 8 --guidance 3.5 "
        "--out out/images"
    )
    wish = Request(label=2, lora=[(Path("a.safetensors"), 0.8)])
    told = setting("ddim", 8, 3.5, interval=(0.2, 0.8)).command(Path("m"), wish)
    assert told == (
        "mz.generate(mz.load('m'), mz.Request(label=2, lora=[('a.safetensors', 0.8)], sampler='ddim', steps=8, "
        "guidance=3.5, guidance_interval=(0.2, 0.8)))"
    )
    assert setting("ddim", 8).command(Path("m"), Request(negative="x"), ("--size", "8x8")) == (
        "mezzotint generate --model m --sampler ddim --steps 8 --guidance 1 --size 8x8 --out out/images"
    )


# Measuring, keeping, judging.


def sweep_of(folder: Path, subject: Subject, *settings: Setting, compares: bool = False) -> Sweep:
    return Sweep(subject, settings, Store(folder / "store"), compares)


def test_a_stopped_sweep_goes_on_and_a_longer_list_adds_to_it(tmp_path: Path) -> None:
    asked = subject(VP, count=4, batch=2)
    network = asked.models["float32"].backbone
    assert isinstance(network, Gaussian)
    first, second = setting("ddim", 4), setting("unipc", 4)
    stopped = 0

    def stop(what: str, done: float, all: float) -> None:
        nonlocal stopped
        stopped += what.startswith("round")
        if stopped == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(sweep_of(tmp_path, asked, first, second), stop)
    network.calls = 0
    references = measure(sweep_of(tmp_path, asked, first, second))
    assert 0 < network.calls <= 3 * 4  # of four batches the first ones were there, and so was the reference
    network.calls = 0
    again = sweep_of(tmp_path, asked, first, second)
    measure(again)
    assert network.calls == 0
    third = setting("heun", 4)
    longer = sweep_of(tmp_path, asked, first, second, third)
    measure(longer)
    assert network.calls == 2 * 7 + 4  # the new one in two rounds, and the baseline beside it
    results = gather(longer, references, tolerance=4.0)
    assert [row.pairs for row in results.rows][-1] == 1
    assert all(row.latent is not None and row.seconds for row in results.rows)


def test_another_model_or_another_noise_is_measured_anew(tmp_path: Path) -> None:
    asked = subject(VP, count=2)
    one = sweep_of(tmp_path, asked, setting("ddim", 4))
    other = replace(asked, wishes=tuple(Request(seed=9 + i) for i in range(2)))
    weights = asked.models["float32"]
    renamed = replace(weights, contract=weights.contract.model_copy(update={"weights": "other"}))
    keys = {
        json.dumps(sweep_of(tmp_path, each, setting("ddim", 4)).identity(setting("ddim", 4), 0), sort_keys=True)
        for each in (asked, other, replace(asked, models={"float32": renamed}))
    }
    assert len(keys) == 3 and one.reference_keys[NONE] in next(iter(k for k in keys if one.reference_keys[NONE] in k))


def test_errors_are_those_of_the_images_and_the_judgement_follows(tmp_path: Path) -> None:
    asked = subject(VP, count=4, batch=2)
    settings = [setting(name, steps) for name in ("ddim", "unipc") for steps in (5, 40)] + [setting("ddpm", 5)]
    sweep = sweep_of(tmp_path, asked, *settings)
    references = measure(sweep)
    results = gather(sweep, references, tolerance=2.0, price=36.0)
    rows = {(row.setting.sampler, row.setting.steps): row for row in results.rows}
    for (name, steps), row in rows.items():
        if name == "ddpm":
            assert row.latent is None and row.pixel is None and row.setting.stochastic
            continue
        drawn = [generate(asked.models["float32"], Request(seed=i, sampler=name, steps=steps)) for i in range(4)]
        latent = [references[NONE].errors(each.latents, i)[0] for i, each in enumerate(drawn)]
        assert row.latent is not None and row.latent.value == pytest.approx(np.mean(latent), rel=1e-4)
        truth = [pixel_error(each.images[0], references[NONE].pictures[i]) for i, each in enumerate(drawn)]
        assert row.pixel is not None and row.pixel.value == pytest.approx(np.mean(truth), rel=1e-4)
        assert row.money == pytest.approx(36.0 / 3600 * (row.seconds or 0))
        assert row.pairs == 1
    assert results.best is not None and results.best.pixel.high <= 2.0
    assert results.best.seconds == min(row.seconds for row in results.rows if row.pixel and row.pixel.high <= 2.0)
    strict = gather(sweep, references, tolerance=1e-6)
    assert strict.best is not None and "nothing is sure to stay within" in strict.why
    assert strict.best.pixel.value == min(row.pixel.value for row in results.rows if row.pixel)


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (3.0, 4.0), (4.0, 1.0), (5.0, 2.0), (1.0, 7.0)]
    brute = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    assert pareto(points, lambda p: p) == sorted(brute)


def test_seconds_are_paired_with_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine three times as slow in one round does not speak against what met it there: ratios stay."""
    asked = subject(VP, count=8, batch=2)
    settings = (setting("ddim", 2), setting("ddim", 4), setting("ddim", 8))
    speed = iter([1.0] * 3 + [3.0] * 3 + [1.0] * 3)  # one a timed draw, by round

    def timed(work, device):
        result = work()
        steps = timed.steps.pop(0)
        return result, steps * next(speed)

    order = []
    for index in (1, 2, 3):
        order += [s.steps for s in settings[index % 3 :] + settings[: index % 3]]
    timed.steps = order
    monkeypatch.setattr(meter, "timed", timed)
    sweep = sweep_of(tmp_path, asked, *settings)
    results = gather(sweep, measure(sweep), tolerance=4.0)
    assert [row.ratio.value for row in results.rows if row.ratio] == [0.5, 1.0, 2.0]
    assert [row.seconds for row in results.rows] == [1.0, 2.0, 4.0]
    assert all(row.pairs == 3 for row in results.rows)


def test_a_setting_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    asked = subject(VP, count=2, batch=1)
    broken = replace(asked.models["float32"], backbone=Gaussian(VP))
    broken.backbone.half()
    forward = broken.backbone.forward
    broken.backbone.forward = lambda x, t, c: forward(x, t, c) * math.nan
    asked = replace(asked, models={**asked.models, "float16": broken})
    sweep = sweep_of(tmp_path, asked, setting("ddim", 4), setting("ddim", 4, dtype="float16"))
    results = gather(sweep, measure(sweep), tolerance=100.0)
    good, bad = results.rows
    assert "not finite" in bad.failure and bad.seconds is None and results.best is good
    assert "failed" in report.columns(results)


def test_samplers_of_fresh_noise_are_compared_as_sets(tmp_path: Path) -> None:
    """Enough steps of DDPM draw the distribution that the flow draws; one step does not."""
    asked = subject(VP, count=16, batch=8)
    sweep = sweep_of(tmp_path, asked, setting("ddpm", 60), setting("ddpm", 2), setting("ddim", 20), compares=True)
    results = gather(sweep, measure(sweep), tolerance=4.0)
    fine, coarse, ode = (row.converged["frechet"] for row in results.rows)
    assert fine["distance"] < 2 * fine["floor_high"]
    assert coarse["distance"] > 2 * fine["distance"]
    assert ode["distance"] < 2 * ode["floor_high"]


def test_a_distilled_network_has_no_reference(tmp_path: Path) -> None:
    facts = SamplingFacts(sampler="lcm", steps=4)
    asked = subject(VP, count=2, sampling=facts, guidance=GuidanceFacts(distilled=True))
    with pytest.raises(InputError, match="follows no ODE"):
        converge(asked, NONE)
    settings = grid(asked.models["float32"], Request())
    assert {s.sampler for s in settings} == {"lcm"} and all(s.stochastic for s in settings)
    sweep = sweep_of(tmp_path, asked, *settings[:2])
    results = gather(sweep, measure(sweep), tolerance=4.0)
    assert results.best is None and "--data" in results.why


def test_intervals_hold_the_mean() -> None:
    found = Interval.of([1.0, 2.0, 3.0, 4.0])
    assert found == Interval(2.5, pytest.approx(2.5 - 1.96 * math.sqrt(5 / 3) / 2), pytest.approx(3.765, abs=1e-3))
    assert Interval.of([]) is None and Interval.of([2.0]) == Interval(2.0, 2.0, 2.0)


@pytest.mark.skipif(not meter.PEAK.exists(), reason="peaks are read from Linux's /proc")
def test_the_peak_is_what_the_work_needs_beyond_what_is_held() -> None:
    held = torch.ones(8_000_000)
    device = torch.device("cpu")
    result, bytes_ = meter.peak(lambda: float((torch.ones(16_000_000) * 2).sum()), device)
    assert result == 32e6 and bytes_ is not None and 100e6 < bytes_ < 170e6
    assert float(held[0]) == 1.0
    network = model(plain_unet(3, 3), pixel_codec())
    assert meter.weights(network) == sum(p.numel() * 4 for p in network.backbone.parameters())
