"""The contests that several probes look at: what the files claim against every other way to read the network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.doctor import filters, order, readings
from mezzotint.doctor.case import Case, Drawn
from mezzotint.doctor.readings import RATIOS, Reading, Score
from mezzotint.doctor.statistics import Mean, mean
from mezzotint.errors import InputError
from mezzotint.process import prediction

CLEAR = 0.05  # gain in mean log error below which an alternative is no better in practice
SURE = 4.0  # standard errors, paired over images
FILTERED = RATIOS[2:5]  # where a network has most to say
LEARNED = -0.1  # log error against the linear filter; healthy -0.5 to -0.7, an untrained network far above 0
PLAIN = 1.0  # gain from which a reading is right however little was learned; of one that is not at most 0.2
GOOD = -0.05  # mean log error that a reading must reach to explain anything: better than a scalar filter
SCALES = tuple(1.4**i for i in range(-8, 9) if i)  # 1/15 to 15
SLIPS = (-2.0, -1.3, -0.8, -0.4, 0.4, 0.8, 1.3, 2.0)  # logarithms by which told levels are moved
KNOWN = 0.8  # of the largest gain from which a known schedule explains as much as a free number
FACTORIAL = 4  # channels up to which every order is tried
PAIRED = 4  # images that exchanges of channels are tried on


@dataclass(frozen=True, slots=True)
class Contest:
    """The score of what the files claim and of the best alternatives, and what the best of them gains."""

    mine: Score
    others: tuple[Score, ...]
    gain: Mean  # of the best alternative over the claim, in mean log error; below 0 where the claim is best

    @property
    def best(self) -> Reading:
        return self.others[0].reading

    @property
    def lost(self) -> bool:
        """Whether the claim is clearly worse than an alternative that is right, not only less wrong."""
        return clearly(self.gain) and self.others[0].mean.value < GOOD


def between(case: Case, mine: Score, others: Sequence[Reading], best: int = 2) -> Contest:
    """The contest of a claim with its alternatives; what the best one gains is asked again by other noises until it is
    sure."""
    scores = readings.contest(case, mine, others, best)
    return Contest(mine, scores, readings.surely(case, mine, scores[0], CLEAR, SURE))


def clearly(gain: Mean) -> bool:
    """Whether a paired gain is large enough to matter, and sure."""
    return gain.value > CLEAR and gain.deviations > SURE


def answers(case: Case) -> list[readings.Answer]:
    """(level, x, raw) at every ratio, read as the files say."""
    claim = readings.claimed(case)
    return case.once("answers", lambda: readings.raw_of(case, claim, RATIOS, len(claim.latents)))


def own(case: Case) -> Score:
    """How well the network denoises the user's images as the files say."""
    return case.once("own", lambda: readings.judged(readings.claimed(case), answers(case)))


def processes(case: Case) -> Contest:
    """The claimed process against every objective under every known schedule."""

    def run() -> Contest:
        mine = own(case)
        others = [mine.reading.named(readings.told(p), process=p) for p in readings.processes(mine.reading.process)]
        return between(case, mine, others, best=3)

    return case.once("processes", run)


def slips(case: Case) -> tuple[Contest, list[tuple[float, float]]]:
    """The claimed levels against all of them moved, and the log error of a few images by how far (log ratio)."""

    def run() -> tuple[Contest, list[tuple[float, float]]]:
        mine = own(case)
        some, few = RATIOS[1::2], min(readings.FIRST, len(mine.log_error))
        scores = {s: readings.score(case, slipped(mine.reading, s), some, few) for s in SLIPS}
        curve = [(s, found.mean.value) for s, found in scores.items()] + [(0.0, mine.at(some, few).mean.value)]
        best = min(scores, key=lambda s: scores[s].mean.value)
        return between(case, mine, [slipped(mine.reading, best)]), sorted(curve)

    return case.once("slips", run)


def slipped(claim: Reading, slip: float) -> Reading:
    """The reading that tells the network exp(slip) times the noise that x has; its name is the slip."""
    return claim.named(f"{slip:g}", slip=slip)


def scales(case: Case) -> Contest:
    """Latents as they come against the same ones scaled, under the claimed process."""

    def run() -> Contest:
        mine = own(case)

        def scaled(factors: Sequence[float]) -> list[Reading]:
            claim = mine.reading
            return [claim.named(f"{k:.3g}", latents=claim.latents * k) for k in factors]

        coarse = readings.contest(case, mine, scaled(SCALES), best=1)
        k = float(coarse[0].reading.name)
        near = [factor for factor in (k, k / 1.18, k * 1.18) if abs(math.log(factor)) > 0.1]
        return between(case, mine, scaled(near))

    return case.once("scales", run)


def drawn_like(case: Case) -> tuple[Contest, Tensor, Tensor] | None:
    """Latents as they come against the same ones with each channel's mean and deviation as the network draws them.

    Also the factor and the offset of each channel; None where the network cannot draw.
    """

    def run() -> tuple[Contest, Tensor, Tensor] | None:
        mine, drawn = own(case), pictures(case)
        if drawn is None:
            return None
        clean = mine.reading.latents
        factor = (drawn.latents.std((0, 2, 3)) / clean.std((0, 2, 3)).clamp(min=1e-6)).clamp(1e-3, 1e3)
        offset = drawn.latents.mean((0, 2, 3)) - factor * clean.mean((0, 2, 3))
        moved = clean * factor.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)
        if not bool(moved.isfinite().all()):
            return None
        trial = mine.reading.named("each channel as the network draws it", latents=moved)
        return between(case, mine, [trial]), factor, offset

    return case.once("drawn like", run)


def shifts(case: Case) -> tuple[Contest, Tensor]:
    """Latents as they come against the same ones moved to the channel means that the network expects, and by how much.

    At the noisiest ratio a denoiser pulls each channel's mean towards the one of its training data; going there again
    and again ends at that mean.
    """

    def run() -> tuple[Contest, Tensor]:
        mine = own(case)
        claim = mine.reading
        moved = torch.zeros(claim.latents.shape[1])
        for _ in range(4):
            trial = claim.named("moved", latents=claim.latents + moved.view(1, -1, 1, 1))
            (level, x, raw), *_ = readings.raw_of(case, trial, RATIOS[-1:], len(trial.latents))
            clean = prediction.estimate(claim.process.prediction, raw, x, level).clean
            pull = (clean - trial.latents).mean((0, 2, 3))
            if not bool(pull.isfinite().all()) or float((moved + pull).abs().max()) > 50:
                break
            moved = moved + pull
        trial = claim.named("moved to the expected means", latents=claim.latents + moved.view(1, -1, 1, 1))
        return between(case, mine, [trial]), moved

    return case.once("shifts", run)


def orders(case: Case) -> Contest | None:
    """Channels as they come against other orders; None where there is no other one to try.

    Up to four channels every order is tried; of more, the one that makes each channel most like one of those that the
    network draws itself, and where the network does not denoise as things are, what comes of it by exchanging pairs.
    """

    def run() -> Contest | None:
        mine = own(case)
        claim, channels = mine.reading, mine.reading.latents.shape[1]

        def error(tried: list[int]) -> float:
            reading = claim.named("exchanged", latents=claim.latents[:, tried])
            return readings.score(case, reading, FILTERED[:2], PAIRED).mean.value

        every = [list(each) for each in itertools.permutations(range(channels))] if channels <= FACTORIAL else []
        if channels > FACTORIAL and pictures(case) is not None:
            every = [order.likely(case.drawn.latents, case.usable)]
            if mine.mean.value > GOOD:
                every.append(order.exchanged(every[0], error))
        others = [
            claim.named(" ".join(map(str, each)), latents=claim.latents[:, each])
            for each in every
            if each != list(range(channels))
        ]
        return between(case, mine, others) if others else None

    return case.once("orders", run)


def learned(case: Case, score: Score) -> Mean:
    """A score against a linear filter that knows the spectrum of the other images, at the middle ratios."""
    rows = score.at(FILTERED)
    known = filters.log_error(case, score.reading.latents, FILTERED)  # of the latents as this reading has them
    n = min(len(known), len(rows.log_error))
    return mean((rows.log_error[:n] - known[:n]).mean(1))


def itself(case: Case) -> Score | None:
    """How well the network denoises what it draws itself, under the claimed process; None where it cannot draw."""

    def run() -> Score | None:
        drawn = pictures(case)
        if drawn is None:
            return None
        steering = case.steering.map(lambda tensor: tensor[drawn.rows])
        claim = replace(readings.claimed(case), name="its own pictures", latents=drawn.latents, steering=steering)
        return readings.score(case, claim)

    return case.once("itself", run)


def explanation(case: Case) -> tuple[str, Contest] | None:
    """Of everything that may be claimed wrongly, what the network gains most from reading otherwise; None: nothing.

    One wrong claim makes other readings better too (half the scale looks like less noise), so that only the largest
    gain is a cause.
    """

    def run() -> tuple[str, Contest] | None:
        channels = drawn_like(case)
        found: dict[str, Contest | None] = {
            "process": processes(case), "latent.order": orders(case), "latent.scale": scales(case),
            "latent.shift": shifts(case)[0], "levels": slips(case)[0], "channels": channels and channels[0],
        }  # fmt: skip
        lost = {
            name: contest
            for name, contest in found.items()
            if contest is not None
            and contest.lost
            and (contest.gain.low > PLAIN or learned(case, contest.others[0]).value < LEARNED)
        }
        most = max((contest.gain.value for contest in lost.values()), default=0.0)
        # the plainest of those that explain about as much: a known schedule before a free number before many
        return next(((name, contest) for name, contest in lost.items() if contest.gain.value >= KNOWN * most), None)

    return case.once("explanation", run)


def pictures(case: Case) -> Drawn | None:
    """What the model draws; None where that comes to nothing, as under a wrong process it may."""
    try:
        return case.drawn
    except InputError:
        return None
