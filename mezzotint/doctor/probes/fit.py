"""What the network has learned: too little, its training images by heart, one picture only, at the cost of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint import images
from mezzotint.conditioning import Conditioning
from mezzotint.data.folder import NO_LABEL
from mezzotint.doctor import consistency, copies, filters, pictures, readings, runs, steerings, trials
from mezzotint.doctor.case import BATCH, Case, Drawn
from mezzotint.doctor.finding import Checked, Exhibit, Finding, Measure, Plot, measured
from mezzotint.doctor.probes import trace
from mezzotint.doctor.probes.data import sheet
from mezzotint.doctor.readings import RATIOS, Reading, Score
from mezzotint.doctor.statistics import diversity, mean
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.families.model import working

MIDDLE = slice(2, 5)  # of RATIOS: sigma / alpha from 0.4 to 2.5, where a network has most to say
NOISY = 5  # of RATIOS: sigma / alpha = 6.7, where of an image that is not known by heart hardly anything is left
# Bounds, with what healthy models show (the starter on its cells; of the nursery dit-clean and sd1-epsilon).
COPIES = 0.25  # share of drawn pictures; healthy: none, on a folder of six images 1 of 16
SUSPICIOUS = -1.5  # log error at the noisiest level from which pictures are looked at without guidance; healthy -1.1
DIVERSE = 0.35  # of the variance of the data; healthy 0.7 to 2.3
ONLY = 1.0  # log error of the images above that of its pictures, where these are alike and nothing else is known
NONSENSE, ASTRAY, WORSE = 0.5, 0.9, 1.0  # slopes of the target on the output, and the log error beside the second
FORGOTTEN = 0.7  # log error on the base's pictures
RUINED = 1.0  # the same, from which a model that is worse than its base on the images too is broken
SHOWN = 6
Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Part:
    """What one question gave."""

    finding: Finding | None = None
    measures: tuple[Measure, ...] = ()
    curves: Mapping[str, list[tuple[float, float]]] | None = None
    exhibit: Exhibit | None = None


def examine(case: Case) -> Checked:
    """How well the model denoises the user's images, which of them it draws, how different, and what its base knew."""
    run = runs.read(case.trace) if case.trace is not None and case.trace.is_dir() else None
    own = trials.own(case)
    parts = [learned(case, own, run)]
    try:
        drawn = case.drawn
    except InputError:  # its pictures are not finite, which other probes explain; what it learned is known all the same
        drawn = None
    if drawn is not None and bool(drawn.latents.isfinite().all()):
        parts += [by_heart(case, own, drawn, run), different(case, own, drawn)]
    base = case.base or (case.bare if case.lora else None)
    if base is not None and base.contract.latent.codec == case.bare.contract.latent.codec:
        parts.append(forgotten(case, own, base))
    curves: Curves = {}
    for part in parts:
        curves |= dict(part.curves or {})
    plot = Plot("error of denoising against the best scalar filter", "sigma / alpha", "log of the ratio of errors",
                curves, log_x=True)  # fmt: skip
    return Checked(
        tuple(part.finding for part in parts if part.finding),
        tuple(measure for part in parts for measure in part.measures),
        (plot,),
        tuple(part.exhibit for part in parts if part.exhibit),
    )


def scored(case: Case, model: Model, latents: Tensor, steering: Conditioning) -> Score:
    """How well a model denoises other latents, of which no more are taken than the user gave images."""
    return readings.score(case, Reading("", model.process, latents[: len(case.noise)], steering, model))


def _curve(score: Score) -> list[tuple[float, float]]:
    return list(zip(RATIOS, score.log_error.mean(0).tolist(), strict=True))


# Learned at all.


def learned(case: Case, own: Score, run: runs.Run | None) -> Part:
    """Against a linear filter that knows the spectrum of the other images and nothing else, paired over images."""
    linear = filters.log_error(case, case.usable, RATIOS)  # (N, K)
    known = mean((own.log_error - linear)[:, MIDDLE].mean(1))
    measure = measured("log error at middle levels against a linear filter", known, f"below {trials.LEARNED:g}")
    curves = {"the images": _curve(own), "a linear filter": list(zip(RATIOS, linear.mean(0).tolist(), strict=True))}
    finding = None
    rest = consistency.optimum(case)
    measures = (
        measure,
        measured(
            "slope of the training target on the output, at middle levels", rest, f"at least {consistency.REST:g}"
        ),
    )
    moved = rest.value < consistency.REST and rest.high < consistency.REST + 0.015 and not case.lora
    ruined = rest.high < NONSENSE or (rest.high < ASTRAY and known.low > WORSE)  # however captions may be heard
    if moved and trials.explanation(case) is None and (ruined or heard(case)):
        finding = Finding(
            "weights.damaged", "broken" if ruined else "harmful",
            f"the network answers too much: {rest.value:.3f} of its output ({rest.low:.3f} to {rest.high:.3f}) would"
            " fit these"
            " images better, where training comes to rest at 1; its log error against a linear filter is"
            f" {known.value:+.2f}",
            "Use the weights as training left them: a merge, a conversion or rounding moved them, or these are other"
            " images"
            " than the model was trained on.",
            strength=1 + (consistency.REST - rest.value) / 0.03, measures=measures,
            also=("fit.over", "weights.precision"),
        )  # fmt: skip
    elif known.low > trials.LEARNED and not case.lora:  # of adapters their own probe says what they give
        fall = trace.falling(run) if run else None
        says = "at middle noise the network has hardly learned more than the spectrum of the images: its log error is"
        says += f" {known.value:+.2f} ({known.low:+.2f} to {known.high:+.2f}) against a linear filter that knows it"
        says += f"; the validation loss was still falling, by {fall:.0%} in the last quarter" if fall else ""
        command = run.again(f"steps={4 * int(run.recipe['steps'])}") if run and "steps" in run.recipe else ""
        finding = Finding("fit.under", "harmful", says, "Train longer, until the validation loss no longer falls.",
                          command, 1 + (known.low - trials.LEARNED),
                          also=() if fall else ("weights.damaged",))  # fmt: skip
    return Part(finding, measures, curves)


def different_captions(case: Case) -> bool:
    """Whether images are told apart at all by what is said of them."""
    return len(set(steerings.wishes(case))) > 1


def heard(case: Case) -> bool:
    """Whether what is said is heard as in training: what is misheard makes a sound network answer too much."""
    steered = case.model.text is not None or case.model.contract.classes is not None
    return not steered or not different_captions(case) or not consistency.misheard(case)


# By heart.


def by_heart(case: Case, own: Score, drawn: Drawn, run: runs.Run | None) -> Part:
    """Whether what it draws are the user's images, and whether it denoises them better than others of their kind."""
    every, noisy = copies.whole(case).pixels, mean(own.log_error[:, NOISY])
    its = case.steering.map(lambda tensor: tensor[drawn.rows])
    curves = {"its own pictures": _curve(scored(case, case.model, drawn.latents, its))}
    found, guided = copies.nearest(copies.small(drawn, every), every), case.model.contract.guidance
    few, may = found.copies < COPIES * len(found.ratio), guided.scale > 1 and not guided.embedded
    if few and may and noisy.value < SUSPICIOUS:  # guidance moves pictures away from what was learned
        drawn = case.draw(case.model, guidance=1.0)
        found = copies.nearest(copies.small(drawn, every), every)
    share = found.copies / len(found.ratio)
    measures = [
        Measure("share of drawn pictures that are copies of an image", share, bound=f"below {COPIES:g}"),
        Measure("distance of a drawn picture to the nearest image, to that image's others", float(found.ratio.median()),
                bound=f"copies below {copies.COPY:g}"),
        measured("log error at sigma / alpha = 6.7", noisy),
    ]  # fmt: skip
    says = f"{found.copies} of {len(found.ratio)} drawn pictures are nearer to an image of the data than half of what"
    says += f" lies between images there (median ratio {float(found.ratio.median()):.2f})"
    held = _held(case, run)
    if held is not None:
        other = mean(held.log_error.mean(1))
        measures.append(measured("log error on images kept for validation", other))
        curves["images kept for validation"] = _curve(held)
        says += (
            f"; the log error is {own.mean.value:+.2f} on the images, {other.value:+.2f} on those kept for validation"
        )
    order = found.ratio.argsort()[:SHOWN]
    left = images.to_images(drawn.pixels[order])
    right = images.to_images(every[found.index[order]])
    exhibit = Exhibit("drawn, and the nearest image of the data", sheet(list(zip(left, right, strict=True))))
    finding = None
    if share >= COPIES and found.originals > 1:  # one picture for every seed is another cause
        do = "Train anew for fewer steps, on more images, with mirroring where it is allowed."
        finding = Finding("fit.memorised", "broken" if share > 0.5 else "harmful", says, do, strength=share / COPIES)
    return Part(finding, tuple(measures), curves, exhibit)


def _held(case: Case, run: runs.Run | None) -> Score | None:
    """On the images that the run kept for validation."""
    place: Path | None = run.place((run.recipe.get("data") or {}).get("validation")) if run else None
    if place is None:
        return None
    model = case.bare
    found = pictures.read(place, model.contract.size, model.codec.pixel_channels, len(case.noise))
    with working(model, "codec"), torch.inference_mode():
        latents = [model.codec.encode(part.to(model.device)).float().cpu() for part in found.pixels.split(BATCH)]
    return scored(case, case.model, torch.cat(latents), case.steered(case.model, found.captions, found.labels))


# One picture only.


def different(case: Case, own: Score, drawn: Drawn) -> Part:
    """How different drawn pictures are, where few: without guidance, which takes some of it on purpose."""
    found, how = diversity(drawn.latents, case.usable), "as requested"
    guided = case.model.contract.guidance
    if found.high < DIVERSE and guided.scale > 1 and not guided.embedded:
        found, how = diversity(case.draw(case.model, guidance=1.0).latents, case.usable), "without guidance"
    name = f"variance of drawn pictures over that of the images, {how}"
    finding = None
    if found.high < DIVERSE:
        says = f"pictures drawn {how} differ by {found.value:.2f} of what the images do"
        says += f" ({max(found.low, 0):.2f} to {found.high:.2f})"
        do = "Draw with other wishes; if they stay alike, train anew on more and more different images."
        itself = trials.itself(case)
        gain = own.mean.value - itself.mean.value if itself is not None else 0.0
        if gain > ONLY:
            says += f", and these are all that it knows: its log error is less by {gain:.1f} on them than on the images"
        grade = "broken" if gain > ONLY else "harmful"
        finding = Finding("fit.collapsed", grade, says, do, strength=DIVERSE / max(found.high, 0.01))
    return Part(finding, (measured(name, found, f"above {DIVERSE:g}"),))


# At the cost of the base.


def forgotten(case: Case, own: Score, base: Model) -> Part:
    """The model's error on what its base draws unasked against the base's own, and its gain on the user's images."""
    unasked: dict[str, Any] = {} if base.contract.guidance.embedded else {"guidance": 1.0}
    if base.text is not None:
        unasked["prompt"] = ""
    drawn = case.draw(base, count=min(12, len(case.noise)), **unasked)
    captions = [""] * len(drawn.rows)
    labels = case.images.labels[drawn.rows] if base.contract.classes else torch.full((len(captions),), NO_LABEL)
    theirs = scored(case, base, drawn.latents, case.steered(base, captions, labels))
    ours = scored(case, case.model, drawn.latents, case.steered(case.model, captions, labels))
    before = scored(case, base, case.usable, case.steered(base, case.images.captions, case.images.labels))
    lost, gained = theirs.gain(ours), own.gain(before)
    # weights that answer too much on top of it went too far from the base, and not only elsewhere
    bound = FORGOTTEN if consistency.optimum(case).value >= consistency.REST else FORGOTTEN / 2
    measures = (
        measured("log error lost on pictures of the base", lost, f"at most {bound:g}"),
        measured("log error gained over the base on the images", gained, "above 0"),
    )
    curves = {"pictures of the base": _curve(ours), "the base on its own pictures": _curve(theirs),
              "the base on the images": _curve(before)}  # fmt: skip
    finding = None
    if lost.low > bound:
        says = f"on what the base draws the error rose by {lost.value:.2f} (log, {lost.low:.2f} to {lost.high:.2f})"
        says += f", on the images it {'fell' if gained.value > 0 else 'rose'} by {abs(gained.value):.2f}"
        do = "Train anew from the base at a tenth of the rate or for fewer steps, or train an adapter."
        grade = "broken" if lost.low > RUINED and gained.high < 0 else "harmful"  # its base does better at everything
        finding = Finding("fit.forgotten", grade, says, do, strength=lost.low / bound)
    return Part(finding, measures, curves)
