"""What the codec makes of the user's images, and whether it is what the backbone was trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mezzotint.doctor import fidelity, readings, steerings, trials
from mezzotint.doctor.case import BATCH, Case
from mezzotint.doctor.finding import Checked, Finding, Measure, Plot, measured
from mezzotint.families.model import working

HALF = 65504.0  # the largest float16
RESCALED = math.log(1.3)  # a scale that is nearer to the best one than this is left alone: data sets differ that much
MOVED = 0.1  # of a deviation: the same for shifts
APART = 0.8  # log error on the user's images above that on the model's own from which another codec is suspected
ALIKE = 0.3  # variance between its own pictures, of that between the user's, below which it denoises itself too easily
POOR = -0.15  # log error on the user's images above which it is suspected


def examine(case: Case) -> Checked:
    """Numbers of the latents, the way back to pixels, overflow in half precision, and the network's own word on units.

    The network's word: on latents scaled, shifted or reordered as in its training it denoises best.
    """
    pixels = case.images.pixels
    peak, where = largest(case, pixels)
    measures = [Measure("largest activation of the codec", peak, bound=f"below {HALF:g} for half precision")]
    findings: list[Finding] = []
    if not bool(case.latents.isfinite().all()):
        findings.append(
            Finding("latent.overflow", "broken", "the codec's latents of these images are not finite",
                    "Use float32 for the codec, or its own file again.", strength=10)
        )  # fmt: skip
        return Checked(tuple(findings), tuple(measures))
    if peak > HALF:
        upcast = "float16" not in case.bare.contract.dtypes.codec
        findings.append(
            Finding(
                "latent.overflow", "note" if upcast else "harmful",
                f"activations of the codec reach {peak:.3g} at {where}, beyond the {HALF:g} of float16: half precision"
                " gives"
                f" black or broken pictures{', and its files say so' if upcast else ', and its files do not say so'}",
                "Decode in float32 or bfloat16 and set force_upcast in the codec's config.json, so that other tools do"
                " too.",
                strength=peak / HALF, measures=(measures[0],),
            )
        )  # fmt: skip
    checked = fidelity.examine(case)
    z = case.latents
    centre = z.mean((0, 2, 3)) / z.std((0, 2, 3)).clamp(min=1e-9)
    measures += [
        Measure("deviation of the latents", float(z.std())),
        Measure("largest channel mean, in deviations", float(centre.abs().max())),
        *checked.measures,
    ]  # fmt: skip
    findings += checked.findings
    findings += units(case, measures)
    bars = {
        "mean": [(i, float(v)) for i, v in enumerate(z.mean((0, 2, 3)))],
        "deviation": [(i, float(v)) for i, v in enumerate(z.std((0, 2, 3)))],
    }
    plot = Plot("latents of these images by channel", "channel", "backbone units", bars, kind="bars")
    return Checked(tuple(findings), tuple(measures), (plot, *checked.plots), checked.exhibits)


def units(case: Case, measures: list[Measure]) -> list[Finding]:
    """Scale, shift, order, another codec: at most one of them, and nothing where the process explains more."""
    scale, (shift, moved) = trials.scales(case), trials.shifts(case)
    factor = float(scale.best.name)
    deviation = float(case.usable.std())
    measures += [
        Measure("best scale of the latents", factor, bound=f"within {math.exp(RESCALED):.2g} times of 1"),
        measured("gain of the best scale", scale.gain),
        Measure("largest shift to the expected channel means, in deviations", float(moved.abs().max()) / deviation),
        measured("gain of the shift", shift.gain),
    ]  # fmt: skip
    order = trials.orders(case)
    if order is not None:
        measures.append(measured("gain of the best other order of channels", order.gain))
    itself, mine = trials.itself(case), trials.own(case)
    if itself is not None:
        measures.append(measured("log error on pictures of its own", itself.mean))
    found = trials.explanation(case)
    if found is not None:
        return _misread(case, *found, factor, moved / deviation)
    if itself is None:
        return []
    free = steerings.unsteered(case)  # captions that are misheard are another cause
    given = min(mine.at(readings.MIDDLE).mean.value, free.mean.value)
    apart = given - itself.at(readings.MIDDLE).mean.value
    measures.append(Measure("log error on the user's images above that on its own", apart, bound=f"at most {APART:g}"))
    alike = float(case.drawn.latents.var(0).mean() / case.usable.var(0).mean().clamp(min=1e-9))
    if apart > APART and given > POOR and alike > ALIKE and not _vouched(case):
        return [
            Finding(
                "latent.codec", "broken",
                f"the network denoises what it draws itself (log error {itself.mean.value:+.2f}) and not these images"
                f" ({given:+.2f}), and no scale, shift, order, objective or schedule explains it",
                "Use the codec that the backbone was trained with, or images of the kind that it was trained on.",
                strength=apart / APART,
            )
        ]  # fmt: skip
    return []


def _vouched(case: Case) -> bool:
    """Whether a base on the same codec denoises these images, so that their latents are what it was trained on."""
    base = case.base
    if base is None or base.contract.latent.codec != case.bare.contract.latent.codec:
        return False
    steering = case.steered(base, case.images.captions, case.images.labels)
    reading = readings.Reading("the base", base.process, case.usable, steering, base)
    return readings.score(case, reading, readings.MIDDLE).mean.value < trials.GOOD


def _misread(case: Case, topic: str, contest: trials.Contest, factor: float, moved: Tensor) -> list[Finding]:
    """The finding about units, where units explain what the network loses; `moved` in deviations."""
    gain, best = contest.gain, contest.others[0]
    says = (
        f"log error {contest.mine.mean.value:+.2f} as it is, {best.mean.value:+.2f} so (gain {gain.value:.2f},"
        f" {gain.low:.2f} to {gain.high:.2f})"
    )
    what: tuple[str, str, str, tuple[str, ...]] | None = None
    if topic == "latent.scale" and abs(math.log(factor)) > RESCALED:
        what = (
            topic, f"the network denoises best when these latents are multiplied by {factor:.3g}",
            f"Correct the scale: {_scaled(case, factor)}.", (),
        )  # fmt: skip
    elif topic == "latent.shift" and float(moved.abs().max()) > MOVED:
        listed = ", ".join(f"{float(v):+.2f}" for v in moved[:8])
        what = (
            topic, f"the network expects these latents moved by {listed} deviations (by channel)",
            f"Correct the shift: {_shifted(case, moved * float(case.usable.std()))}.", ("data.balance",),
        )  # fmt: skip
    elif topic == "latent.order":
        what = (
            topic, f"the network denoises best with the channels in the order {contest.best.name}",
            "Use the codec that the backbone was trained with, or put its channels back into this order.", (),
        )  # fmt: skip
    elif topic == "channels":
        _, factors, offsets = trials.drawn_like(case) or (None, torch.ones(1), torch.zeros(1))
        uneven = float(factors.log().abs().max()) > RESCALED
        listed = ", ".join(f"{float(v):.2g}" for v in (factors if uneven else offsets)[:8])
        what = (
            "latent.scale" if uneven else "latent.shift",
            f"the network denoises best when each channel gets the mean and deviation that it draws itself"
            f" ({'factors' if uneven else 'offsets'} {listed})",
            "State the scale and shift of each channel that the backbone was trained with.",
            ("latent.shift" if uneven else "latent.scale", "latent.codec"),
        )  # fmt: skip
    if what is None:
        return []
    cause, found, do, also = what
    grade = "broken" if contest.mine.mean.value > 0.3 else "harmful"
    return [Finding(cause, grade, f"{found}: {says}", do, strength=1 + gain.value / trials.CLEAR, also=also)]


def _scaled(case: Case, factor: float) -> str:
    now = case.bare.contract.latent.scale
    if isinstance(now, tuple):
        return f"every number of latent.scale times {factor:.3g}"
    return f"scaling_factor (latent.scale) {now * factor:.5g} in place of {now:.5g}"


def _shifted(case: Case, moved: Tensor) -> str:
    """backbone = (z - shift) scale, so moving by m is shift - m / scale."""
    facts = case.bare.contract.latent
    scale = torch.tensor(facts.scale).expand(len(moved))
    found = torch.tensor(facts.shift).expand(len(moved)) - moved / scale
    return f"shift_factor (latent.shift) about {float(found.mean()):.4g} on average over channels"


@torch.inference_mode()
def largest(case: Case, pixels: Tensor) -> tuple[float, str]:
    """The largest activation anywhere in the codec, on the way there and back, and in which layer."""
    network = case.bare.codec.autoencoder
    found: list[tuple[float, str]] = [(0.0, "")]

    def hook(name: str):
        def watch(module: nn.Module, given: object, result: object) -> None:
            if isinstance(result, Tensor):
                found.append((float(result.abs().max().nan_to_num(math.inf)), name))

        return watch

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name]
    try:
        with working(case.bare, "codec"):
            for part in pixels[:8].split(BATCH):
                case.bare.codec.decode(case.bare.codec.encode(part.to(case.bare.device)))
    finally:
        for handle in handles:
            handle.remove()
    return max(found)
