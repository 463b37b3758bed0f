"""Whether a network hears more where its text encoder is read in another way."""

from __future__ import annotations

from dataclasses import replace

from mezzotint.doctor import consistency, readings
from mezzotint.doctor.case import Case
from mezzotint.doctor.encoders import Otherwise, otherwise
from mezzotint.doctor.finding import Finding, Measure, measured
from mezzotint.doctor.readings import Reading, Score
from mezzotint.doctor.statistics import Mean

BETTER = 0.006  # gain of another way to read the encoder
SURE = 3.0  # standard errors of that gain; a handful of ways is tried, by ROUNDS noises
LITTLE = 0.05  # the same in a network whose weights were moved
CHANCE = 0.5  # share of what captions change that is right by chance; read rightly it is surely more
WEAK = 1.5  # times too little that a caption changes: of another encoder
TRAINED_WITH = "Use the text encoder and tokenizer that the network was trained with."


def tried(case: Case, middle: Score, none: Score, measures: list[Measure], findings: list[Finding]) -> Score | None:
    """The best other way to read the encoder, where it is clearly better, and better than no caption; its finding goes
    to `findings`, and what was measured to `measures`."""
    claim, text = middle.reading, case.model.text
    ways: dict[str, Otherwise] = {way.says: way for way in otherwise(text)} if text is not None else {}
    if not ways:
        return None
    captions, labels = case.images.captions, case.images.labels
    others: list[Reading] = []
    for says, way in ways.items():
        others.append(claim.named(says, steering=case.steered(replace(case.model, text=way.encoder), captions, labels)))
    scores = readings.contest(case, middle, others)
    best = scores[0]
    gain = readings.surely(case, middle, best, BETTER, SURE)
    name = f"gain of the best other way to read the encoder ({best.reading.name})"
    measures.append(measured(name, gain, f"at most {BETTER:g}"))
    if not (gain.value > BETTER and gain.deviations > SURE and best.gain(none).value > 0):
        return None
    if gain.value < LITTLE and consistency.optimum(case).high < consistency.REST:
        return None  # in a network that answers too much whatever makes it answer less is better
    way = ways[best.reading.name]
    fit = consistency.told_by(case, best.reading)
    measures.append(measured("share of what another caption changes that is right, read so", fit, f"above {CHANCE:g}"))
    if fit.low < CHANCE or fit.low > WEAK:  # less wrong is not right
        findings.append(_less_wrong(best.reading.name, way.cause, gain, fit, measures))
        return best
    rivals = {ways[s.reading.name].cause for s in scores[1:] if s.gain(middle).value > 0.8 * gain.value}
    findings.append(
        Finding(
            way.cause, "harmful",
            f"captions read with {best.reading.name} help the network more than as the files say: gain {gain.value:.2f}"
            f" ({gain.low:.2f} to {gain.high:.2f})",
            f"Read the encoder so: {best.reading.name}.",
            strength=1 + gain.value / BETTER, measures=tuple(measures[-1:]), also=tuple(rivals - {way.cause}),
        )
    )  # fmt: skip
    return best


def _less_wrong(name: str, cause: str, gain: Mean, fit: Mean, measures: list[Measure]) -> Finding:
    return Finding(
        "text.encoder", "harmful",
        f"captions read with {name} help the network more than as the files say (gain {gain.value:.2f}), and even so"
        f" what they change fits the images best at {fit.value:.2g} times its size ({fit.low:.2g} to {fit.high:.2g})",
        TRAINED_WITH, strength=1 + gain.value / BETTER, measures=tuple(measures[-2:]), also=(cause,),
    )  # fmt: skip
