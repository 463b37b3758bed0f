"""Does each adapter fit this model, change it, and change it for the better at the weight asked for?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mezzotint.adapters import BACKBONE, Adapter
from mezzotint.doctor import file_faults, loras, strengths
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Measure, NotChecked, Plot
from mezzotint.doctor.layers import median
from mezzotint.doctor.loras import Opened, Update
from mezzotint.doctor.statistics import Mean
from mezzotint.errors import InputError

LARGE = 1.0  # the same from which an update outweighs the weight that it changes
BAD = -0.1  # score from which on a network denoises no better than a filter that knows means and variances
FACTOR = 3.0  # that the best weight may be from the one asked for
STRONG = 3.0  # weight times alpha / rank: trainers' defaults are 1 / 32 to 2
GAIN = 0.02  # log error that another weight must gain, or an adapter must lose, before it counts
WORTH = 0.3  # the same for each unit of its updates against the weights: trained ones 0.8 and more, others 0.1
CHANGES = 0.01  # update against weight, at the median, of an adapter that was trained at all
OPPOSED = -0.5  # mean cosine of two adapters' updates below which they undo each other
SAME, ONCE = 0.98, 1.5  # and above which they are one adapter given twice; the sum of weights that is then too much
MARGIN = 0.05  # log error by which a blend may be worse than the better of its adapters alone


def examine(case: Case) -> Checked:
    """Each file by itself, from its keys to what it does on the user's images; then all of them together."""
    if not case.lora:
        raise NotChecked("needs an adapter: give --lora FILE")
    every = [loras.opened(case.bare, path, weight) for path, weight in case.lora]
    findings: list[Finding] = []
    measures: list[Measure] = []
    plots: list[Plot] = []
    sound: list[tuple[Opened, Adapter, float]] = []  # with the median size of its updates against the weights
    for each in every:
        lost = file_faults.finite(each)
        findings += lost or [
            *file_faults.claims(case, each), *file_faults.keys(case, each), *file_faults.text(each),
            *file_faults.strength(case, each),
        ]  # fmt: skip
        if each.adapter is None or lost:
            continue
        changes = loras.updates(case.bare, each.adapter, each.weight)
        empty = file_faults.empty(each, changes)
        findings += [*empty, *file_faults.rank(each, changes)]
        measures += _measures(each, changes)
        plots.append(_plot(each, changes))
        if not empty:
            sound.append((each, each.adapter, median(change.ratio for change in changes)))
    if case.data is not None and sound:
        try:
            alone = len(every) == 1
            more = _strength(case, findings, *sound[0]) if alone else _blend(case, [pair[:2] for pair in sound])
        except (NotChecked, InputError):  # the latents or labels, which other probes report
            more = Checked()
        findings += more.findings
        measures += more.measures
        plots += more.plots
    return Checked(tuple(findings), tuple(measures), tuple(plots))


def _measures(each: Opened, changes: Sequence[Update]) -> list[Measure]:
    ratios = sorted(change.ratio for change in changes)
    used = sorted(change.rank / change.low.rank for change in changes)
    name = each.name
    return [
        Measure(f"{name}: update against weight, median", ratios[len(ratios) // 2], ratios[0], ratios[-1]),
        Measure(f"{name}: share of the rank that holds 99 %, median", used[len(used) // 2], used[0], used[-1]),
    ]


def _plot(each: Opened, changes: Sequence[Update]) -> Plot:
    sizes = [(float(i), max(1e-9, change.ratio)) for i, change in enumerate(changes)]
    names = [change.module if change.part == BACKBONE else f"{change.part}: {change.module}" for change in changes]
    title = f"How large {each.name} is against the weights it changes"
    return Plot(title, "module", "||update|| / ||weight||", {each.name: sizes}, "bars", log_y=True, labels=names)


def _gain(name: str, gain: Mean, bound: str = "") -> Measure:
    return Measure(name, gain.value, gain.low, gain.high, bound, "log error")


def _percent(gain: Mean) -> str:
    value, low, high = (100 * (1 - math.exp(-edge)) for edge in (gain.value, gain.low, gain.high))
    return f"{value:.1f} % (95 %: {low:.1f} to {high:.1f})"


def _strength(case: Case, before: Sequence[Finding], each: Opened, adapter: Adapter, size: float) -> Checked:
    """What the adapter does on the user's images, at the weight asked for and at others."""
    if each.contract is not None and each.contract.sampling is not None:
        return Checked()  # made to draw in few steps, which denoising at single levels does not measure
    found = strengths.search(case, adapter, each.weight)
    name = each.name
    measures = (
        _gain(f"{name}: what it gains on the images", found.helps, f"above -{GAIN}"),
        Measure(f"{name}: best multiple of its weight", found.multiple, bound=f"1/{FACTOR:g} to {FACTOR:g}"),
        _gain(f"{name}: what that gains", found.better, f"at most {GAIN}"),
    )
    plot = Plot(
        f"{name} at other weights", "multiple of its weight", "log error on a few images",
        {"with it": found.curve, "without": [(k, found.none.mean.value) for k, _ in (found.curve[0], found.curve[-1])]},
        log_x=True,
    )  # fmt: skip
    if found.none.mean.value > BAD and found.best.mean.value > BAD:
        return Checked((), measures, (plot,))  # the model itself does not denoise: nothing can be said of its adapter
    if any(x.cause == "adapter.scale" for x in before):  # the file says it already, and by which factor
        return Checked((), measures, (plot,))
    return Checked(tuple(_judged(case, each, adapter, size, found)), measures, (plot,))


def _judged(case: Case, each: Opened, adapter: Adapter, size: float, found: strengths.Search) -> list[Finding]:
    k, name = found.multiple, each.name
    far = max(found.tried, 1 / found.tried) > FACTOR and max(k, 1 / k) > FACTOR
    least = max(GAIN, WORTH * size * found.tried)
    useful = found.possible.low > 0 and found.possible.value > least
    if far and useful and found.better.low > 0 and found.better.value > GAIN:
        low = max((low for lows in adapter.parts.values() for low in lows), key=lambda each: each.rank)
        usual = strengths.mistake(k, low.rank, low.rank if low.alpha is None else low.alpha)
        says = (
            f"{name} acts {'too weakly' if k > 1 else 'too strongly'}: at {each.weight * k:.3g} instead of"
            f" {each.weight:g} the error on your images falls by {_percent(found.better)}."
        )
        says += f" The factor of {k:.3g} is about {usual}." if usual else ""
        return [Finding(
            "adapter.scale", "harmful", says,
            f"Give it the weight {each.weight * k:.2g}; to mend the file, multiply its alpha by {k:.2g}.",
            f"mezzotint generate --model {case.path} --lora {each.path}@{each.weight * k:.2g} --out out",
            strength=max(k, 1 / k) / FACTOR,
        )]  # fmt: skip
    loss = found.none.gain(found.asked)
    if useful:
        return []
    if loss.low <= 0 or loss.value <= GAIN:
        return _useless(case, each, adapter, size, found, least)
    says = f"With {name} the error on your images is larger; without it, it is less by {_percent(loss)}."
    sentence, command = _on_base(case, each, adapter)
    strength = max(abs(low.scale) for lows in adapter.parts.values() for low in lows) * abs(each.weight)
    if strength > STRONG and not sentence:
        return [Finding(
            "adapter.scale", "harmful",
            f"{says} Its updates are multiplied by {strength:.3g}, weight and alpha / rank together, where 0.03 to 2 is"
            f" usual, and no weight makes it help.",
            f"Give it the weight {each.weight / strength:.2g}, at which they are multiplied by 1.",
            f"mezzotint generate --model {case.path} --lora {each.path}@{each.weight / strength:.2g} --out out",
            strength=strength / STRONG, also=("adapter.base",),
        )]  # fmt: skip
    return [Finding(
        "adapter.base", "harmful", f"{says} No weight makes it help.{sentence}",
        "Use the adapter with the model that it was trained on; or give --data the images that it was made for.",
        command, strength=max(1.0, loss.value / GAIN), also=("adapter.scale",),
    )]  # fmt: skip


def _useless(
    case: Case, each: Opened, adapter: Adapter, size: float, found: strengths.Search, least: float
) -> list[Finding]:
    """An adapter that changes weights, as one that was trained does, and helps nothing."""
    if max(found.possible.high, found.helps.high) >= least or size < CHANGES:
        return []
    sentence, command = _on_base(case, each, adapter)
    return [Finding(
        "adapter.base", "harmful",
        f"{each.name} changes weights by {100 * size:.2g} % and gains next to nothing on your images"
        f" ({_percent(found.helps)}), nor does any other weight of it.{sentence}",
        "Use the adapter with the model that it was trained on; or give --data the images that it was made for.",
        command, also=("adapter.keys",),
    )]  # fmt: skip


def _on_base(case: Case, each: Opened, adapter: Adapter) -> tuple[str, str]:
    """What it does on the second model, where there is one that it fits: a sentence and a command."""
    if case.base is None or case.base.path is None:
        return "", ""
    other = loras.opened(case.base, each.path, each.weight)
    if other.adapter is None or other.lost or other.misshapen or other.claims:
        return "", ""
    there = Case(case.base.path, case.base, case.data, seed=case.seed)
    gain = strengths.scored(there, [(other.adapter, each.weight)]).gain(strengths.scored(there, []))
    if gain.low <= 0:
        return "", ""
    command = f"mezzotint generate --model {case.base.path} --lora {each.path}@{each.weight:g} --out out"
    return f" On {case.base.path.name} it lowers the error by {_percent(gain)}.", command


def _blend(case: Case, every: Sequence[tuple[Opened, Adapter]]) -> Checked:
    """Adapters together against each alone, and how far their updates point the same way."""
    measures: list[Measure] = []
    plots: list[Plot] = []
    for i, (one, first) in enumerate(every):
        for other, second in every[i + 1 :]:
            named = {(part, low.module): low for part, lows in second.parts.items() for low in lows}
            shared = [
                loras.cosine(low, named[part, low.module])
                for part, lows in first.parts.items() for low in lows if (part, low.module) in named
            ]  # fmt: skip
            pair = f"{one.name} and {other.name}"
            if shared:
                mean = sum(shared) / len(shared)
                measures.append(Measure(f"{pair}: cosine of their updates", mean, min(shared), max(shared)))
                bars = {pair: [(float(at), value) for at, value in enumerate(shared)]}
                plots.append(Plot(f"Whether {pair} pull the same way", "module", "cosine", bars, "bars"))
    cosines = sorted((m for m in measures if m.name.endswith("cosine of their updates")), key=lambda m: m.value)
    against = cosines[0] if cosines else None
    if against is not None and against.value < OPPOSED:
        finding = Finding(
            "adapter.blend", "harmful",
            f"{against.name.partition(':')[0]} undo each other: the cosine of their updates is {against.value:.2f}",
            "Use one of them alone.", strength=against.value / OPPOSED, measures=(against,),
        )  # fmt: skip
        return Checked((finding,), tuple(measures), tuple(plots))
    if len(every) < 2:
        return Checked((), tuple(measures), tuple(plots))
    found = strengths.blend(case, [(adapter, each.weight) for each, adapter in every])
    best = found.alone[found.better]
    loss = best.gain(found.together)
    measures.append(_gain("what the better adapter alone gains against all", loss, f"at most {MARGIN}"))
    measures.append(_gain("what all adapters gain against none", found.together.gain(found.none)))
    if loss.low <= 0 or loss.value <= MARGIN:
        return Checked(_twice(every, cosines), tuple(measures), tuple(plots))
    gain = found.best.gain(found.together)
    wanted = [(each.path, weight) for (each, _), weight in zip(every, found.weights, strict=True)]
    flags = " ".join(f"--lora {path}@{weight:g}" for path, weight in wanted if weight)
    finding = Finding(
        "adapter.blend", "harmful",
        f"Together the adapters do worse than {every[found.better][0].name} alone, whose error on your images is"
        f" less by {_percent(loss)}; at the weights {', '.join(f'{weight:g}' for _, weight in wanted)} it is less by"
        f" {_percent(gain)}.",
        "Lower the weights as shown, or use the adapters one at a time.",
        f"mezzotint generate --model {case.path} {flags} --out out".replace("  ", " "),
        strength=loss.value / MARGIN,
    )  # fmt: skip
    return Checked((finding,), tuple(measures), tuple(plots))


def _twice(every: Sequence[tuple[Opened, Adapter]], cosines: Sequence[Measure]) -> tuple[Finding, ...]:
    """One adapter under two names, that acts with the sum of its weights."""
    weight = sum(each.weight for each, _ in every)
    if len(every) != 2 or not cosines or (cosines[0].low or 0.0) < SAME or weight <= ONCE:
        return ()
    return (Finding(
        "adapter.blend", "harmful",
        f"{cosines[0].name.partition(':')[0]} are one adapter given twice (the cosine of their updates is"
        f" {cosines[0].value:.3f}): it acts with the sum of their weights, {weight:g}",
        "Give it once, at the weight that it needs.", strength=weight / ONCE, measures=(cosines[0],),
    ),)  # fmt: skip
