"""Ways to read a network, and how well it denoises the user's images under each: the doctor's one experiment.

A network does best when it is read as it was trained. So each claim of the files (objective, schedule, clock, latent
units, text) is tried against its alternatives on the same images with the same noise at the same ratios of noise to
signal, and what a reading gains is paired over images. Nothing here depends on what the files claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.conditioning import Conditioning
from mezzotint.doctor.case import Case
from mezzotint.doctor.statistics import Mean, mean
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.process import Discrete, Level, Prediction, Process, RectifiedFlow, prediction
from mezzotint.process.level import from_ratio
from mezzotint.sampling.spacing import timestep_of

# Noise against signal, sigma / (alpha deviation of the latents), little noise first: whatever the units of the latents,
# as much of an image is left at one of these.
RATIOS = tuple(math.exp(half) for half in (-3.0, -1.9, -0.9, 0.0, 0.9, 1.9))
MIDDLE = RATIOS[1:-1]
ROUNDS = 6  # of noise that what is unsure is asked again with
FIRST = 8  # images of the first round of a contest
BEHIND = 0.1  # mean log error by which a reading is out after it
LARGEST, SMALLEST = 1e4, 1e-6  # errors are kept within, so that no image decides alone


@dataclass(frozen=True, eq=False)
class Reading:
    """One way to read a network; a name for people and everything that it is read by."""

    name: str
    process: Process
    latents: Tensor  # (N, C, h, w)
    steering: Conditioning
    model: Model
    slip: float = 0.0  # the network is told exp(slip) times the noise that x has

    def named(self, name: str, **changes: object) -> Reading:
        """The same reading but for these changes."""
        return replace(self, name=name, **changes)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class Score:
    """How well a reading denoises: the logarithm of its error against that of the best scalar filter, (N, K).

    0 is a filter that knows each channel's mean and variance and nothing else; below 0 is better, far above is a
    network that answers another question.
    """

    reading: Reading
    log_error: Tensor  # (N, K)
    ratios: tuple[float, ...] = RATIOS

    @property
    def mean(self) -> Mean:
        """Over images, of the mean over levels."""
        return mean(self.log_error.mean(1))

    def at(self, ratios: Sequence[float], images: int | None = None) -> Score:
        """The same at some of the ratios, for the first images."""
        columns = [self.ratios.index(ratio) for ratio in ratios]
        return Score(self.reading, self.log_error[:images, columns], tuple(ratios))

    def gain(self, over: Score) -> Mean:
        """What this reading is better by than another one, paired over the images and ratios that both saw."""
        return mean(self.gains(over))

    def gains(self, over: Score) -> Tensor:
        """(n,) the same of each image."""
        shared = [ratio for ratio in self.ratios if ratio in over.ratios]
        n = min(len(self.log_error), len(over.log_error))
        return (over.at(shared, n).log_error - self.at(shared, n).log_error).mean(1)


def claimed(case: Case) -> Reading:
    """The reading that the files claim."""
    return Reading("as the files say", case.model.process, case.usable, case.steering, case.model)


def level_at(schedule: Discrete | RectifiedFlow, ratio: float) -> Level[float]:
    """The level at sigma / alpha = ratio, or the nearest end of the schedule."""
    if isinstance(schedule, RectifiedFlow):
        return schedule.level(schedule.clock * ratio / (1.0 + ratio))
    ratios = schedule.ratios()
    ratio = min(max(ratio, ratios[0]), ratios[-1])
    return from_ratio(schedule.tick * timestep_of(schedule, ratio), ratio)


Answer = tuple[Level[float], Tensor, Tensor]  # a level, x at it, and the raw output


def raw_of(case: Case, reading: Reading, ratios: Sequence[float], count: int, draw: int = 0) -> list[Answer]:
    """(level, x, raw) of `count` images at every ratio, all by one noise of the case."""
    found: list[Answer] = []
    clean, noise = reading.latents[:count], (case.noises(draw) if draw else case.noise)[:count]
    deviation = float(reading.latents.std())
    levels = [level_at(reading.process.schedule, ratio * deviation) for ratio in ratios]
    xs = torch.cat([level.alpha * clean + level.sigma * noise for level in levels])
    factor = math.exp(reading.slip) * deviation
    told = [level_at(reading.process.schedule, ratio * factor).t for ratio in ratios]
    rows = torch.arange(len(clean)).repeat(len(levels))
    t = torch.tensor(told).repeat_interleave(len(clean))
    raws = case.answers(reading.model, xs, t, reading.steering, rows)
    for level, x, raw in zip(levels, xs.split(len(clean)), raws.split(len(clean)), strict=True):
        found.append((level, x, raw))
    return found


def judged(reading: Reading, found: Sequence[Answer], ratios: tuple[float, ...] = RATIOS) -> Score:
    """The score of raw outputs under the reading's prediction."""
    clean = reading.latents
    columns: list[Tensor] = []
    for level, x, raw in found:
        estimate = prediction.estimate(reading.process.prediction, raw, x, level).clean
        error = ((estimate - clean[: len(x)]) ** 2).flatten(1).mean(1)  # (n,)
        columns.append((error / scalar_error(clean, level)).clamp(SMALLEST, LARGEST).nan_to_num(LARGEST).log())
    return Score(reading, torch.stack(columns, dim=1), ratios)


def scalar_error(clean: Tensor, level: Level[float]) -> Tensor:
    """The error of the best estimate that knows each channel's mean and variance v: mean of v sigma^2 / (alpha^2 v +
    sigma^2)."""
    v = clean.double().var(dim=(0, 2, 3)).clamp(min=1e-12)
    return (v * level.sigma**2 / (level.alpha**2 * v + level.sigma**2)).mean().float()


def score(
    case: Case, reading: Reading, ratios: Sequence[float] = RATIOS, count: int | None = None, draw: int = 0
) -> Score:
    """How well the network denoises the user's images under a reading."""
    return judged(reading, raw_of(case, reading, ratios, count or len(reading.latents), draw), tuple(ratios))


def contest(case: Case, mine: Score, others: Sequence[Reading], best: int = 2) -> tuple[Score, ...]:
    """The alternatives to a reading whose score is known, best first.

    All of them meet on a few images at every second ratio, and the `best` go on to all images and ratios, where they
    are not far behind by then. Readings that differ in the prediction alone share the network's answers.
    """
    some, few = mine.ratios[1::2], min(FIRST, len(mine.log_error))
    first = sorted(_scores(case, others, some, few), key=lambda found: -found.gain(mine).value)
    finalists = [found.reading for found in first[:best] if found.gain(mine).value > -BEHIND]
    scores = _scores(case, finalists, mine.ratios, len(mine.log_error))
    return tuple(sorted(scores, key=lambda found: -found.gain(mine).value)) or tuple(first[:best])


def surely(case: Case, mine: Score, theirs: Score, small: float, sure: float) -> Mean:
    """What the second reading gains: with other noise, too, until that is `sure` standard errors from nothing or less
    than `small`, or ROUNDS times."""
    gain, gains = theirs.gain(mine), [theirs.gains(mine)]
    while gain.deviations < sure and gain.high > small and len(gains) < ROUNDS:
        a, b = (score(case, each.reading, theirs.ratios, len(gains[0]), len(gains)) for each in (mine, theirs))
        gains.append(b.gains(a))
        gain = mean(torch.stack(gains).mean(0))  # over images, of the mean over noise
    return gain


def _scores(case: Case, readings: Sequence[Reading], ratios: Sequence[float], count: int) -> list[Score]:
    asked: dict[tuple[object, ...], list[Answer]] = {}
    found: list[Score] = []
    for reading in readings:
        parts = (id(part) for part in (reading.latents, reading.steering, reading.model))
        key = (reading.process.schedule, *parts, reading.slip)
        if key not in asked:
            asked[key] = raw_of(case, reading, ratios, count)
        found.append(judged(reading, asked[key], tuple(ratios)))
    return found


def processes(own: Process) -> list[Process]:
    """What a network may have been trained under, other than what is claimed: every objective, every known schedule."""
    flow = own.schedule if isinstance(own.schedule, RectifiedFlow) else RectifiedFlow()
    clocks = [replace(flow, clock=1000.0), replace(flow, clock=1.0)]
    tables = [
        Discrete("linear", 1e-4, 0.02), Discrete("scaled_linear", 0.00085, 0.012), Discrete("cosine", 0.0, 0.999),
    ]  # fmt: skip
    if isinstance(own.schedule, Discrete):
        table = own.schedule
        known = [replace(other, timesteps=table.timesteps, tick=table.tick) for other in tables]
        clocked = [replace(table, tick=tick) for tick in (1.0, 1000.0 / table.timesteps, 1e-3)]
        usual = [replace(table, timesteps=1000, tick=1.0), *tables] if table.timesteps != 1000 else []
        tables = [table, replace(table, zero_terminal_snr=not table.zero_terminal_snr), *known, *clocked, *usual]
    schedules: list[Discrete | RectifiedFlow] = list(dict.fromkeys([*clocks, *tables]))
    found: list[Process] = []
    for schedule in schedules:
        for meaning in Prediction:
            try:
                found.append(Process(schedule, meaning))
            except InputError:  # a meaning that does not fit the schedule
                continue
    return [process for process in found if process != own]


def told(process: Process) -> str:
    """A process in a few words."""
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        return f"{process.prediction}, rectified flow on a clock of {schedule.clock:g}"
    numbers = "" if schedule.betas == "cosine" else f" {schedule.beta_start:g}..{schedule.beta_end:g}"
    clock = f" told 0..{schedule.clock:g}" if schedule.clock != schedule.timesteps else ""
    return f"{process.prediction}, {schedule.name}{numbers} of {schedule.timesteps} timesteps{clock}"


def kind(ours: Process, theirs: Process) -> str:
    """The cause that a better process names: the first thing in which it differs."""
    if ours.prediction is not theirs.prediction or isinstance(ours.schedule, Discrete) != isinstance(
        theirs.schedule, Discrete
    ):
        return "objective"
    a, b = ours.schedule, theirs.schedule
    if a.clock != b.clock and (isinstance(a, RectifiedFlow) or replace(a, tick=1.0) == replace(b, tick=1.0)):  # pyright: ignore
        return "schedule.clock"
    if isinstance(a, Discrete) and isinstance(b, Discrete):
        same = replace(a, zero_terminal_snr=b.zero_terminal_snr) == b
        return "schedule.terminal" if same else "schedule.levels"
    return "schedule.levels"
