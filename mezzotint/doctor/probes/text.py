"""Whether the network listens to captions and labels, and whether it hears what was said in training."""

from __future__ import annotations

from collections import Counter

from mezzotint.doctor import consistency, readings, relabelling, rereading, steerings, trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.consistency import HEARD
from mezzotint.doctor.finding import Checked, Finding, Grade, Measure, NotChecked, measured
from mezzotint.doctor.probes.objective import curves
from mezzotint.doctor.readings import MIDDLE, Reading, Score
from mezzotint.doctor.rereading import TRAINED_WITH, WEAK
from mezzotint.doctor.statistics import Mean, mean

DEAF = 1e-3  # change of the output, relative, from one caption to another
FELT = 0.003  # the same from which something is heard at all; of an encoder that is another one 0.004 and more
FAINT = 10.0  # times too little that a caption changes, from which nothing is listened to
QUIET = 0.01  # gain of the right caption, over another one and none, below which nothing of it is understood
NEARLY = 0.9  # share of what captions change that is surely right, from which none of them is tried for another one
AGREED = 0.6  # share of a caption's images that must prefer the same other one
HEEDED = 0.01  # gain of an image's best caption over none from which that one is understood
COSTLY = 0.05  # what a random caption costs where captions are understood; 0.07 to 0.27, in other words below 0.05
SILENCE = 0.05  # what silence may change where no caption is better than another; in damaged networks 0.03
CUT = 0.05  # share of captions that may be longer than the encoder reads


def examine(case: Case) -> Checked:
    """Every image with its own caption, with another one's, with none; whether what the caption changes is right.

    A network that hears what it heard in training is calibrated: on average over images, the change from another
    caption to the right one is just the change towards the truth. The same with other layers and paddings of the
    encoder, and, where none of it is right, with every other caption.
    """
    model = case.model
    if model.text is None and model.contract.classes is None:
        raise NotChecked("nothing steers this model")
    words = steerings.wishes(case)
    if len(set(words)) < 2:
        raise NotChecked("needs images with different captions or labels: give --data a folder with metadata.jsonl")
    mine = trials.own(case)
    claim = mine.reading
    middle = mine.at(MIDDLE)
    other, none = steerings.swapped(case), steerings.unsteered(case)
    heard, against = middle.gain(other), middle.gain(none)
    change = response(case, claim, other.reading)
    measures = [
        Measure("change of the output from one caption to another", change, bound=f"above {DEAF:g}"),
        measured("gain of the right caption over another one", heard, "above 0"),
        measured("gain of the right caption over none", against),
    ]
    fit = consistency.told(case)
    measures.append(
        measured("share of what another caption changes that is right", fit, f"1; by chance 0.5; above {HEARD:g}")
    )
    findings = _lengths(case, change, measures)
    faint = max(fit, consistency.weight(case), key=lambda each: each.low)
    ignored = change <= DEAF or faint.low > (FAINT if model.text is not None else WEAK)
    best: Score | None = None
    if model.text is not None and not ignored and not built_in(case):
        best = rereading.tried(case, middle, none, measures, findings)
    if ignored and not findings:
        findings.append(_ignored(case, change, faint, measures))
    elif not ignored and best is None and trials.explanation(case) is None:
        found = _hearing(case, words, mine, other, none, change, measures)
        findings += [found] if found is not None else []
    plot = curves([middle, other, none], "error of the clean image by caption")
    return Checked(tuple(findings), tuple(measures), (plot,))


def _hearing(
    case: Case, words: list[str], mine: Score, other: Score, none: Score, change: float, measures: list[Measure]
) -> Finding | None:
    """Whether what the network hears is what was said to it in training, where no other reading is better."""
    middle, fit, apart = mine.at(MIDDLE), consistency.told(case), not built_in(case)
    heard, against = middle.gain(other), middle.gain(none)
    if fit.low > WEAK and apart:
        return _weak(fit, measures)
    if _hardly(case, mine, none):  # whatever it hears changes its answers by chance, but for silence
        strange = case.model.text is not None and heard.low <= 0 and max(against.low, -against.high) > SILENCE
        return _strange(heard, against, measures) if strange else None
    if misheard(case, middle, other, none) or (fit.low < NEARLY and apart and relabelling.exchanged(case, words)):
        return _misheard(case, words, middle, none, fit, measures)
    if (change > FELT or case.model.text is None) and heard.high < QUIET and (against.high < 2 * QUIET or not apart):
        return _unheard(case, change, measures)
    return None


def _hardly(case: Case, mine: Score, none: Score) -> bool:
    """Whether a network has learned less than a linear filter knows; where labels steer it, without them, too."""
    if trials.learned(case, mine).low <= 0:
        return False
    dropped = case.model.contract.guidance.dropout > 0
    return case.model.text is not None or (dropped and trials.learned(case, none).low > 0)


def _ignored(case: Case, change: float, faint: Mean, measures: list[Measure]) -> Finding:
    what = "captions" if case.model.text is not None else "labels"
    says = f"from one of the {what} to another the network's output changes by {change:.1e}"
    if change > DEAF:
        says += f", {faint.value:.3g} times too little ({faint.low:.3g} to {faint.high:.3g})"
    return Finding(
        "text.ignored", "harmful" if change > DEAF else "broken", says,
        "Look at the conditioning's layers: cross-attention or the class table may be untrained, zero, or not"
        " loaded; train with captions, and with less caption dropout.",
        strength=10.0, measures=tuple(measures[:1]),
    )  # fmt: skip


def _weak(fit: Mean, measures: list[Measure]) -> Finding:
    return Finding(
        "text.encoder", "harmful",
        f"captions change the right things {fit.value:.2g} times too little ({fit.low:.2g} to {fit.high:.2g}), as"
        " where they are said in another encoder's words",
        TRAINED_WITH, strength=fit.low / WEAK, measures=tuple(measures), also=("text.ignored",),
    )  # fmt: skip


def _strange(heard: Mean, against: Mean, measures: list[Measure]) -> Finding:
    return Finding(
        "text.encoder", "broken",
        f"the network denoises no better than a linear filter, the right caption helps no more than another one"
        f" ({heard.value:+.2f}), and yet captions change much against silence ({against.value:+.2f}): what is said is"
        " strange to it",
        TRAINED_WITH, strength=2.0, measures=tuple(measures[:3]), also=("weights.damaged",),
    )  # fmt: skip


def _unheard(case: Case, change: float, measures: list[Measure]) -> Finding:
    grade: Grade = "harmful"
    if case.model.text is not None:
        what, cause, grade = "captions", "text.encoder", "broken"
        do = "Use the text encoder and tokenizer of the training; if these are, the network never learned to listen."
    else:
        what, cause, do = "labels", "text.ignored", "Train with labels: the class table may be untrained or not loaded."
    return Finding(
        cause, grade,
        f"{what} change {100 * change:.2g} % of the network's output, and the right one helps no more than another one",
        do, strength=2.0, measures=tuple(measures[:3]), also=("text.ignored",),
    )  # fmt: skip


def misheard(case: Case, own: Score, other: Score, none: Score) -> bool:
    """Whether what is said changes the wrong things, or is worse than silence."""
    if built_in(case):
        return False
    lost = own.gain(none).high < 0 and own.gain(other).low <= 0
    return lost or consistency.misheard(case)


def built_in(case: Case) -> bool:
    """Whether guidance or few steps are built in: a caption's gain at a level then says nothing of its reading."""
    facts = case.model.contract
    claimed = facts.guidance.distilled or facts.sampling.sampler == "lcm"
    return claimed or consistency.guided(case) or consistency.calibration(case).distilled


def response(case: Case, claim: Reading, other: Reading, ratio: float = MIDDLE[-1]) -> float:
    """How much the raw output changes between two conditionings, of its deviation."""
    (_, _, a), *_ = readings.raw_of(case, claim, [ratio], len(claim.latents))
    (_, _, b), *_ = readings.raw_of(case, other, [ratio], len(claim.latents))
    return float((a - b).std() / a.std().clamp(min=1e-12))


def _lengths(case: Case, change: float, measures: list[Measure]) -> list[Finding]:
    text = case.model.text
    if text is None:
        return []
    room = text.readings(False)[0].length
    lengths = text.lengths(list(dict.fromkeys(case.images.captions)))
    cut = sum(length > room for length in lengths) / len(lengths)
    measures.append(Measure("share of captions longer than the encoder reads", cut, bound=f"at most {CUT:g}"))
    if cut <= CUT:
        return []
    return [
        Finding(
            "text.truncated", "broken" if change <= DEAF else "harmful",
            f"{100 * cut:.0f} % of the captions have more than the {room} tokens that the encoder reads (up to"
            f" {max(lengths)}):"
            " the network never sees their ends",
            "Say what matters first, shorten captions, or read them in pieces (long_prompt = \"chunk\") in training"
            " and after.",
            strength=1 + cut / CUT, measures=(measures[-1],),
        )
    ]  # fmt: skip


def _misheard(case: Case, words: list[str], middle: Score, none: Score, fit: Mean, measures: list[Measure]) -> Finding:
    """Captions that fit other images, labels that mean other classes, or an encoder that says something else."""
    known, own, tables = relabelling.every(case, words)
    table = (tables[0] + tables[1]) / 2
    inside = own >= 0
    preferred = table.argmin(1)
    free = [relabelling.error(case, none.reading, draw) for draw in (1, 2)]  # (N,)
    # the best by one noise, judged by the other: what is best by chance is so once
    gains = [free[j] - tables[j].gather(1, tables[i].argmin(1, keepdim=True)).squeeze(1) for i, j in ((0, 1), (1, 0))]
    best = mean((gains[0] + gains[1])[inside] / 2)
    loss = float((table.mean(1) - (free[0] + free[1]) / 2)[inside].mean())  # of a caption at random
    measures += [
        measured("gain of each image's best caption over none", best),
        Measure("what a caption at random costs, against none", loss),
        Measure("share of images that prefer their own caption", float((preferred == own)[inside].float().mean())),
    ]
    moved = {
        word: Counter(preferred[own == i].tolist()).most_common(1)[0]
        for i, word in enumerate(known)
        if int((own == i).sum()) >= 2
    }
    agreed = [
        (word, known[to]) for word, (to, count) in moved.items()
        if count >= AGREED * int((own == known.index(word)).sum())
    ]  # fmt: skip
    elsewhere = [(a, b) for a, b in agreed if a != b]
    says = f"what captions change is right to {100 * fit.value:.0f} % ({100 * fit.low:.0f} to {100 * fit.high:.0f})"
    heeds = best.deviations > 1 and best.value > HEEDED and loss > COSTLY
    if case.model.text is None:
        taken = ", ".join(f"{a} for {b}" for a, b in elsewhere[:6]) or "each label for several others"
        return Finding(
            "text.labels", "broken", f"{says}; the network takes label {taken}",
            "Put the class names in the order of training, or correct the labels of the data.", strength=5.0,
            measures=tuple(measures),
        )  # fmt: skip
    if heeds:
        return Finding(
            "text.captions", "harmful",
            f"{says}, and yet each image has one that helps ({best.value:.2f} better than none): captions and images"
            " do not"
            " belong together",
            "Correct the captions: rows of metadata.jsonl may have slipped, or were written for other images.",
            strength=4.0, measures=tuple(measures), also=("text.encoder",),
        )  # fmt: skip
    why = f"none of the captions helps an image ({best.value:+.2f} against none), though the output changes with them"
    if best.low > 0:
        why = f"a caption at random costs an image no more than none ({loss:+.2f}), as where none is understood"
    return Finding(
        "text.encoder", "broken", f"{says}, and {why}",
        TRAINED_WITH, strength=4.0, measures=tuple(measures), also=("text.captions", "text.layer"),
    )  # fmt: skip
