"""The doctor's one experiment, on a network that is right in closed form: what is claimed wrongly is named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from doctor_parts import CHANNELS, CLASSES, CLEAN, EPSILON, FLOW, VELOCITY, ZERO, World, examined
from torch import Tensor

from mezzotint.codec import Codec, LatentSpace
from mezzotint.contract import GuidanceFacts, SamplingFacts
from mezzotint.doctor import consistency, readings, relabelling, statistics, trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.causes import CAUSES, brings, ranked
from mezzotint.doctor.diagnose import diagnose
from mezzotint.doctor.finding import Diagnosis, Finding, Grade
from mezzotint.process import Discrete, Prediction, Process, RectifiedFlow

PROCESSES = {"flow": FLOW, "epsilon": EPSILON, "velocity": VELOCITY, "clean": CLEAN, "zero": ZERO}
PROBES = ("latent", "objective", "schedule", "text", "guidance", "sampler")
TRAILING = {"sampling": SamplingFacts(sampler="ddim", steps=20, spacing="trailing")}


def found(case: Case, names: tuple[str, ...] = PROBES) -> tuple[list[str], Diagnosis]:
    """The causes that are more than a note, in order."""
    diagnosis = diagnose(case, names)
    return [each.cause for each in diagnosis.findings if each.grade != "note"], diagnosis


@pytest.mark.parametrize("name", PROCESSES)
def test_a_network_that_is_right_is_healthy(name: str) -> None:
    facts = TRAILING if name in ("zero", "clean") else {}  # schedules that end in noise
    causes, diagnosis = found(examined(PROCESSES[name], steered=True, facts=facts))
    assert causes == []
    assert diagnosis.healthy
    assert all(outcome.checked for outcome in diagnosis.outcomes)


@pytest.mark.parametrize("true", PROCESSES)
@pytest.mark.parametrize("claimed", PROCESSES)
def test_every_objective_is_told_from_every_other(claimed: str, true: str) -> None:
    if PROCESSES[claimed].prediction is PROCESSES[true].prediction:
        return
    causes, diagnosis = found(examined(PROCESSES[claimed], PROCESSES[true]), ("objective", "schedule"))
    assert causes[0] == "objective"
    stated = f"State the objective that the network was trained with: {PROCESSES[true].prediction}."
    assert diagnosis.findings[0].do == stated


def test_pain_01_velocity_claimed_of_an_epsilon_network_is_named() -> None:
    causes, diagnosis = found(examined(VELOCITY, EPSILON))
    assert causes[0] == "objective"
    assert "epsilon" in diagnosis.findings[0].do


def test_pain_02_epsilon_claimed_of_a_velocity_network_is_named() -> None:
    causes, diagnosis = found(examined(EPSILON, VELOCITY))
    assert causes[0] == "objective"
    assert "velocity" in diagnosis.findings[0].do


def test_pain_06_zero_terminal_noise_that_was_trained_and_is_not_claimed_is_named() -> None:
    causes, _ = found(examined(VELOCITY, ZERO, count=64), ("latent", "objective", "schedule"))
    assert causes == ["schedule.terminal"]


@pytest.mark.parametrize(
    ("claimed", "true"),
    [
        (Process(RectifiedFlow(clock=1.0), Prediction.FLOW), FLOW),
        (FLOW, Process(RectifiedFlow(clock=1.0), Prediction.FLOW)),
        (replace(EPSILON, schedule=replace(EPSILON.schedule, tick=1e-3)), EPSILON),
        (EPSILON, replace(EPSILON, schedule=replace(EPSILON.schedule, tick=1e-3))),
    ],
)
def test_a_clock_of_another_scale_is_named(claimed: Process, true: Process) -> None:
    assert found(examined(claimed, true), ("latent", "objective", "schedule"))[0][:1] == ["schedule.clock"]


@pytest.mark.parametrize(
    "true", [Discrete("linear", 1e-4, 0.02), Discrete("cosine", 0.0, 0.999), Discrete("scaled_linear", 0.002, 0.15)]
)
def test_another_schedule_is_named(true: Discrete) -> None:
    causes, _ = found(examined(VELOCITY, Process(true, Prediction.VELOCITY)), ("latent", "objective", "schedule"))
    assert causes[:1] == ["schedule.levels"]


@pytest.mark.parametrize("factor", [0.13, 0.4, 2.5, 7.0])
def test_latents_in_other_units_are_named_with_the_factor(factor: float) -> None:
    case = examined(EPSILON)
    codec = Codec(case.bare.codec.autoencoder, LatentSpace(scale=factor))
    case = replace(case, bare=replace(case.bare, codec=codec), memory={})
    causes, diagnosis = found(case, ("latent", "objective", "schedule"))
    assert causes[0] == "latent.scale"
    assert float(trials.scales(case).best.name) == pytest.approx(1 / factor, rel=0.25)
    assert "scale" in diagnosis.findings[0].do


def test_pain_05_a_shift_that_was_dropped_is_named() -> None:
    case = examined(FLOW)
    codec = Codec(case.bare.codec.autoencoder, LatentSpace(shift=(0.9, -0.8, 1.0)))
    case = replace(case, bare=replace(case.bare, codec=codec), memory={})
    causes, _ = found(case, ("latent", "objective", "schedule"))
    assert causes[0] == "latent.shift"
    assert trials.shifts(case)[1] == pytest.approx([0.9, -0.8, 1.0], abs=0.3)


def test_channels_in_another_order_are_named_with_the_order() -> None:
    order = [2, 0, 1]

    class Turned(Codec):
        def encode(self, pixels: Tensor) -> Tensor:
            return super().encode(pixels)[:, order]

    case = examined(FLOW)
    case = replace(case, bare=replace(case.bare, codec=Turned(case.bare.codec.autoencoder)), memory={})
    causes, diagnosis = found(case, ("latent", "objective", "schedule"))
    assert causes[0] == "latent.order"
    back = torch.argsort(torch.tensor(order)).tolist()
    assert " ".join(map(str, back)) in diagnosis.findings[0].says


def test_images_that_another_codec_made_are_told_from_a_wrong_process() -> None:
    pixels = World.made(seed=5).draw(torch.full((24,), len(CLASSES)))
    causes, _ = found(examined(FLOW, pixels=pixels), ("latent", "objective", "schedule"))
    assert causes[:1] == ["latent.codec"]


def test_labels_that_mean_other_classes_are_named() -> None:
    labels = (torch.arange(24) + 1) % len(CLASSES)
    causes, diagnosis = found(examined(FLOW, steered=True, labels=labels))
    assert causes == ["text.labels"]
    assert "0 for 2" in diagnosis.findings[0].says or "0 for" in diagnosis.findings[0].says


def test_labels_two_of_which_were_exchanged_are_named() -> None:
    labels = torch.tensor([0, 2, 1])[torch.arange(60) % len(CLASSES)]  # a third of what labels change is right
    case = examined(FLOW, steered=True, labels=labels, count=60)
    assert relabelling.exchanged(case, [str(label) for label in labels.tolist()])
    assert found(case, ("text",))[0] == ["text.labels"]
    right = examined(FLOW, steered=True, count=60)
    assert not relabelling.exchanged(right, [str(i % len(CLASSES)) for i in range(60)])


def test_a_network_that_does_not_listen_is_named() -> None:
    assert found(examined(FLOW, steered=True, deaf=True))[0][0] == "text.ignored"


@pytest.mark.parametrize("scale", [0.01, 0.1])
def test_a_network_that_listens_too_little_is_named(scale: float) -> None:
    case = examined(FLOW, steered=True, guided=scale)
    assert consistency.weight(case).value == pytest.approx(1 / scale, rel=0.25)
    assert found(case)[0] == ["text.ignored"]


def test_a_network_that_labels_change_to_no_purpose_is_named() -> None:
    assert found(examined(FLOW, steered=True, deaf=True, babble=0.01), ("text",))[0] == ["text.ignored"]


def test_what_a_caption_changes_is_right_in_a_network_that_is() -> None:
    weight = consistency.weight(examined(FLOW, steered=True, count=400))
    assert weight.value == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("scale", [3.0, 7.5])
def test_guidance_that_is_built_in_is_told_from_labels_that_are_wrong(scale: float) -> None:
    case = examined(FLOW, steered=True, count=400, guided=scale)
    assert consistency.weight(case).value == pytest.approx(1 / scale, abs=0.02)
    assert consistency.guided(case)
    some = torch.randperm(400, generator=torch.Generator().manual_seed(1)) % len(CLASSES)
    wrong = examined(FLOW, steered=True, count=400, labels=some)
    assert consistency.told(wrong).value == pytest.approx(0.5, abs=0.08)  # by chance
    assert not consistency.guided(wrong)
    assert found(wrong, ("text", "guidance"))[0] == ["text.labels"]


def test_what_is_told_is_asked_again_until_it_is_sure() -> None:
    wrong = torch.tensor([0, 2, 1, 0, 1, 2, 1, 0, 2, 1, 2, 0])
    few, many = (
        examined(FLOW, steered=True, count=n, labels=own) for n, own in ((12, wrong), (400, torch.arange(400) % 3))
    )
    assert consistency.told(many).value == pytest.approx(1, abs=0.05)
    assert consistency.told(few).value == pytest.approx(0.5, abs=0.3)
    rounds = [sum(name.startswith("exchanged") for name in case.memory) for case in (few, many)]
    assert rounds[1] == 1 < rounds[0] <= consistency.ROUNDS


def test_the_slope_is_one_at_every_level_and_falls_in_a_distilled_network() -> None:
    exact = consistency.calibration(examined(FLOW, count=400))
    assert exact.noisy.value == pytest.approx(1, abs=0.12)
    assert exact.quiet.value == pytest.approx(1, abs=0.01)
    assert not exact.distilled
    weak = World.made(size=0.25, brightness=1.0)  # of which nothing can be seen at the noisiest level
    assert consistency.calibration(examined(FLOW, sharp=True, count=48, world=weak)).distilled


def test_pain_10_guidance_on_a_distilled_network_is_named() -> None:
    facts = {"guidance": GuidanceFacts(dropout=0.1, scale=4.0)}
    weak = World.made(size=0.25, brightness=1.0)
    case = examined(FLOW, steered=True, sharp=True, facts=facts, world=weak, count=64)
    causes, _ = found(case, ("guidance", "sampler"))
    assert causes[0] == "guidance.distilled"


def test_a_branch_that_was_never_trained_is_named_where_what_is_said_is_understood() -> None:
    facts = {"guidance": GuidanceFacts(dropout=0.1, scale=3.0)}
    for astray in (1.0, 3.0):
        causes, _ = found(examined(FLOW, steered=True, facts=facts, astray=astray, count=64), ("guidance",))
        assert causes[:1] == ["guidance.untrained"]
    strange = examined(FLOW, steered=True, facts=facts, astray=0.15, deaf=True, count=64)
    assert "guidance.untrained" not in found(strange, ("guidance",))[0]


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({"sampling": SamplingFacts(sampler="ddim", steps=2)}, "sampler.steps"),
        ({"sampling": SamplingFacts(sampler="lcm", steps=4)}, "sampler.unfit"),
    ],
)
def test_a_path_that_does_not_arrive_is_named(facts: dict[str, SamplingFacts], cause: str) -> None:
    assert found(examined(VELOCITY, facts=facts), ("sampler",))[0] == [cause]


def test_fresh_noise_over_the_whole_schedule_needs_no_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.doctor.probes.sampler.ROUGH", 0.0)  # whatever it draws is far from converged
    process = Process(Discrete("scaled_linear", 0.0085, 0.12, timesteps=100), Prediction.EPSILON)
    for steps, causes in ((40, 1), (100, 0)):
        facts = {"sampling": SamplingFacts(sampler="ddpm", steps=steps)}
        named, _ = found(examined(process, facts=facts), ("sampler",))
        assert sum(cause in ("sampler.unfit", "sampler.steps") for cause in named) == causes


def test_pain_08_a_shift_that_does_not_fit_is_named() -> None:
    process = Process(RectifiedFlow(shift=60.0), Prediction.FLOW)
    facts = {"sampling": SamplingFacts(sampler="flow_euler", steps=30)}
    causes, diagnosis = found(examined(process, facts=facts), ("sampler",))
    assert causes == ["schedule.shift"]
    assert "shift" in diagnosis.findings[0].do


def test_leading_spacing_on_zero_terminal_noise_is_named() -> None:
    facts = {"sampling": SamplingFacts(sampler="ddim", steps=10, spacing="leading")}
    bright = World.made(brightness=12.0)
    assert "schedule.start" in found(examined(ZERO, facts=facts, world=bright), ("sampler",))[0]


def test_leading_spacing_that_costs_nothing_is_passed_over() -> None:
    """The first of six levels hardly shows brightness, and the exact network's path ends where trailing's does."""
    facts = {"sampling": SamplingFacts(sampler="ddim", steps=6, spacing="leading")}
    causes, diagnosis = found(examined(ZERO, facts=facts), ("sampler",))
    assert causes == []
    told = {m.name: m.value for outcome in diagnosis.outcomes if outcome.checked for m in outcome.checked.measures}
    assert told["error of the path from its start"] == pytest.approx(told["the same with trailing spacing"], abs=0.02)


def test_saturating_guidance_is_named_with_a_scale_that_does_not() -> None:
    facts = {"guidance": GuidanceFacts(dropout=0.1, scale=120.0)}
    quiet = World.made(size=0.25, brightness=0.5)
    causes, diagnosis = found(examined(FLOW, steered=True, facts=facts, world=quiet), ("guidance",))
    assert causes == ["guidance.strong"]
    assert "--guidance" in diagnosis.findings[0].command


def test_scores_do_not_depend_on_what_is_claimed() -> None:
    right = readings.score(examined(EPSILON), readings.claimed(examined(EPSILON)))
    case = examined(VELOCITY, EPSILON)
    read = readings.claimed(case).named("as it is", process=EPSILON)
    assert torch.allclose(readings.score(case, read).log_error, right.log_error, atol=1e-4)


def test_another_reading_is_tried_with_other_noise_until_its_gain_is_sure() -> None:
    case = examined(FLOW, count=6)
    mine = readings.claimed(case)
    own, other = (readings.score(case, each) for each in (mine, trials.slipped(mine, 0.05)))
    assert readings.surely(case, own, other, small=math.inf, sure=math.inf) == other.gain(own)
    gains = [
        own.log_error.mean(1) - other.log_error.mean(1)
        for own, other in (
            (readings.score(case, mine, draw=draw), readings.score(case, other.reading, draw=draw))
            for draw in range(readings.ROUNDS)
        )
    ]
    every = readings.surely(case, own, other, small=-math.inf, sure=math.inf)
    assert every.value == pytest.approx(float(torch.stack(gains).mean()), abs=1e-5)
    assert every.error < other.gain(own).error


def test_a_scalar_filter_scores_zero() -> None:
    """Of independent pixels nothing better than the scalar filter can be known; here it is given in closed form."""
    case = examined(FLOW)
    clean = torch.randn(24, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))
    claim = replace(readings.claimed(case), latents=clean)
    v = clean.var(dim=(0, 2, 3)).view(1, -1, 1, 1)
    m = torch.zeros(1)
    told = []
    for ratio in readings.RATIOS:
        level = readings.level_at(FLOW.schedule, ratio * float(clean.std()))
        x = level.alpha * clean + level.sigma * case.noise[:24]
        said = m + level.alpha * v / (level.alpha**2 * v + level.sigma**2) * (x - level.alpha * m)
        told.append((level, x, (x - said) / level.sigma))  # as flow: clean = x - sigma raw
    assert readings.judged(claim, told).log_error.mean(0) == pytest.approx([0.0] * len(told), abs=0.05)


def test_intervals_are_those_of_students_t() -> None:
    assert [statistics.quantile(n) for n in (3, 7, 23, 1000)] == pytest.approx([3.182, 2.365, 2.069, 1.962], rel=0.012)
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert statistics.mean(values).error == pytest.approx(float(values.std() / 2))
    assert statistics.mean(values[:1]).error == math.inf


def test_what_follows_from_another_cause_stands_behind_it() -> None:
    every = [
        Finding("sampler.steps", "harmful", "", "", strength=9),
        Finding("objective", "broken", "", "", strength=2),
        Finding("speed.dtype", "harmful", "", "", strength=3),
    ]
    order, follows = ranked(every)
    assert [each.cause for each in order] == ["objective", "speed.dtype", "sampler.steps"]
    assert follows == {"sampler.steps": "objective"}


def test_what_is_certain_explains_what_is_graver() -> None:
    codec = Finding("latent.codec", "broken", "", "", strength=2)
    tied = Finding("weights.tied", "harmful", "", "", strength=1)
    assert [each.cause for each in ranked([codec, tied])[0]] == ["weights.tied", "latent.codec"]
    assert ranked([codec, replace(tied, grade="note")])[1] == {}
    copied = Finding("fit.memorised", "harmful", "", "", strength=2)  # it and strong guidance explain each other
    strong = Finding("guidance.strong", "harmful", "", "", strength=1)
    assert [each.cause for each in ranked([copied, strong])[0]] == ["fit.memorised", "guidance.strong"]
    scale = Finding("latent.scale", "broken", "", "")  # another reading makes it good: no loss in the weights
    assert [each.cause for each in ranked([scale, tied])[0]] == ["latent.scale", "weights.tied"]


def test_what_a_cause_explains_stands_behind_it_however_strong() -> None:
    def found(cause: str, grade: Grade, strength: float) -> Finding:
        return Finding(cause, grade, "", "", strength=strength)

    def first(*every: Finding) -> list[str]:
        order, follows = ranked(every)
        return [each.cause for each in order if each.cause not in follows]

    damaged, milder = found("weights.damaged", "broken", 29.0), found("weights.damaged", "harmful", 28.0)
    labels = found("text.labels", "broken", 5.0)
    assert first(milder, labels, damaged) == ["weights.damaged"] * 2  # a milder one of its cause does not follow
    assert first(found("schedule.start", "harmful", 195.0), found("schedule.levels", "harmful", 6.6)) == [
        "schedule.levels"
    ]
    assert first(damaged, found("latent.codec", "broken", 1.2)) == ["latent.codec"]
    assert first(found("fit.forgotten", "harmful", 2.1), found("guidance.distilled", "harmful", 3.0)) == [
        "fit.forgotten"
    ]


def test_every_cause_that_is_said_to_follow_exists() -> None:
    for cause, about in CAUSES.items():
        for pattern in about.brings:
            topic = pattern.removesuffix("*")
            assert pattern == "*" or any(name.startswith(topic) for name in CAUSES), (cause, pattern)
        assert not brings(cause, cause)
