"""Are the weights those of a trained network: finite, none left at its start, none damaged, none rounded away?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from mezzotint.doctor import averages, consistency, damage, readings, tensor_faults, trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.damage import Trial
from mezzotint.doctor.finding import Checked, Finding, Grade, Measure, NotChecked, Plot
from mezzotint.doctor.layers import Layer, blocks_of, layers, median
from mezzotint.errors import InputError

SECONDS = 30.0  # that trying each block may take where nothing speaks for damage
HELPS = 0.1  # what leaving a block out gains, in log error: at most 0.001 in networks that are well
SIZED = 0.2  # from 1 the slope of the target on the output, within which a network was trained at all
BAD = -0.1  # score from which on a network denoises no better than a filter that knows means and variances


def examine(case: Case) -> Checked:
    """Every tensor by itself and against its kind; with images, what the network gains without each of its blocks."""
    every = layers(case.bare, case.say)
    broken = tensor_faults.not_finite(every)
    if broken:
        return Checked((broken,), _measures(every))
    findings = [*tensor_faults.zero(every), *tensor_faults.precision(every), *tensor_faults.tied(every)]
    whole = _never_trained(case, every)
    findings += whole
    blank = any(layer.part == "backbone" and layer.network in _orderless(every) for layer in every)
    if not blank and not any(found.grade == "broken" for found in findings):
        findings += _untrained(every, whole)
        findings += _damaged(case, every, findings)
    average = averages.examine(case)
    findings += [average] if average else []
    return Checked(tuple(findings), _measures(every), _plots(every))


def _measures(every: Sequence[Layer]) -> tuple[Measure, ...]:
    numbers = sum(layer.tensor.numel() for layer in every)
    judged = [layer for layer in every if layer.judged and layer.part == "backbone"]
    ordered = [layer for layer in judged if layer.order >= damage.CHANCE]
    bell = [layer for layer in judged if layer.kurtosis > damage.BELL]
    dead = sum(layer.tensor.numel() for layer in every if layer.zero and layer.matrix)
    found = [
        Measure("numbers in all parts", float(numbers)),
        Measure("share in matrices that are zero", dead / max(1, numbers), bound="0"),
    ]
    if judged:
        found += [
            Measure("share of the backbone's matrices that are bell-shaped", len(bell) / len(judged)),
            Measure("share of the backbone's matrices whose entries have an order", len(ordered) / len(judged)),
            Measure("median order of the backbone's matrices", median(x.order for x in judged), unit="deviations"),
        ]
    return tuple(found)


def _plots(every: Sequence[Layer]) -> tuple[Plot, ...]:
    judged = [layer for layer in every if layer.judged and layer.part == "backbone"]
    if not judged:
        return ()
    places = [layer.place for layer in judged]
    gains = {"gain": [(float(i), layer.gain) for i, layer in enumerate(judged)]}
    orders = {"order": [(float(i), max(0.1, layer.order)) for i, layer in enumerate(judged)]}
    return (
        Plot("What each matrix makes of a unit input", "matrix", "gain", gains, "bars", log_y=True, labels=places),
        Plot("How ordered each matrix is", "matrix", "deviations from chance", orders, "bars", False, True, places),
    )


def _orderless(every: Sequence[Layer]) -> list[str]:
    """The networks but one in twenty of whose matrices stand in random order: that one may be a table of positions."""
    found: list[str] = []
    for network in dict.fromkeys(layer.network for layer in every):
        judged = [layer for layer in every if layer.network == network and layer.judged]
        ordered = [layer for layer in judged if layer.order >= damage.CHANCE]
        if len(judged) >= damage.FEW and len(ordered) <= 0.05 * len(judged):
            found.append(network)
    return found


def _never_trained(case: Case, every: Sequence[Layer]) -> list[Finding]:
    """Networks none of whose matrices has any order."""
    found: list[Finding] = []
    for network in _orderless(every):
        judged = [layer for layer in every if layer.network == network and layer.judged]
        ordered = [layer for layer in judged if layer.order >= damage.CHANCE]
        text = judged[0].part == "text"
        if judged[0].part == "backbone" and _learned(case):  # a little: the probe of the fit says how much
            continue
        says = f"The entries of {len(judged) - len(ordered)} of {len(judged)} matrices of the {network} stand in random"
        after = "prompts are told apart by chance alone" if text else "nothing was learned by it"
        found.append(Finding(
            "weights.untrained", "note" if text else "broken",
            f"{says} order (median {median(x.order for x in judged):.1f} deviations; trained ones have hundreds):"
            f" {after}.",
            f"Put the trained weights of the {network} in its place." if not text else
            f"Put the {network} in its place that the backbone was trained with, if that is not this one.",
            strength=damage.ORDERED / max(0.5, median(x.order for x in judged)),
        ))  # fmt: skip
    return found


def _learned(case: Case) -> bool:
    """Whether the backbone's answers are of the right size, as only training makes them, however short it was."""
    try:
        return abs(consistency.optimum(case).value - 1) < SIZED
    except (NotChecked, InputError):
        return False


def _untrained(every: Sequence[Layer], whole: Sequence[Finding]) -> list[Finding]:
    """Blocks with matrices that are still the numbers of their start, in networks that are otherwise trained."""
    found = [layer for layer in every if damage.fresh(layer) and not any(layer.network in x.says for x in whole)]
    if len(found) < 2:  # a layer whose output nothing reads stays fresh: the last queries of text in joint attention
        return []
    blocks = blocks_of(layer.place for layer in found)
    numbers = sum(layer.tensor.numel() for layer in found)
    share = numbers / sum(x.tensor.numel() for x in every if x.part == found[0].part)
    widest = max(layer.largest for layer in found)
    rest = median(layer.largest for layer in every if layer.judged and layer not in found)
    return [Finding(
        "weights.untrained", "harmful",
        f"{len(found)} matrices of {tensor_faults.named(blocks)} ({share:.1%} of the numbers) are still the uniform"
        f" random numbers that layers start as: no entry beyond {widest:.2f} deviations (others {rest:.1f}), in random"
        " order.",
        "Train these blocks, or take them from the checkpoint that this one was made of.",
        strength=damage.UNIFORM / widest + len(found), also=("weights.damaged",),
    )]  # fmt: skip


def _damaged(case: Case, every: Sequence[Layer], before: Sequence[Finding]) -> list[Finding]:
    """What the numbers say, and with images what the network gains by each block's being left out."""
    told_already = any(x.cause == "weights.untrained" and x.grade != "note" for x in before)
    random = [] if told_already else damage.scrambled(every)
    findings: list[Finding] = []
    told = _tried(case, bool(random))
    if random:
        blocks = blocks_of(each.layer.name for each in random)
        harm = [trial for trial in told if trial.gain.low > 0 and trial.gain.value > HELPS and trial.name in blocks]
        worst = max(random, key=lambda odd: odd.strength)
        findings.append(Finding(
            "weights.damaged", "harmful",
            f"{len(random)} matrices of {tensor_faults.named(blocks)} do not look like others of their kind: of"
            f" {worst.layer.place} {worst.why}.{f' {_gains(harm[0])}' if harm else ''}",
            "Take these layers from an intact copy, or from the checkpoint that this one was made of.",
            strength=max(1.0, worst.strength), also=("weights.untrained",),
        ))  # fmt: skip
    findings += _outsized(case, every)
    if not findings and told and told[0].gain.value > HELPS and told[0].gain.low > 0:
        worst = told[0]
        findings.append(Finding(
            "weights.damaged", "harmful", f"The weights of {worst.name} do harm. {_gains(worst)}",
            f"Take {worst.name} from an intact copy, or from the checkpoint that this one was made of.",
            strength=max(1.0, worst.gain.value / HELPS),
        ))  # fmt: skip
    return findings


def _outsized(case: Case, every: Sequence[Layer]) -> list[Finding]:
    """Tensors of another size than their kind; with images, whether the usual size denoises them better."""
    odd = sorted(damage.outsized(every), key=lambda each: -each.strength)
    if not odd:
        return []
    where, worst = tensor_faults.named(blocks_of(each.layer.name for each in odd)), odd[0]
    says = f"{len(odd)} tensors of {where} are of another size than their kind: {worst.layer.place}, {worst.why}."
    gain = damage.resized(case, odd)
    grade: Grade = "harmful"
    if gain is not None:
        percent = [100 * (1 - math.exp(-edge)) for edge in (gain.value, gain.low, gain.high)]
        says += (
            f" At the usual size the network denoises your images with {percent[0]:.1f} % less error"
            f" (95 %: {percent[1]:.1f} to {percent[2]:.1f})."
        )
        grade = "harmful" if gain.low > 0 else "note"  # a norm behind a layer takes its size away
    return [Finding(
        "weights.damaged", grade, says,
        "Take these layers from an intact copy, or from the checkpoint that this one was made of.",
        strength=max(1.0, worst.strength),
    )]  # fmt: skip


def _gains(trial: Trial) -> str:
    gain = 100 * (1 - math.exp(-trial.gain.value))
    low, high = (100 * (1 - math.exp(-edge)) for edge in (trial.gain.low, trial.gain.high))
    return (
        f"Without {trial.name} the network denoises your images with {gain:.0f} % less error (95 %: {low:.0f} to"
        f" {high:.0f})."
    )


def _tried(case: Case, suspected: bool) -> list[Trial]:
    """Blocks by what leaving them out gains; none where there are no images, or where something else explains all."""
    if case.data is None:
        return []
    try:
        own = damage.reading(case)
        begun = time.perf_counter()
        score = readings.score(case, own, damage.LEVELS, min(readings.FIRST, len(own.latents)))
    except (NotChecked, InputError):
        return []
    seconds = (time.perf_counter() - begun) * damage.count(case)
    bad = score.mean.value > BAD
    if not suspected and not bad and seconds > SECONDS:
        return []
    if not suspected and trials.explanation(case) is not None:
        return []
    return damage.without(case, own)
