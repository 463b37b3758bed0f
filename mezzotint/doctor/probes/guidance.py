"""Guidance: too strong, on a model that has it built in, against a branch that was never trained, or missing."""

from __future__ import annotations

import torch

from mezzotint import images
from mezzotint.doctor import consistency, readings, steerings, trials
from mezzotint.doctor.case import Case, Drawn
from mezzotint.doctor.finding import Checked, Exhibit, Finding, Measure, NotChecked, Plot, measured
from mezzotint.doctor.rereading import WEAK
from mezzotint.doctor.statistics import deviations
from mezzotint.errors import InputError

CLIPPED = 0.06  # share of pixels outside the range, beyond that of unguided pictures and the user's images
WIDER = 1.4  # deviation of guided latents against that of unguided ones or of the images; healthy 1.3 to 1.8 at most
WIDER_ALONE = 1.8  # the same without images: unguided pictures of small models vary too little, healthy up to 1.6
UNTRAINED = 0.3  # log error of the unconditional branch above that of the conditional one
IGNORANT = 0.03  # log error of it above that of a wrong condition, which knows less than nothing
PICTURES = 8
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 12.0)


def examine(case: Case) -> Checked:
    """Saturation by scale, the unconditional branch on the user's images, how sharp the network is at full noise."""
    facts = case.model.contract.guidance
    measures: list[Measure] = []
    findings: list[Finding] = []
    plots: list[Plot] = []
    exhibits: list[Exhibit] = []
    steered = case.model.text is not None or case.model.contract.classes is not None
    if case.data is not None and steered and bool(case.latents.isfinite().all()):
        findings += _branches(case, measures)
    guided = facts.scale != 1.0 and (not facts.distilled) and steered
    if guided:
        found = _saturation(case, measures, plots, exhibits)
        findings += [found] if found else []
    elif not steered:
        raise NotChecked("nothing steers this model, so nothing guides it")
    elif facts.dropout > 0 and not facts.distilled:
        findings.append(
            Finding(
                "guidance.missing", "note",
                f"the model was trained for guidance (its condition was dropped in {100 * facts.dropout:.0f} % of"
                " steps) and is"
                " drawn without: pictures follow prompts less than they could",
                "Try a scale of 2 to 5 and state the best one as guidance.scale.", "mezzotint generate PROMPT"
                                                                                   " --guidance 3",
            )
        )  # fmt: skip
    return Checked(tuple(findings), tuple(measures), tuple(plots), tuple(exhibits))


def _branches(case: Case, measures: list[Measure]) -> list[Finding]:
    facts = case.model.contract.guidance
    findings: list[Finding] = []
    sharp = consistency.calibration(case)
    measures += [
        measured("slope of the truth on its word at the noisiest level", sharp.noisy, "about 1; less if distilled"),
        measured("the same at little noise", sharp.quiet, "about 1"),
        Measure("deviation of the network's word at the noisiest level, of the images'", sharp.sharpness),
    ]  # fmt: skip
    built_in = consistency.guided(case)
    if (sharp.distilled or built_in) and not facts.distilled and trials.explanation(case) is None:
        fit = consistency.weight(case)
        measures.append(
            measured("share of what the caption changes that is right", fit, "about 1; 1 / scale if built in")
        )
        seen = (
            f"what a caption changes is too large by {1 / fit.value:.1f} times, as where guidance is built in"
            if built_in
            else f"at the noisiest level the network gives whole images (slope {sharp.noisy.value:.2f}, deviation"
            f" {sharp.sharpness:.2f} of the images'), and {sharp.rest.value:.2f} of its output would fit in between"
        )
        findings.append(
            Finding(
                "guidance.distilled", "harmful",
                f"{seen}: the network is distilled, and its files call for guidance {facts.scale:g} as for an ordinary"
                " one",
                "Draw without guidance in few steps: state guidance.distilled (is_distilled), scale 1, the lcm"
                " sampler.",
                f"mezzotint generate PROMPT --model {case.path} --sampler lcm --steps 4 --guidance 1",
                strength=3.0, measures=tuple(measures[-3:]),
            )
        )  # fmt: skip
    if facts.scale != 1.0 and not facts.distilled:
        mine = trials.own(case).at(readings.MIDDLE)
        free = steerings.unsteered(case)
        worse = mine.gain(free)
        fit = consistency.weight(case)
        measures += [
            measured("log error of the unconditional branch above the conditional one's", worse,
                    f"at most {UNTRAINED:g}"),
            measured("multiple of the guided direction that fits the images best", fit, "about 1"),
        ]  # fmt: skip
        tell = len(set(steerings.wishes(case))) > 1 and not consistency.misheard(case)  # else they say nothing
        other = steerings.swapped(case) if tell else None
        misled = other.gain(free) if other is not None else None
        # else its captions may be strange to it, too
        understood = other is not None and mine.gain(other).low > 0 and consistency.told(case).low <= WEAK
        if misled is not None:
            measures.append(measured("log error of the unconditional branch above that of a wrong condition", misled,
                                     f"at most {IGNORANT:g}"))  # fmt: skip
        ignorant = misled is not None and misled.value > IGNORANT and misled.low > 0 and understood
        if ignorant or (worse.value > UNTRAINED and worse.low > 0.7 * UNTRAINED):
            than = " than with its own, and higher than with a wrong one" if ignorant else ""
            findings.append(
                Finding(
                    "guidance.untrained", "broken",
                    f"without its condition the network's log error is {worse.value:.2f} higher{than}: the branch that"
                    " guidance compares with was never trained",
                    "Draw at guidance 1, or train on with a share of captions (labels) dropped.",
                    f"mezzotint generate PROMPT --model {case.path} --guidance 1",
                    strength=max(1.0, worse.value / UNTRAINED), measures=tuple(measures[-3:]),
                    also=("text.encoder",) if ignorant and case.model.text is not None else (),
                )
            )  # fmt: skip
    return findings


def spill(drawn: Drawn) -> float:
    """Share of pixels clearly outside of what a picture can hold."""
    return float((drawn.pixels.abs() > 1.05).float().mean())


def _saturation(case: Case, measures: list[Measure], plots: list[Plot], exhibits: list[Exhibit]) -> Finding | None:
    """Clipped pixels and swollen latents at the contract's scale against an unguided draw."""
    scale = case.model.contract.guidance.scale
    try:
        free = case.draw(case.model, PICTURES, guidance=1.0, **case.quick(case.model))
    except InputError:
        return None
    own = case.drawn
    known = case.data is not None and bool(case.latents.isfinite().all())
    widest = case.latents if known and float(case.latents.std()) > float(free.latents.std()) else free.latents
    usual, wider = float(widest.std()), WIDER if known else WIDER_ALONE
    swollen = deviations(own.latents, widest)
    excess = spill(own) - max(spill(free), _given(case))
    measures += [
        Measure("share of pixels outside the range", spill(own), bound=f"at most {CLIPPED:g} more than unguided"),
        Measure("the same without guidance", spill(free)),
        measured(f"deviation of guided latents, of {'the images or ' if known else ''}unguided ones", swollen,
                 f"at most {wider:g}"),
    ]  # fmt: skip
    if not (excess > CLIPPED or swollen.low > wider):
        return None
    good, curve = 1.0, [(1.0, spill(free))]
    for other in [s for s in SCALES if 1.0 < s < scale]:
        trial = case.draw(case.model, PICTURES, guidance=other, **case.quick(case.model))
        curve.append((other, spill(trial)))
        if spill(trial) - spill(free) < CLIPPED / 2 and float(trial.latents.std()) < 1.3 * usual:
            good = other
    curve.append((scale, spill(own)))
    plots.append(Plot("pixels outside the range by guidance", "scale", "share", {"clipped": curve}))
    rows = torch.cat([torch.cat(list(part.pixels[:6]), dim=2) for part in (free, own)], dim=1)
    exhibits.append(Exhibit(f"without guidance, and at {scale:g}", images.to_images(rows[None].clamp(-1, 1))[0]))
    return Finding(
        "guidance.strong", "harmful",
        f"at guidance {scale:g} {100 * spill(own):.0f} % of the pixels are outside the range ({100 * spill(free):.0f}"
        " % without),"
        f" and latents deviate {swollen.value:.2f} times as much as {'those of the images' if known else 'without'}",
        f"Use a scale of at most {good:g}; in Python also guidance_interval=(0.2, 0.8) or guidance_rescale=0.7.",
        f"mezzotint generate PROMPT --model {case.path} --guidance {good:g}",
        strength=max(excess / CLIPPED, swollen.value / wider, 1.0), measures=tuple(measures[-3:]),
    )  # fmt: skip


def _given(case: Case) -> float:
    if case.data is None:
        return 0.0
    return float((case.data.pixels.abs() > 1.05).float().mean())
