"""Which blocks do harm: layers unlike their kind, and blocks without which the network denoises the images better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.doctor import readings
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import NotChecked
from mezzotint.doctor.layers import COLUMNS, ROWS, Layer, branches, median, siblings, silenced
from mezzotint.doctor.readings import Reading
from mezzotint.doctor.statistics import Mean
from mezzotint.errors import InputError

# Chance keeps the order of a matrix below 4.8 (see layers.order). In trained networks most kinds of layer are ordered
# by hundreds; some kinds (values of attention, shortcuts) are not, even in networks that are well, and are not judged.
CHANCE = 6.0
ORDERED = 60.0  # median of a kind from which a member of it is judged, each brought to the member's size,
QUARTER = 15.0  # where three quarters of them have this
RANDOM = 4.0  # order below which it is odd then: chance stays below 3 in 99 of 100, such kinds above 7
UNIFORM = (
    1.76  # |entry| in deviations below which a matrix is a fresh one: sqrt(3) of a uniform start, 2.3 when trained
)
BELL = 2.6  # kurtosis: trained matrices without order have at most 2.45, normal noise has 3
LONE = 16384  # numbers from which on a layer without others of its kind is judged: small ones have order by chance
OUTSIZED = 5.0  # times the largest, or below the smallest, of its kind
FEW = 4  # members from which on a kind has a measure of its own
LEVELS = readings.RATIOS[1::2]
MOST = 96  # blocks that are tried


@dataclass(frozen=True, slots=True)
class Odd:
    """A layer unlike the others of its kind, and by how much beyond the bound."""

    layer: Layer
    why: str
    strength: float
    factor: float = 1.0  # it is too large by


def fresh(layer: Layer) -> bool:
    """Whether a matrix is still the uniform numbers that it started as: no order, and nothing beyond the bound."""
    return layer.judged and layer.order < CHANCE and layer.largest < UNIFORM


def normal(layer: Layer) -> bool:
    """Whether the fourth moment is that of a normal distribution, within 4 of its standard errors sqrt(24 / n)."""
    count = min(layer.tensor.numel(), ROWS * COLUMNS)
    return abs(layer.kurtosis - 3.0) < 4 * math.sqrt(24 / count)


def scrambled(every: Sequence[Layer]) -> list[Odd]:
    """Matrices in random order where their kind is ordered: replaced by noise, shuffled, or never trained.

    Where a kind has few members, or is not ordered, only what is normally distributed in random order is odd where
    others are not: training that makes numbers bell-shaped orders them, so these were drawn so.
    """
    found: list[Odd] = []
    for kind in siblings(every).values():
        judged = [layer for layer in kind if layer.judged]
        for layer in judged:
            if layer.order >= CHANCE or fresh(layer):
                continue
            others = [other for other in judged if other is not layer]
            orders = sorted(other.order * min(1.0, _seen(layer) / _seen(other)) for other in others)
            usual, low = median(orders), orders[len(orders) // 4] if orders else 0.0
            network = median(o.order for o in every if o.judged and o.network == layer.network)
            if len(others) >= FEW - 1 and usual >= ORDERED and low >= QUARTER and layer.order < RANDOM:
                why = f"the entries stand in random order ({layer.order:.1f} deviations; its kind {usual:.0f})"
                found.append(Odd(layer, why, usual / ORDERED))
            elif network >= ORDERED / 4 and normal(layer) and all(other.kurtosis < BELL for other in others):
                if len(others) < FEW - 1 and layer.tensor.numel() < LONE:
                    continue
                tails = f"normally distributed (kurtosis {layer.kurtosis:.2f})"
                found.append(Odd(layer, f"the entries are {tails} and in random order", layer.kurtosis / BELL))
    return found


def _seen(layer: Layer) -> int:
    """Numbers of a matrix that were looked at: what a direction adds to its order grows with them."""
    return min(ROWS, len(layer.tensor)) * min(COLUMNS, layer.tensor[0].numel())


def outsized(every: Sequence[Layer]) -> list[Odd]:
    """Tensors several times larger than the largest of their kind, or smaller than the smallest."""
    found: list[Odd] = []
    for kind in siblings(every).values():
        alive = [layer for layer in kind if layer.finite and not layer.zero and _sized(layer)]
        for layer in alive:
            others = [other.gain for other in alive if other is not layer]
            if len(others) < FEW - 1:
                continue
            usual = median(others)
            for beyond, factor in ((layer.gain / max(others), layer.gain / usual), (min(others) / layer.gain, 0.0)):
                if beyond > OUTSIZED:
                    factor = factor or layer.gain / usual
                    times = f"{factor:.3g} times" if factor >= 1 else f"{1 / factor:.3g} times smaller than"
                    as_others = "as large as" if factor >= 1 else ""
                    why = f"it is {times} {as_others} others of its kind".replace("  ", " ")
                    found.append(Odd(layer, why, beyond / OUTSIZED, factor))
    return found


def _sized(layer: Layer) -> bool:
    """Biases are of any size; scales of norms and matrices are not."""
    return layer.name.endswith("weight")


@dataclass(frozen=True, slots=True)
class Trial:
    """What leaving a block out, or bringing a layer to the usual size, does to the denoising of the user's images."""

    name: str
    before: Mean
    after: Mean
    gain: Mean


def reading(case: Case) -> Reading:
    """The claimed reading, of the model without adapters."""
    return readings.claimed(case).named("as the files say", model=case.bare, steering=_steering(case))


def _steering(case: Case) -> Conditioning:
    return (
        case.steering if case.model is case.bare else case.steered(case.bare, case.images.captions, case.images.labels)
    )


def resized(case: Case, odd: Sequence[Odd]) -> Mean | None:
    """What the network gains when each of these layers is brought to the size of its kind; None without images."""
    backbone = [each for each in odd if each.layer.part == "backbone"]
    if case.data is None or not backbone:
        return None
    try:
        own = reading(case)
        before = readings.score(case, own)
    except (NotChecked, InputError):
        return None
    with ExitStack() as stack:
        for each in backbone:
            module = case.bare.backbone.get_submodule(each.layer.name.rpartition(".")[0])
            stack.enter_context(_scaled(module, 1 / each.factor))
        return readings.score(case, own).gain(before)


@contextmanager
def _scaled(module: nn.Module, factor: float) -> Iterator[None]:
    bias = getattr(module, "bias", None)

    def scale(module: nn.Module, told: object, answer: Tensor) -> Tensor:
        if bias is None:
            return answer * factor
        shape = bias.view(-1, *[1] * (answer.ndim - 2)) if isinstance(module, (nn.Conv2d, nn.GroupNorm)) else bias
        return (answer - shape) * factor + shape

    handle = module.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


def count(case: Case) -> int:
    """How many blocks `without` tries."""
    return min(MOST, len(branches(case.bare.backbone)))


def without(case: Case, own: Reading) -> list[Trial]:
    """What the network gains by each of its blocks' being left out, most first; on a few images at three levels."""
    few = min(readings.FIRST, len(own.latents))
    score = readings.score(case, own, LEVELS, few)
    found: list[Trial] = []
    for name, modules in list(branches(case.bare.backbone).items())[:MOST]:
        with silenced(modules):
            after = readings.score(case, own, LEVELS, few)
        found.append(Trial(name, score.mean, after.mean, after.gain(score)))
    return sorted(found, key=lambda trial: -trial.gain.value)
