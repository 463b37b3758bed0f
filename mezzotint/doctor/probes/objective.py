"""Which of epsilon, clean, velocity and flow the network answers with, whatever the files claim."""

from __future__ import annotations

from collections.abc import Sequence

from mezzotint.doctor import trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Plot, measured
from mezzotint.doctor.readings import Score, kind, told
from mezzotint.process import Prediction

USELESS = 0.3  # mean log error from which a network is read as worse than a scalar filter: broken, not only harmed


def examine(case: Case) -> Checked:
    """Raw outputs on the user's noised images, taken for each objective under each known schedule.

    Under the right one the error of the clean image is below that of a scalar filter at every level; under another one
    it is far above at some.
    """
    contest = trials.processes(case)
    mine, best = contest.mine, contest.others[0]
    ours, theirs = mine.reading.process, best.reading.process
    measures = (
        measured("log error as the files say", mine.mean, "below 0"),
        measured(f"gain of the best other reading ({told(theirs)})", contest.gain, f"at most {trials.CLEAR:g}"),
    )  # fmt: skip
    plots = (curves([mine, *contest.others[:3]], "error of the clean image by what the output is taken for"),)
    explained = trials.explanation(case)
    if explained is None or explained[0] != "process" or kind(ours, theirs) != "objective":
        return Checked((), measures, plots)
    finding = Finding(
        "objective",
        "broken" if mine.mean.value > USELESS else "harmful",
        f"read as {told(ours)}, its log error on these images is {mine.mean.value:+.2f}; read as {told(theirs)} it is"
        f" {best.mean.value:+.2f} (gain {contest.gain.value:.2f}, {contest.gain.low:.2f} to {contest.gain.high:.2f})",
        f"State the objective that the network was trained with: {theirs.prediction}{where(case, theirs.prediction)}.",
        rewritten(case, theirs.prediction),
        strength=1 + contest.gain.value / trials.CLEAR,
        measures=measures,
    )
    return Checked((finding,), measures, plots)


def where(case: Case, meaning: Prediction) -> str:
    """The place in a folder's files that states the objective."""
    if (case.path / "contract.json").is_file():
        return f' ("process": {{"prediction": "{meaning}"}} in {case.path / "contract.json"})'
    name = {"epsilon": "epsilon", "velocity": "v_prediction", "clean": "sample", "flow": "flow_prediction"}[meaning]
    at = case.path / "scheduler" / "scheduler_config.json"
    return f' ("prediction_type": "{name}" in {at})' if case.path.is_dir() else ""


def rewritten(case: Case, meaning: Prediction) -> str:
    """The command that writes a single file anew with its objective stated."""
    if case.path.is_dir():
        return ""
    return f"mezzotint convert {case.path} FOLDER --layout diffusers --prediction {meaning}"


def curves(scores: Sequence[Score], title: str) -> Plot:
    """Log error by the ratio of noise to signal, a curve each reading."""
    lines = {
        score.reading.name: [(r, float(v)) for r, v in zip(score.ratios, score.log_error.mean(0), strict=True)]
        for score in scores
    }
    return Plot(title, "noise / signal", "log error against a scalar filter", lines, log_x=True)
