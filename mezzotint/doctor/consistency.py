"""Whether a network gives the mean of what an image may be, as training on noise does, or one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.conditioning import Conditioning
from mezzotint.doctor import readings, steerings, trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.readings import MIDDLE, RATIOS, ROUNDS, Answer, Reading
from mezzotint.doctor.statistics import Mean, ratio
from mezzotint.process import prediction

SHARP = 0.88  # slope of the truth at the noisiest level, below which a network says more than can be known
REST = 0.97  # slope of the target on the output; healthy 0.99 to 1.04, with noise on weights 0.90 to 0.97
LOUD = 1.2  # of the images' deviation: more than any image has
HEARD = 0.75  # of what a caption changes must be right: all of it in a network that is calibrated, half by chance


@dataclass(frozen=True, slots=True)
class Calibration:
    """slope = <clean_hat, clean> / <clean_hat, clean_hat> about the mean: 1 for a mean, far below for a sharp guess."""

    noisy: Mean  # at the noisiest ratio
    quiet: Mean  # at little noise
    sharpness: float  # deviation of what the network sees at the noisiest ratio, of that of the images
    rest: Mean  # see `optimum`

    @property
    def distilled(self) -> bool:
        """Sharp and overconfident where nothing can be known, and right where everything can.

        Healthy denoisers: noisy 0.90 to 1.03, rest 0.99 to 1.05; consistency models answer too little in between. What
        they give deviates as images do (1.00 to 1.05): networks that are hardly trained or damaged give from 1.3 times
        as much on.
        """
        sharp = self.noisy.high < 0.6 and 0.6 < self.sharpness < LOUD
        elsewhere = self.noisy.high < SHARP and self.rest.low > 1.06
        return (sharp or elsewhere) and self.quiet.low > 0.75


def calibration(case: Case) -> Calibration:
    """The slope of the truth on what the network says, at the noisiest and at a quiet ratio.

    E[clean | x] is the mean of all images that may be behind x, so the slope is 1 at every level, for a network of any
    size (orthogonality of the mean squared error's minimiser). One step to an image, as a consistency model or a
    distilled one takes it, has the deviation of images at every level, and a slope that tends to 0. At the noisiest
    ratio with other noise, too, until it is on one side of SHARP, or ROUNDS times.
    """

    def run() -> Calibration:
        claim, every = trials.own(case).reading, trials.answers(case)
        first = _slope(case, every[-1])

        def noisiest(draw: int) -> tuple[Tensor, Tensor]:
            if not draw:
                return first
            return _slope(case, *readings.raw_of(case, claim, RATIOS[-1:], len(claim.latents), draw))

        spread = claim.latents - _centre(case)
        sharpness = float((first[1].sum() / spread.square().sum()).sqrt())
        return Calibration(surely(SHARP, noisiest), ratio(*_slope(case, every[1])), sharpness, optimum(case))

    return case.once("calibration", run)


def _centre(case: Case) -> Tensor:
    return trials.own(case).reading.latents.mean((0, 2, 3), keepdim=True)


def _slope(case: Case, answer: Answer) -> tuple[Tensor, Tensor]:
    """(N,) <said, clean> and <said, said> about the mean, of what the network says is behind x."""
    claim, (level, x, raw), centre = trials.own(case).reading, answer, _centre(case)
    said = prediction.estimate(claim.process.prediction, raw, x, level).clean - centre
    return (said * (claim.latents - centre)).flatten(1).sum(1), said.square().flatten(1).sum(1)


def told(case: Case) -> Mean:
    """The share of the change from another image's caption to the right one that is right.

    <target - o, c - o> / |c - o|^2 over the middle ratios, o the output under the other caption: 1 where captions are
    heard as in training, 1/2 where they are told apart by chance alone, 0 where the other one is the right one.
    """

    def asked(draw: int) -> tuple[Tensor, Tensor]:
        return changed(case, steerings.ANOTHER, steerings.exchanged(case, draw), draw)

    return case.once("told", lambda: surely(HEARD, asked))


def told_by(case: Case, reading: Reading) -> Mean:
    """The same under another way to read the encoder."""
    rows = steerings.mismatched(steerings.wishes(case))
    other = reading.named(steerings.ANOTHER, steering=reading.steering.map(lambda tensor: tensor[rows]))
    own, asked = (readings.raw_of(case, each, MIDDLE, len(reading.latents)) for each in (reading, other))
    return ratio(*_right(reading, case.noise, own, asked))


def weight(case: Case) -> Mean:
    """The multiple a of (conditional - unconditional) that fits the truth best: about 1 where guidance is not built in.

    a = <target - u, c - u> / |c - u|^2 over the middle ratios; 1 / w for a network that was distilled at guidance w, 0
    for one that hears something else than was said.
    """

    def asked(draw: int) -> tuple[Tensor, Tensor]:
        return changed(case, steerings.NOTHING, case.unsteered, draw)

    return case.once("guidance weight", lambda: surely(HEARD, asked))


def misheard(case: Case) -> bool:
    """Whether a network hears something else than was said: of what captions change, too little is right."""
    if len(set(steerings.wishes(case))) < 2:
        return False
    return min(told(case).high, weight(case).high) < HEARD and not guided(case)


def guided(case: Case) -> bool:
    """Whether guidance is built in: what a caption changes is right in part, and too large by the scale of it.

    Where an image's own caption is no better than another one, what is right in part is what all captions share; where
    captions differ from each other by too little, nothing has made what they change larger. An adapter that acts too
    weakly for its captions looks the same, so that models with one are not judged.
    """
    if case.lora:
        return False
    fit = weight(case)
    own = trials.own(case).at(MIDDLE).gain(steerings.swapped(case))
    differ = len(set(steerings.wishes(case))) > 1
    return fit.low > 0.08 and fit.high < 0.65 and (not differ or (own.low > 0 and told(case).low < 1))


def optimum(case: Case) -> Mean:
    """The slope of the training target on the raw output at the middle ratios: 1 wherever training came to rest.

    Whatever a network can and cannot do, it is at a minimum of its squared error only where no multiple of its output
    fits better: <target, raw> / <raw, raw> = 1. Weights that were moved afterwards answer too much: below 1.
    """

    def run() -> Mean:
        claim = trials.own(case).reading
        n = len(claim.latents)
        above, below = torch.zeros(n), torch.zeros(n)
        for level, _, raw in trials.answers(case)[2:5]:
            target = prediction.target(claim.process.prediction, claim.latents, case.noise[:n], level)
            size = (raw**2).mean()  # each level counts alike
            above += (target * raw).flatten(1).mean(1) / size
            below += (raw**2).flatten(1).mean(1) / size
        return ratio(above, below)

    return case.once("optimum", run)


def surely(bound: float, asked: Callable[[int], tuple[Tensor, Tensor]]) -> Mean:
    """sum / sum of (N,) above and below, by other noise until it is on one side of the bound, or ROUNDS times."""
    above, below = asked(0)
    for draw in range(1, ROUNDS):
        fit = ratio(above, below)
        if fit.high < bound or fit.low > bound:
            break
        more = asked(draw)
        above, below = above + more[0], below + more[1]
    return ratio(above, below)


def changed(case: Case, name: str, steering: Conditioning, draw: int = 0) -> tuple[Tensor, Tensor]:
    """(N,) <target - o, c - o> and |c - o|^2 over the middle ratios: c the output as steered, o steered otherwise."""
    claim, asked = steerings.steered(case, name, steering, draw)
    own = steerings.steered(case, steerings.OWN, case.steering, draw)[1] if draw else trials.answers(case)[1:-1]
    return _right(claim, case.noises(draw), own, asked)


def _right(reading: Reading, noise: Tensor, own: Sequence[Answer], asked: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    n = len(reading.latents)
    above, below = torch.zeros(n), torch.zeros(n)
    for (level, _, c), (_, _, o) in zip(own, asked, strict=True):
        target = prediction.target(reading.process.prediction, reading.latents, noise[:n], level)
        above += ((target - o) * (c - o)).flatten(1).sum(1)
        below += ((c - o) ** 2).flatten(1).sum(1)
    return above, below
