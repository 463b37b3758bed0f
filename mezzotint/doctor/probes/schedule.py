"""The noise levels that the network was trained on, its clock, and the noise at the end of its schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mezzotint.doctor import readings, trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Measure, Plot, measured
from mezzotint.doctor.probes.objective import USELESS, curves
from mezzotint.doctor.readings import Reading, Score
from mezzotint.doctor.statistics import Mean, mean
from mezzotint.doctor.trials import told, wishes
from mezzotint.process import Discrete, Prediction, Process, RectifiedFlow, prediction

SLIPS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # logarithms by which the told level is moved against the true one
SLIPPED = 0.35  # of them from which the clock is off, in the middle of the schedule
NUDGE = 0.1  # offset of each channel, in deviations of the latents
SIGNAL = 0.02  # alpha at the end of a schedule below which rescaling it changes nothing that can be measured
SHUT, OPEN = 0.25, 0.7  # shares of the answer: at most as of a rescaled schedule, at least as of a plain one


def examine(case: Case) -> Checked:
    """Which told level denoises best at each true one, which known schedule does, and what the last timestep knows."""
    contest = trials.processes(case)
    ours = contest.mine.reading.process
    same = [found for found in contest.others if trials.kind(ours, found.reading.process) != "objective"]
    findings: list[Finding] = []
    slips, slip_scores = calibration(case)
    slip, significance = slips
    measures = [
        measured("told level against the best one, in log ratio", slip,
                f"within {SLIPPED:g} of 0"),
    ]  # fmt: skip
    errors = torch.stack([score.log_error.mean(0) for score in slip_scores])  # (5, K)
    plots = [
        Plot("which told level denoises best", "told / true noise ratio, log", "log error", {
            f"noise / signal {ratio:.2g}": [(s, float(e)) for s, e in zip(SLIPS, column, strict=True)]
            for ratio, column in zip(readings.MIDDLE, errors.T, strict=True)
        }),
        curves([contest.mine, *same[:2]], "error of the clean image by schedule"),
    ]  # fmt: skip
    if contest.lost and contest.others[0] in same:
        findings.append(_other_schedule(contest, contest.others[0]))
    elif abs(slip.value) > SLIPPED and significance:
        findings.append(
            Finding(
                "schedule.levels", "harmful",
                f"the network denoises best when told a level {math.exp(slip.value):.2f} times the noise that its"
                " schedule"
                f" ({told(ours)}) says is there",
                "Give the schedule that the network was trained under: its betas and their ends, or its clock.",
                strength=abs(slip.value) / SLIPPED, measures=(measures[0],), also=("latent.scale",),
            )
        )  # fmt: skip
    terminal = _terminal(case, ours)
    if terminal is not None:
        measure, finding = terminal
        measures.append(measure)
        findings += [finding] if finding and not contest.lost else []
    return Checked(tuple(findings), tuple(measures), tuple(plots))


def calibration(case: Case) -> tuple[tuple[Mean, bool], list[Score]]:
    """By which factor (log) the told level that denoises best differs from the true one, over images; and if surely.

    The vertex of a parabola through the errors at five told levels, for each image.
    """
    claim = trials.own(case).reading
    scores = case.once(
        "slips",
        lambda: [
            readings.score(case, slipped(claim, s), readings.MIDDLE) if s else trials.own(case).at(readings.MIDDLE)
            for s in SLIPS
        ],
    )
    errors = torch.stack([score.log_error.mean(1) for score in scores], 1).double()  # (N, 5)
    s = torch.tensor(SLIPS, dtype=torch.float64)
    basis = torch.stack([torch.ones_like(s), s, s**2], 1)
    fit = torch.linalg.lstsq(basis, errors.T).solution  # (3, N)
    whole = torch.linalg.lstsq(basis, errors.mean(0)[:, None]).solution[:, 0]
    best = torch.where(fit[2] > 0, -fit[1] / (2 * fit[2].clamp(min=1e-6)), s[errors.argmin(1)]).clamp(-1.5, 1.5)
    found = mean(best)
    gain = mean(errors[:, 2] - errors.min(1).values)
    return (found, bool(whole[2] > 0) and abs(found.deviations) > trials.SURE and trials.clearly(gain)), scores


def slipped(claim: Reading, slip: float) -> Reading:
    """The reading that tells the network another level than the one x has."""
    schedule = claim.process.schedule

    def tell(t: float) -> float:
        level = schedule.level(t / schedule.tick) if isinstance(schedule, Discrete) else schedule.level(t)
        return readings.level_at(schedule, level.sigma / max(level.alpha, 1e-6) * math.exp(slip)).t

    return claim.named(f"told {math.exp(slip):.2g} times the noise", told=tell) if slip else claim


def _other_schedule(contest: trials.Contest, best: Score) -> Finding:
    ours, theirs = contest.mine.reading.process, best.reading.process
    cause = trials.kind(ours, theirs)
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
    """Whether the network takes the mean of its input for signal at the last timestep: not where that was pure noise.

    A denoiser of x = alpha clean + sigma noise with variance v of an image's channel mean answers an offset m of x by
    m alpha v / (alpha^2 v + sigma^2 / (h w)) in the clean image; one that was trained to zero terminal SNR by nothing
    (Lin et al. 2023, section 3.1). None where the plain schedule all but ends in noise anyway.
    """
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow) or process.prediction is Prediction.EPSILON:
        return None
    plain = replace(schedule, zero_terminal_snr=False)
    if plain.level(plain.timesteps - 1).alpha < SIGNAL:
        return None
    share = terminal_share(case, process)
    measure = measured("answer of the last timestep to an offset", share, "0 with zero terminal SNR, about 1 without")
    zero = schedule.zero_terminal_snr
    if share.low <= OPEN if zero else share.high >= SHUT:
        return measure, None
    says = "ends in pure noise" if zero else "leaves signal at the end"
    does = "takes the mean of pure noise for signal" if zero else "takes nothing of it for signal"
    finding = Finding(
        "schedule.terminal", "harmful",
        f"the files say that the schedule {says}, and at its last timestep the network {does} ({share.value:.2f} of"
        " what a"
        f" schedule with signal left gives, {share.low:.2f} to {share.high:.2f})",
        f"Set rescale_betas_zero_snr to {str(not zero).lower()}, with {'leading' if zero else 'trailing'} spacing.",
        strength=2.0, measures=(measure,),
    )  # fmt: skip
    return measure, finding


def terminal_share(case: Case, process: Process) -> Mean:
    """The answer to an offset at the last timestep as a share of a denoiser's without zero terminal SNR, over images."""
    schedule = process.schedule
    assert isinstance(schedule, Discrete)
    plain = replace(schedule, zero_terminal_snr=False)
    last, level = plain.level(plain.timesteps - 1), schedule.level(schedule.timesteps - 1)
    clean, noise = case.usable, case.noise[: len(case.usable)]
    moved = NUDGE * float(clean.std())
    said: list[torch.Tensor] = []
    for offset in (0.0, moved):
        x = noise + offset
        raw = case.answers(case.model, x, torch.full((len(x),), level.t), case.steering)
        said.append(prediction.estimate(process.prediction, raw, x, level).clean.mean((2, 3)))  # (N, C)
    v = unexplained(clean.mean((2, 3)), wishes(case))  # (C,)
    cells = clean.shape[2] * clean.shape[3]
    expected = moved * last.alpha * v / (last.alpha**2 * v + last.sigma**2 / cells)
    return mean(((said[1] - said[0]) * expected).sum(1) / (expected**2).sum())


def unexplained(values: torch.Tensor, words: list[str]) -> torch.Tensor:
    """(C,) variance of (N, C) within images that share a caption, where enough do; else that of all."""
    groups = [values[[i for i, other in enumerate(words) if other == word]] for word in dict.fromkeys(words)]
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom < 6:
        return values.var(0).clamp(min=1e-6)
    inside = torch.stack([((group - group.mean(0)) ** 2).sum(0) for group in groups]).sum(0)
    return (inside / freedom).clamp(min=1e-6)
