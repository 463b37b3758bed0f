"""A run folder: whether training changed the weights, kept its course, had a fitting rate, and ended in time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Measure, NotChecked, Plot
from mezzotint.doctor.runs import Points, Run, Weights, read, weights_of

BINS = 20  # parts of a run that the loss is averaged over, against the luck of its draws
WORSE = 1.5  # of the training loss at the end to its best part
RISEN = 0.05  # of the validation loss over its minimum
FALLING = 0.15  # of the validation loss over the last quarter of a run
LARGE, SMALL = 0.05, 1e-5  # relative change of the weights in a step at the highest rate
SPIKE = 20.0  # of the gradient's norm over its median


def examine(case: Case) -> Checked:
    """What the records and the checkpoints of a run say of it."""
    if case.trace is None:
        raise NotChecked("needs a run: give --trace DIR, the folder that training wrote")
    if case.trace.is_file():
        raise NotChecked("a former report is compared by the speed probe")
    run = read(case.trace)
    weights = weights_of(case, run)
    found = [frozen(run, weights), diverged(run), rate(run, weights), over(run)]
    if case.data is None:  # with images the network itself is asked
        found.append(under(run))
    loss = _binned(run.loss)
    curves = {**run.bands, **({"validation": run.series("validation")} if not run.bands else {})}
    plots = [Plot("validation loss by band of the clock", "step", "loss", curves, log_y=True)] if curves else []
    plots += [Plot("training loss", "step", "loss", {"loss": loss}, log_y=True)] if loss else []
    return Checked(tuple(each for each in found if each), _measures(run, weights), tuple(plots))


# Weights.


def frozen(run: Run, weights: Weights) -> Finding | None:
    """The run changed nothing: weights are those of the start, or no gradient or rate ever reached them."""
    steps = run.records[-1]["step"] if run.records else 0
    rates = [value for _, value in run.series("rate")]
    judged = [value for _, value in run.series("validation")]
    why: list[str] = []
    if weights.moved == 0.0:
        why.append("the trained weights are those of the base, number for number")
    if weights.between == 0.0:
        first, last = (int(path.name.split("-")[1]) for path in run.checkpoints[-2:])
        why.append(f"the weights of step {last} are those of step {first}, number for number")
    if weights.idle == 1.0:
        why.append("no gradient ever reached a trained weight")
    if weights.silent:
        why.append(f"all {len(weights.silent)} layers that it acts through are still zero, {weights.silent[0]} first")
    if rates and not any(rates):
        why.append("the learning rate was 0 throughout")
    still = _same_at_end(judged)
    if still >= 3:
        why.append(f"the last {still} validations gave the same number, {judged[-1]:g}")
    if not why:
        return None
    do = "Check that what should train is what the optimiser was given, at a rate above 0, then train again"
    do += " from the start: a resumed run goes on with what its checkpoint says."
    return Finding("run.frozen", "broken", f"after {steps:,} steps {'; '.join(why)}", do, run.again(),
                   strength=float(len(why)))  # fmt: skip


def _same_at_end(values: Sequence[float]) -> int:
    count = 0
    while count < len(values) and values[-1 - count] == values[-1]:
        count += 1
    return count


def diverged(run: Run) -> Finding | None:
    """The training loss is not finite, or ends far above its best part."""
    every = [(step, value) for key in ("loss", "validation") for step, value in run.series(key)]
    wrong = [step for step, value in every if not math.isfinite(value)]
    command = run.again(f"optimiser.rate={_rate(run) / 3:.2g}")
    do = "Train again at a third of the rate, with a warm-up and a bound on the gradient (optimiser.clip = 1)."
    if wrong:
        return Finding("run.diverged", "broken", f"the loss is not finite from step {min(wrong):,.0f} on", do, command,
                       strength=10.0)  # fmt: skip
    loss = _binned(run.loss)
    if len(loss) < 4:
        return None
    best, last = min(value for _, value in loss), loss[-1][1]
    # as a ratio: a loss that left its course scatters as it is high
    if best <= 0 or last < WORSE * best or math.log(last / best) < 4 * _scatter([(s, math.log(v)) for s, v in loss]):
        return None
    at = next(step for step, value in loss if value == best)
    says = (
        f"the training loss was {best:.3g} near step {at:,.0f} and {last:.3g} at the end, {last / best:.1f} times that"
    )
    grade = "broken" if last >= loss[0][1] else "harmful"
    return Finding("run.diverged", grade, says, do, command, strength=last / best / WORSE)


def rate(run: Run, weights: Weights) -> Finding | None:
    """Steps so large that they undo each other, or so small that nothing moves."""
    if weights.update is None or not weights.update:
        return None
    peak = _rate(run)
    told = f"at the rate of {peak:.2g} a step changes the weights by {weights.update:.2g} of their size"
    if weights.update > LARGE:
        spikes = _spikes(run)
        more = f"; the gradient's norm rose {spikes} times beyond {SPIKE:g} times its median" if spikes else ""
        do = "Lower the learning rate to a tenth and train again."
        return Finding("run.rate", "harmful", f"{told}: they wander{more}", do,
                       run.again(f"optimiser.rate={peak / 10:.2g}"), strength=weights.update / LARGE)  # fmt: skip
    if weights.update < SMALL:
        do = "Raise the learning rate tenfold and train again; 1e-4 is usual for a whole network, 1e-3 for an adapter."
        return Finding("run.rate", "harmful", f"{told}: they hardly move", do,
                       run.again(f"optimiser.rate={peak * 10:.2g}"), strength=SMALL / weights.update)  # fmt: skip
    return None


def over(run: Run) -> Finding | None:
    """The validation loss passed its minimum and rose, and the run ended after that."""
    judged = run.series("validation")
    if len(judged) < 4 or not all(math.isfinite(value) for _, value in judged):
        return None
    (at, best), (end, last) = min(judged, key=lambda point: point[1]), judged[-1]
    risen = last / best - 1 if best > 0 else 0.0
    if risen <= RISEN or at >= end:
        return None
    worst = max(((points[-1][1] / min(v for _, v in points) - 1, name) for name, points in run.bands.items()
                 if min(v for _, v in points) > 0), default=None)  # fmt: skip
    says = f"the validation loss was lowest at step {at:,.0f} ({best:.4g}), and {risen:.0%} higher at step {end:,.0f}"
    says += f", most in the band {worst[1]} of the clock ({worst[0]:+.0%})" if worst else ""
    do = f"Stop near step {at:,.0f}, or train on more images; what comes after that is learned by heart."
    return Finding("fit.over", "harmful", says, do, run.again(f"steps={max(int(at), 1)}"), strength=risen / RISEN)


def under(run: Run) -> Finding | None:
    """The validation loss was still falling fast when the run ended."""
    fall = falling(run)
    if fall is None or fall <= FALLING:
        return None
    steps = int(run.records[-1]["step"])
    says = f"the validation loss fell by {fall:.0%} in the last quarter of {steps:,} steps: training was stopped early"
    return Finding("fit.under", "harmful", says, "Train longer.", run.again(f"steps={steps * 4}"),
                   strength=fall / FALLING)  # fmt: skip


def falling(run: Run) -> float | None:
    """The share that the validation loss lost over the last quarter of the run."""
    judged = run.series("validation")
    if len(judged) < 4 or judged[-1][1] <= 0:
        return None
    quarter = 0.75 * judged[-1][0]
    before = [value for step, value in judged if step <= quarter][-1]
    return 1 - judged[-1][1] / before


def _measures(run: Run, weights: Weights) -> tuple[Measure, ...]:
    rows = [Measure("steps", float(run.records[-1]["step"]) if run.records else 0.0)]
    known = (
        ("relative distance of the weights from the base", weights.moved, "above 0"),
        ("relative distance between the last two checkpoints", weights.between, "above 0"),
        ("relative change of the weights in a step", weights.update, f"{SMALL:g} to {LARGE:g}"),
        ("share of trained numbers without a gradient", weights.idle, "below 1"),
        ("share of the validation loss lost in the last quarter", falling(run), f"at most {FALLING:g}"),
    )
    rows += [Measure(name, value, bound=bound) for name, value, bound in known if value is not None]
    loss, judged = _binned(run.loss), run.series("validation")
    if loss and min(value for _, value in loss) > 0:
        rows.append(Measure("training loss at the end to its best", loss[-1][1] / min(v for _, v in loss),
                            bound=f"below {WORSE:g}"))  # fmt: skip
    if judged and min(value for _, value in judged) > 0:
        rows.append(Measure("validation loss at the end to its best", judged[-1][1] / min(v for _, v in judged),
                            bound=f"below {1 + RISEN:g}"))  # fmt: skip
    rows.append(Measure("spikes of the gradient", float(_spikes(run))))
    return tuple(rows)


def _rate(run: Run) -> float:
    """The highest learning rate of the run."""
    return max((value for _, value in run.series("rate")), default=1e-4)


def _binned(points: Points) -> Points:
    """Means over at most BINS equal parts of the run."""
    finite = [point for point in points if math.isfinite(point[1])]
    size = max(1, math.ceil(len(finite) / BINS))
    parts = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _scatter(points: Points) -> float:
    """How much neighbouring parts differ by luck: the deviation of second differences, over sqrt(6)."""
    values = torch.tensor([value for _, value in points], dtype=torch.float64)
    return float(values.diff(n=2).abs().median()) / 0.6745 / math.sqrt(6)


def _spikes(run: Run) -> int:
    keys = {key for record in run.records for key in record if key.startswith("gradient/")}
    count = 0
    for key in keys:
        values = torch.tensor([value for _, value in run.series(key)])
        count += int((values > SPIKE * values.median().clamp(min=1e-12)).sum())
    return count
