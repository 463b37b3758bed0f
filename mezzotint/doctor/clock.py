"""Where the time of a step goes: one step of a request as `generate` takes it, timed whole and in pairs.

On a machine with other jobs a single time means little. So what a cause costs is the ratio of two runs that follow each
other, in turns, and only a ratio that most pairs agree on, twice over, is believed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.conditioning import Conditioning
from mezzotint.families.model import Model
from mezzotint.families.settings import Settings, settle
from mezzotint.families.steering import steering
from mezzotint.generate import canvas, denoiser, sights, start_noise
from mezzotint.process import Estimate
from mezzotint.request import Request
from mezzotint.sampling import Denoise, bounded, sample, seeded_noise

Act = Callable[[], object]
Around = Callable[[], AbstractContextManager[object]]
LONG = 2.0  # seconds: what takes longer runs three times at most
REPEATS = 7  # runs of anything else: their least and greatest hold the median in 98 % of cases
SHORT = (
    0.05  # seconds: what is quicker runs several times, of which the best counts: beside other jobs that is steadiest
)
MOST = 10  # of those times
HOPELESS = 5.0  # times: what takes so much longer at its first run needs no second one
AGREE = 0.8  # share of pairs that must be on the median's side, beyond half of the bound


@dataclass(frozen=True, slots=True)
class Paired:
    """Seconds of a first way over those of a second, pair by pair."""

    ratios: tuple[float, ...]

    @property
    def value(self) -> float:
        return statistics.median(self.ratios)

    @property
    def low(self) -> float:
        return min(self.ratios)

    @property
    def high(self) -> float:
        return max(self.ratios)

    def beyond(self, bound: float) -> bool:
        """Whether the first way takes at least `bound` times as long, with most pairs well on that side."""
        agreeing = sum(ratio >= (1 + bound) / 2 for ratio in self.ratios)
        return self.value >= bound and agreeing >= AGREE * len(self.ratios)


@dataclass(frozen=True, eq=False)
class Work:
    """One request's step, ready to be taken: what `generate` would hand to the sampler."""

    model: Model
    request: Request
    settings: Settings
    told: tuple[Conditioning, Conditioning | None]
    noise: Tensor  # (1, C, h, w)
    denoise: Denoise

    @property
    def guided(self) -> bool:
        return self.told[1] is not None

    def step(self) -> Estimate:
        """A step from the middle of the path."""
        steps = self.settings.path.steps
        with torch.inference_mode():
            return self.denoise(self.noise, steps[len(steps) // 2].now)

    def by(self, model: Model) -> Work:
        """The same step by another model of the kind."""
        return replace(self, model=model, denoise=denoiser(model, self.settings, *self.told))


@torch.no_grad()
def prepared(model: Model, request: Request, told: tuple[Conditioning, Conditioning | None] | None = None) -> Work:
    """The work of a step; text is encoded unless what it gave is told."""
    settings = settle(model, request)
    pixels, mask = canvas(model, [request], settings)
    noise = start_noise(model, [request], settings, [seeded_noise([request.seed])])
    if told is None:
        told = steering(model, [request], settings.guidance.scale, (settings.width, settings.height))
    seen = sights(model, [request], settings, pixels, mask)
    positive, negative = replace(told[0], **seen), replace(told[1], **seen) if told[1] else None
    denoise = denoiser(model, settings, positive, negative)
    return Work(model, request, settings, (positive, negative), noise, denoise)


def walked(work: Work) -> tuple[float, int]:
    """Seconds of the sampler's own arithmetic over the whole path, and how often it asks the network."""
    asked = 0

    def free(x: Tensor, level: object) -> Estimate:
        nonlocal asked
        asked += 1
        return Estimate(x, x)

    settings, rng = work.settings, seeded_noise([work.request.seed])
    denoise = bounded(free, settings.sampler, work.model.contract.sampling.clip)
    with torch.inference_mode():
        start = time.perf_counter()
        sample(denoise, work.noise, settings.path, settings.sampler, rng)
        return time.perf_counter() - start, asked


def settled(act: Act, device: torch.device | str) -> float:
    """Seconds of one run, until an accelerator has done its part too."""
    waits = torch.device(device).type != "cpu"
    if waits:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    act()
    if waits:
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def spans(act: Act, device: torch.device | str, count: int = REPEATS) -> tuple[float, ...]:
    """Seconds of `count` runs after a first one; of what takes long that first one and one more."""
    first = settled(act, device)
    if first > LONG:
        return first, settled(act, device)
    return tuple(settled(act, device) for _ in range(count))


def paired(
    first: Act, second: Act, device: torch.device | str, around: tuple[Around, Around] = (nullcontext, nullcontext),
    bound: float = 0.0,
) -> Paired:  # fmt: skip
    """How many times as long the first takes as the second: in turns, each pair in another order than the one before.

    `around` is entered before each run of its side and left after it, untimed. No more is run than it takes to know
    that the ratio is not beyond the bound.
    """
    sides = tuple(zip((first, second), around, strict=True))

    def timed(side: int, times: int) -> float:
        act, enter = sides[side]
        with enter():
            return min(settled(act, device) for _ in range(times))

    warm = [timed(0, 1), timed(1, 1)]
    if max(warm) < LONG / 4:
        warm = [min(spent, timed(side, 1)) for side, spent in enumerate(warm)]
    elif warm[1] > HOPELESS * warm[0]:
        return Paired((warm[0] / warm[1],))
    times = min(MOST, max(1, int(SHORT / max(*warm, 1e-6))))
    ratios: list[float] = []
    rounds = rounds_of(max(warm))
    for turn in range(rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        spent = {side: timed(side, times) for side in order}
        ratios.append(spent[0] / spent[1])
        if sum(ratio < (1 + bound) / 2 for ratio in ratios) > (1 - AGREE) * rounds + 1:
            break
    return Paired(tuple(ratios))


def rounds_of(seconds: float) -> int:
    """How often to run what takes so long: the least and the greatest of 5 hold the median in 94 % of cases."""
    return REPEATS if seconds < 2 * SHORT else 5 if seconds < LONG else 1


def proven(
    bound: float, first: Act, second: Act, device: torch.device | str,
    around: tuple[Around, Around] = (nullcontext, nullcontext),
) -> Paired:  # fmt: skip
    """The same, and where it is beyond the bound a second look, which has to agree: the lesser of the two counts."""
    found = paired(first, second, device, around, bound)
    if not found.beyond(bound):
        return found
    return min(found, paired(first, second, device, around, bound), key=lambda each: (each.beyond(bound), each.value))
