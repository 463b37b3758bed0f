"""The noise levels that the network was trained on, its clock, and the noise at the end of its schedule."""

from __future__ import annotations

import math
from dataclasses import replace

from mezzotint.doctor import readings, trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Measure, Plot, measured
from mezzotint.doctor.probes.objective import USELESS, curves
from mezzotint.doctor.readings import Score, kind, told
from mezzotint.process import Prediction, Process, RectifiedFlow

NOISY = tuple(math.exp(half) for half in (0.9, 1.4, 1.9, 2.3, 2.55))  # noise against signal
TERMINAL, LIKELY = 0.02, 2.2  # gain and standard errors: the one alternative that is looked at there
CLEAR = 3.0  # standard errors from which it is not asked again


def examine(case: Case) -> Checked:
    """Which told level denoises best, which known schedule does, and what much noise says of the schedule's end."""
    contest, explanation = trials.processes(case), trials.explanation(case)
    ours = contest.mine.reading.process
    same = [found for found in contest.others if kind(ours, found.reading.process) != "objective"]
    slip, curve = trials.slips(case)
    factor = math.exp(float(slip.best.name))
    measures = [
        Measure("noise that the network is best told, against what is there", factor if slip.lost else 1.0, bound="1"),
        measured("gain of telling it so", slip.gain, f"at most {trials.CLEAR:g}"),
    ]
    plots = [Plot("which told level denoises best", "told / true noise ratio, log", "log error", {"few images": curve})]
    plots += [curves([contest.mine, *same[:2]], "error of the clean image by schedule")]
    findings: list[Finding] = []
    topic = explanation[0] if explanation else ""
    if topic == "process" and contest.others[0] in same:
        findings.append(_other_schedule(contest, contest.others[0]))
    elif topic == "levels":
        findings.append(
            Finding(
                "schedule.levels",
                "broken" if contest.mine.mean.value > USELESS else "harmful",
                f"the network denoises best when told {factor:.2g} times the noise that its schedule ({told(ours)})"
                " says is"
                f" there (gain {slip.gain.value:.2f}, {slip.gain.low:.2f} to {slip.gain.high:.2f})",
                "Give the schedule that the network was trained under: its betas and their ends, or its clock.",
                strength=1 + slip.gain.value / trials.CLEAR, measures=tuple(measures), also=("schedule.clock",),
            )
        )  # fmt: skip
    terminal = _terminal(case, ours)
    if terminal is not None:
        measure, finding = terminal
        measures.append(measure)
        findings += [finding] if finding and topic != "process" else []
    return Checked(tuple(findings), tuple(measures), tuple(plots))


def _other_schedule(contest: trials.Contest, best: Score) -> Finding:
    ours, theirs = contest.mine.reading.process, best.reading.process
    cause = kind(ours, theirs)
    gain = contest.gain
    return Finding(
        cause,
        "broken" if contest.mine.mean.value > USELESS else "harmful",
        f"under {told(ours)} its log error is {contest.mine.mean.value:+.2f}, under {told(theirs)} it is"
        f" {best.mean.value:+.2f} (gain {gain.value:.2f}, {gain.low:.2f} to {gain.high:.2f})",
        f"State the schedule that the network was trained under: {told(theirs)}.",
        strength=1 + gain.value / trials.CLEAR,
        measures=(measured("gain of the other schedule", gain),),
    )


def _terminal(case: Case, process: Process) -> tuple[Measure, Finding | None] | None:
    """Whether the network denoises better at much noise when its table is rescaled to end in pure noise, or is not.

    Rescaling moves every level (Lin et al. 2023, algorithm 1), the noisy ones most: what the network is told there
    says how it was trained. None for flows, which end in noise anyway, and for epsilon, which cannot.
    """
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow) or process.prediction is Prediction.EPSILON:
        return None
    claim = trials.own(case).reading
    zero = schedule.zero_terminal_snr
    other = replace(process, schedule=replace(schedule, zero_terminal_snr=not zero))
    mine, theirs = (readings.score(case, each, NOISY) for each in (claim, claim.named(told(other), process=other)))
    gain = readings.surely(case, mine, theirs, TERMINAL, CLEAR)
    name = f"gain {'without' if zero else 'with'} zero terminal SNR, where there is much noise"
    measure = measured(name, gain, f"at most {TERMINAL:g}")
    if gain.value < TERMINAL or gain.deviations < LIKELY:
        return measure, None
    says = "ends in pure noise" if zero else "leaves signal at the end"
    does = "leaves signal there" if zero else "ends in pure noise"
    finding = Finding(
        "schedule.terminal", "harmful",
        f"the files say that the schedule {says}, and the network does better when read as if it {does}"
        f" (gain {gain.value:.3f}, {gain.low:.3f} to {gain.high:.3f})",
        f"Set rescale_betas_zero_snr to {str(not zero).lower()}, with {'leading' if zero else 'trailing'} spacing.",
        strength=1 + gain.value / TERMINAL, measures=(measure,), also=("schedule.levels",),
    )  # fmt: skip
    return measure, finding
