"""Where the steps of a path fall: every rule of spacing, and every difference between the samplers that use them.

A sampler says which rule it wants (`Spacing`) and has a habit (`Habit`) of reading that rule: whole timesteps (DDPM,
DDIM, LCM), fractional ones (Euler, Heun), or one interval finer than it walks (DPM-Solver++, UniPC). The habits are the
reference library's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from mezzotint.errors import InputError
from mezzotint.process import CLEAN, Discrete, Level, Process, RectifiedFlow
from mezzotint.process.level import from_ratio
from mezzotint.process.schedules import LARGEST_RATIO, shifted
from mezzotint.sampling.path import Step

Levels = list[Level[float]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spacing:
    """A rule (leading, linspace, trailing) with its offset, and a ramp (none, karras, exponential) between its ends."""

    rule: str
    offset: int = 0
    ramp: str = "none"


LEADING = Spacing("leading")
LINSPACE = Spacing("linspace")
KARRAS = Spacing("linspace", ramp="karras")


Rule = Callable[[int, int, int], list[float]]  # (total, steps, offset) -> timesteps
Grid = Callable[[RectifiedFlow, int, int | None], list[float]]  # (schedule, steps, tokens) -> sigmas
Clock = Callable[[float, Discrete, str], float]  # (fractional timestep, schedule, ramp) -> what the network is told

LOWEST = 1.0 / 1000.0  # the least noise a flow is trained on, in the reference's thousand steps
NUDGE = 17 * 2.0**-24  # 1e-6 as float32 leaves it of 1 - 1e-6


# Timesteps of a table of `total`, largest first (Lin 2023, table 2).


def leading(total: int, steps: int, offset: int = 0) -> list[float]:
    """Multiples of total // steps from 0: 951, 901, ... at 20 steps and offset 1; never reaches the table's end."""
    return [float(i * (total // steps) + offset) for i in reversed(range(steps))]


def leading_multistep(total: int, steps: int, offset: int = 0) -> list[float]:
    """Leading with steps + 1 intervals, the last timestep dropped: 941, 894, ... at 20 steps and offset 1."""
    return leading(total, steps + 1, offset)[:-1]


def linspace(total: int, steps: int, offset: int = 0) -> list[float]:
    """Even from total - 1 down to 0, fractions kept (946.42 comes second at 20 steps); one step alone is 0."""
    return [(total - 1) * i / (steps - 1) if steps > 1 else 0.0 for i in reversed(range(steps))]


def linspace_whole(total: int, steps: int, offset: int = 0) -> list[float]:
    """Linspace rounded half to even."""
    return [float(round(t)) for t in linspace(total, steps)]


def linspace_multistep(total: int, steps: int, offset: int = 0) -> list[float]:
    """Linspace with steps + 1 points, the last (0) dropped, rounded."""
    return linspace_whole(total, steps + 1)[:-1]


def trailing(total: int, steps: int, offset: int = 0) -> list[float]:
    """Even from total - 1 down, ending one interval above -1; rounded half to even."""
    return [float(round(total - i * total / steps) - 1) for i in range(steps)]


def distilled(total: int, steps: int, original: int, lowest: int) -> list[float]:
    """An even choice of `steps` among the `lowest` of `original` timesteps a consistency model was distilled on."""
    taught = [float((i + 1) * (total // original) - 1) for i in reversed(range(lowest))]
    return [taught[i * lowest // steps] for i in range(steps)]


# Sigma / alpha of a path, largest first.


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> list[float]:
    """(high^(1/rho) + i/(n-1) (low^(1/rho) - high^(1/rho)))^rho (Karras 2022, eq. 5); one step alone is `high`."""
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return [(top + (i / (steps - 1) if steps > 1 else 0.0) * (bottom - top)) ** rho for i in range(steps)]


def exponential(high: float, low: float, steps: int) -> list[float]:
    """Even in log sigma."""
    return [high * (low / high) ** (i / (steps - 1) if steps > 1 else 0.0) for i in range(steps)]


RAMPS: dict[str, Callable[[float, float, int], list[float]]] = {"karras": karras, "exponential": exponential}


# Sigma of a rectified flow, largest first; its shift and low end belong to the process.


def flow_grid(schedule: RectifiedFlow, steps: int, tokens: int | None = None) -> list[float]:
    """From pure noise down to 1/n (`even`), 1/1000 (`once`) or the shifted 1/1000 (`twice`), then shifted."""
    shift = schedule.shift_for(steps, tokens)
    low = {"even": 1.0 / steps, "once": LOWEST, "twice": shifted(LOWEST, shift)}[schedule.low_end]
    return [shifted(s, shift) for s in _between(1.0, low, steps)]


def flow_grid_below_one(schedule: RectifiedFlow, steps: int, tokens: int | None = None) -> list[float]:
    """DPM-Solver++: one more interval from 0.999 to 0, the 0 dropped; so it starts beneath pure noise."""
    if schedule.low_end == "even":
        return flow_grid(schedule, steps, tokens)
    shift = schedule.shift_for(steps, tokens)
    return [shifted(s, shift) for s in _between(1.0 - LOWEST, 0.0, steps + 1)[:-1]]


def flow_grid_nudged(schedule: RectifiedFlow, steps: int, tokens: int | None = None) -> list[float]:
    """UniPC: one more interval from 1 to 1/1000, its end dropped; starts 1e-6 below 1, where the log-SNR is finite."""
    if schedule.low_end == "even":
        grid = flow_grid(schedule, steps, tokens)
    else:
        shift = schedule.shift_for(steps, tokens)
        grid = [shifted(s, shift) for s in _between(1.0, LOWEST, steps + 1)[:-1]]
    return [min(s, 1.0 - NUDGE) for s in grid]


def _between(high: float, low: float, count: int) -> list[float]:
    return [high + (low - high) * i / (count - 1) if count > 1 else high for i in range(count)]


# What the network is told when a level was chosen by sigma.


def timestep_of(schedule: Discrete, ratio: float) -> float:
    """The fractional timestep at which sigma / alpha = ratio, linear in log sigma between two timesteps."""
    ratios = schedule.ratios()
    low = min(max(0, bisect_right(ratios, ratio) - 1), len(ratios) - 2)
    weight = math.log(ratio / ratios[low]) / math.log(ratios[low + 1] / ratios[low])
    return low + min(max(weight, 0.0), 1.0)


def fractional_clock(t: float, schedule: Discrete, ramp: str) -> float:
    """Euler and Heun tell the network the fraction."""
    return t


def unipc_clock(t: float, schedule: Discrete, ramp: str) -> float:
    """UniPC rounds Karras timesteps and cuts exponential ones to whole."""
    return float(round(t) if ramp == "karras" else math.floor(t))


def dpm_clock(t: float, schedule: Discrete, ramp: str) -> float:
    """DPM-Solver++ does as UniPC, but on the cosine schedule it cuts Karras timesteps too."""
    return float(math.floor(t)) if schedule.betas == "cosine" else unipc_clock(t, schedule, ramp)


# Habits, and the levels of a path.


@dataclass(frozen=True, slots=True)
class Habit:
    """How a kind of sampler reads a Spacing.

    `whole_table`: a ramp runs over the whole table, not between the rule's own ends; `whole_clock`: on a flow, too, the
    network is told whole thousandths.
    """

    rules: dict[str, Rule]
    grid: Grid
    clock: Clock
    whole_table: bool = False
    whole_clock: bool = False


MULTISTEP_RULES: dict[str, Rule] = {"leading": leading_multistep, "linspace": linspace_multistep, "trailing": trailing}
WHOLE = Habit({"leading": leading, "linspace": linspace_whole, "trailing": trailing}, flow_grid, unipc_clock)
FRACTIONAL = Habit({"leading": leading, "linspace": linspace, "trailing": trailing}, flow_grid, fractional_clock)
DPM = Habit(MULTISTEP_RULES, flow_grid_below_one, dpm_clock, whole_table=True, whole_clock=True)
UNIPC = Habit(MULTISTEP_RULES, flow_grid_nudged, unipc_clock, whole_table=True, whole_clock=True)


def levels(process: Process, steps: int, spacing: Spacing, habit: Habit, tokens: int | None = None) -> Levels:
    """The levels a path of `steps` steps visits, noisiest first. A flow keeps its own grid and obeys the ramp alone."""
    schedule = process.schedule
    if steps < 1 or (isinstance(schedule, Discrete) and steps > schedule.timesteps):
        most = f" to {schedule.timesteps}" if isinstance(schedule, Discrete) else " or more"
        raise InputError(f"{steps} steps cannot be placed on schedule '{schedule.name}': use 1{most}")
    if isinstance(schedule, RectifiedFlow):
        sigmas = habit.grid(schedule, steps, tokens)
        if spacing.ramp != "none":
            sigmas = chosen(RAMPS, spacing.ramp, "ramp")(sigmas[0], sigmas[-1], steps)
        told = [math.floor(1000.0 * s) / 1000.0 if habit.whole_clock else s for s in sigmas]
        return [Level(schedule.clock * t, 1.0 - s, s) for t, s in zip(told, sigmas, strict=True)]
    times = chosen(habit.rules, spacing.rule, "spacing rule")(schedule.timesteps, steps, spacing.offset)
    if len(set(times)) < steps:
        raise InputError(f"{steps} steps of '{spacing.rule}' spacing fall on the same timesteps: use fewer")
    if spacing.ramp == "none":
        return [schedule.level(t) for t in times]
    ratios = schedule.ratios()
    high, low = (ratios[-1], ratios[0]) if habit.whole_table else (schedule.ratio(times[0]), schedule.ratio(times[-1]))
    ramp = chosen(RAMPS, spacing.ramp, "ramp")(high, low, steps)
    told = [schedule.tick * habit.clock(timestep_of(schedule, r), schedule, spacing.ramp) for r in ramp]
    return [from_ratio(t, r) for t, r in zip(told, ramp, strict=True)]


def finite_start(visited: Levels) -> Levels:
    """DPM-Solver++ and UniPC step in log-SNR, which must be finite for the step before to count in the next one.

    Pure noise of a table becomes alpha_bar = 2^-24, as in the reference and on the ramps.
    """
    first = visited[0]
    return [from_ratio(first.t, LARGEST_RATIO), *visited[1:]] if first.alpha == 0.0 else visited


def final(process: Process, last: str) -> Level[float]:
    """Where a path ends: `clean`, or `lowest`, the table's own first level (a flow's is clean)."""
    ends = {"clean": CLEAN, "lowest": process.level(0.0)}
    return chosen(ends, last, "last level")


def paired(visited: Levels, last: Level[float]) -> list[Step]:
    """Each level with the next one listed."""
    return [Step(now, next) for now, next in zip(visited, [*visited[1:], last], strict=True)]


def chosen(options: dict[str, T], name: str, what: str) -> T:
    """options[name], or an InputError that names the nearest valid one."""
    if name not in options:
        near = get_close_matches(name, options, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown {what} '{name}': did you mean '{near}'? Valid: {', '.join(options)}")
    return options[name]
