"""Are the weights those of a trained network: finite, none left at its start, none damaged, none rounded away?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from mezzotint.doctor import averages, damage, readings
from mezzotint.doctor.case import Case
from mezzotint.doctor.damage import Odd, Trial
from mezzotint.doctor.finding import Checked, Finding, Grade, Measure, NotChecked, Plot
from mezzotint.doctor.grids import Grid, grid_of
from mezzotint.doctor.layers import Layer, block_of, layers, median, siblings
from mezzotint.errors import InputError

OUTPUTS = ("conv_out.weight", "proj_out.weight", "proj_out_2.weight", "norm_out.linear.weight")
LOST = 0.05  # share of exact zeros among numbers: below 1e-4 in networks that are well, 0.5 where half was pruned
COARSE = 0.05  # share of a part's numbers on a coarse grid from which it counts
SECONDS = 30.0  # that trying each block may take where nothing speaks for damage
HELPS = 0.1  # what leaving a block out gains, in log error: at most 0.001 in networks that are well
BAD = -0.1  # score from which on a network denoises no better than a filter that knows means and variances


def examine(case: Case) -> Checked:
    """Every tensor by itself and against its kind; with images, what the network gains without each of its blocks."""
    every = layers(case.bare, case.say)
    broken = _not_finite(every)
    if broken:
        return Checked((broken,), _measures(every))
    findings = [*_zero(every), *_precision(every), *_tied(every)]
    whole = _never_trained(every)
    findings += whole
    if not any(found.grade == "broken" for found in findings):
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


def _named(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _not_finite(every: Sequence[Layer]) -> Finding | None:
    lost = [layer for layer in every if not layer.finite]
    if not lost:
        return None
    parts = " and ".join(dict.fromkeys(layer.network for layer in lost))
    return Finding(
        "weights.finite", "broken",
        f"{len(lost)} of {len(every)} tensors hold NaN or infinity, in the {parts}: {_named([x.place for x in lost])}.",
        "Copy or download the file again; where a training wrote it, go back to a checkpoint before the loss left its"
        " course, and train in bfloat16 or float32.",
        strength=float(len(lost)),
    )  # fmt: skip


def _zero(every: Sequence[Layer]) -> list[Finding]:
    """Matrices, and scales of norms, that are zero as a whole."""
    dead = [x for x in every if x.zero and (x.matrix or ("norm" in x.name and x.name.endswith("weight")))]
    if not dead:
        return []
    kinds = siblings(every)
    alone = [layer for layer in dead if any(not other.zero for other in kinds[layer.kind])]
    last = [layer for layer in dead if layer.part == "backbone" and layer.name in OUTPUTS]
    grade: Grade = "broken" if last else "harmful"
    parts = " and ".join(dict.fromkeys(layer.network for layer in dead))
    beside = f", {len(alone)} of them among layers of their kind that are not" if alone else ""
    so = " The network's output is zero." if last else " What these layers add is left out."
    return [Finding(
        "weights.zero", grade,
        f"{len(dead)} tensors of the {parts} are exactly zero{beside}: {_named([x.place for x in dead])}.{so}",
        "Take the weights from a checkpoint in which these layers are trained; where a training wrote this one, see that"
        " it reaches them (learning rate, frozen parameters) before going on.",
        strength=float(1 + len(dead)),
    )]  # fmt: skip


def _never_trained(every: Sequence[Layer]) -> list[Finding]:
    """Networks none of whose matrices has any order."""
    found: list[Finding] = []
    for network in dict.fromkeys(layer.network for layer in every):
        judged = [layer for layer in every if layer.network == network and layer.judged]
        ordered = [layer for layer in judged if layer.order >= damage.CHANCE]
        # one in twenty may be a table with an order of its own, such as positions
        if len(judged) < damage.FEW or len(ordered) > 0.05 * len(judged):
            continue
        text = judged[0].part == "text"
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


def _untrained(every: Sequence[Layer], whole: Sequence[Finding]) -> list[Finding]:
    """Blocks with matrices that are still the numbers of their start, in networks that are otherwise trained."""
    found = [layer for layer in every if damage.fresh(layer) and not any(layer.network in x.says for x in whole)]
    if not found:
        return []
    blocks = list(dict.fromkeys(f"{layer.network} {block_of(layer.name)}" for layer in found))
    numbers = sum(layer.tensor.numel() for layer in found)
    share = numbers / sum(x.tensor.numel() for x in every if x.part == found[0].part)
    widest = max(layer.largest for layer in found)
    rest = median(layer.largest for layer in every if layer.judged and layer not in found)
    return [Finding(
        "weights.untrained", "harmful",
        f"{len(found)} matrices of {_named(blocks)} ({share:.1%} of the numbers) are still the uniform random numbers"
        f" that layers start as: no entry beyond {widest:.2f} deviations (others {rest:.1f}), in random order.",
        "Train these blocks, or take them from the checkpoint that this one was made of.",
        strength=damage.UNIFORM / widest + len(found), also=("weights.damaged",),
    )]  # fmt: skip


def _precision(every: Sequence[Layer]) -> list[Finding]:
    """Matrices on coarse grids, and matrices much of which was rounded to zero."""
    found: list[Finding] = []
    for network in dict.fromkeys(layer.network for layer in every):
        own = [x for x in every if x.network == network and x.matrix and not x.zero]
        numbers = max(1, sum(layer.tensor.numel() for layer in own))
        grids: list[tuple[Layer, Grid]] = [(x, grid) for x in own if (grid := grid_of(x.tensor)) is not None]
        for coarse in (True, False):
            chosen = [(x, grid) for x, grid in grids if grid.coarse is coarse]
            share = sum(x.tensor.numel() for x, _ in chosen) / numbers
            if share < COARSE:
                continue
            name = max(chosen, key=lambda pair: pair[0].tensor.numel())[1].name
            found.append(Finding(
                "weights.precision", "harmful" if coarse else "note",
                f"{share:.0%} of the {network}'s numbers lie on a coarse grid, whatever format holds them: {name}, in"
                f" {len(chosen)} of {len(own)} matrices.",
                "Use the file that this one was rounded from, in float16, bfloat16 or float32.",
                strength=share / COARSE,
            ))  # fmt: skip
        ons = {id(x) for x, _ in grids}
        lost = [x for x in own if x.zeros > LOST and id(x) not in ons]
        share = sum(x.tensor.numel() * x.zeros for x in lost) / numbers
        if lost:
            worst = max(lost, key=lambda layer: layer.zeros)
            found.append(Finding(
                "weights.precision", "harmful" if share > LOST else "note",
                f"{len(lost)} of {len(own)} matrices of the {network} have exact zeros between other numbers, as numbers"
                f" too small for their format or pruned ones become: {share:.1%} of all, {worst.zeros:.0%} in"
                f" {worst.place}.",
                "Use the file that this one was made of, in bfloat16 or float32.",
                strength=max(1.0, worst.zeros / LOST),
            ))  # fmt: skip
    return found


def _tied(every: Sequence[Layer]) -> list[Finding]:
    """Exact copies among layers of a kind; where all of a kind are one, that is how the network is built."""
    pairs: list[tuple[Layer, Layer]] = []
    for kind in siblings(every).values():
        groups: dict[tuple[object, ...], list[Layer]] = {}
        for x in kind:
            if x.judged:
                first = x.tensor.flatten()[:64]
                groups.setdefault((tuple(x.tensor.shape), *first.tolist()), []).append(x)
        if len(groups) < 2:
            continue
        for group in groups.values():
            pairs += [(group[0], other) for other in group[1:] if bool((other.tensor == group[0].tensor).all())]
    if not pairs:
        return []
    blocks = list(dict.fromkeys(f"{block_of(b.name)} = {block_of(a.name)}" for a, b in pairs))
    return [Finding(
        "weights.tied", "harmful",
        f"{len(pairs)} matrices are exact copies of others of their kind, in {_named(blocks)}: trained layers never are.",
        "Take these layers from the checkpoint that this one was merged or converted from.",
        strength=float(1 + len(pairs)),
    )]  # fmt: skip


def _damaged(case: Case, every: Sequence[Layer], before: Sequence[Finding]) -> list[Finding]:
    """What the numbers say, and with images what the network gains by each block's being left out."""
    large = [odd for odd in damage.outsized(every)]
    random = damage.scrambled(every) if not any(x.cause == "weights.untrained" for x in before) else []
    told = _tried(case, [*random, *large])
    findings: list[Finding] = []
    if odd := [*random, *large]:
        odd.sort(key=lambda each: -each.strength)
        blocks = list(dict.fromkeys(block_of(each.layer.name) for each in odd))
        harm = [trial for trial in told if trial.gain.low > 0 and trial.name in blocks]
        more = f" {_gains(harm[0])}" if harm else ""
        also = ("weights.untrained",) if random else ()
        findings.append(Finding(
            "weights.damaged", "harmful",
            f"{len(odd)} tensors of {_named(blocks)} do not look like the others of their kind:"
            f" {odd[0].layer.place}, {odd[0].why}.{more}",
            "Take these layers from an intact copy, or from the checkpoint that this one was made of.",
            strength=max(1.0, *(each.strength for each in odd)), also=also,
        ))  # fmt: skip
    elif told and told[0].gain.value > HELPS and told[0].gain.low > 0:
        worst = told[0]
        findings.append(Finding(
            "weights.damaged", "harmful", f"The weights of {worst.name} do harm. {_gains(worst)}",
            f"Take {worst.name} from an intact copy, or from the checkpoint that this one was made of.",
            strength=max(1.0, worst.gain.value / HELPS),
        ))  # fmt: skip
    return findings


def _gains(trial: Trial) -> str:
    gain = 100 * (1 - math.exp(-trial.gain.value))
    low, high = (100 * (1 - math.exp(-edge)) for edge in (trial.gain.low, trial.gain.high))
    return (
        f"Without {trial.name} the network denoises your images with {gain:.0f} % less error (95 %: {low:.0f} to"
        f" {high:.0f})."
    )


def _tried(case: Case, odd: Sequence[Odd]) -> list[Trial]:
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
    if not odd and not bad and seconds > SECONDS:
        return []
    if bad and not odd and damage.explained(case, own):
        return []
    return damage.without(case, own)
