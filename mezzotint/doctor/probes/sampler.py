"""Whether the path that the contract names arrives where the model leads: steps, sampler, shift, start."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mezzotint.doctor import consistency
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Measure, NotChecked, Plot, measured
from mezzotint.doctor.paths import (
    CONVERGED,
    PICTURES,
    REFERENCE,
    apart,
    converged,
    noisy,
    paths,
    roughness,
    shifted,
    trailing,
)  # fmt: skip
from mezzotint.doctor.statistics import Mean
from mezzotint.errors import InputError
from mezzotint.families.settings import settle
from mezzotint.process import RectifiedFlow
from mezzotint.request import Request
from mezzotint.sampling import LCM, SAMPLERS

FAR = 0.36  # relative error against it from which pictures differ to the eye
ROUGH = 0.25  # difference of log10 power spectra between drawn and converged pictures
FAINT = 0.8  # deviation of what a sampler of fresh noise draws, of the converged pictures'; in enough steps above 0.9
TWICE, SAME = 2, 0.25  # times the converged steps from which steps are wasted, where the pictures are the same
FEW = 100  # steps in which a sampler of higher order is at its end, where the contract has more
LADDER = (4, 6, 8, 12, 20, 30, 50)
SHIFTS = (1.0, 3.0)
USUAL = (0.6, 8.0)  # shifts that published flows have
WORSE, LEAST = 2.0, 0.05  # times the error of the better shift or start, and by how much, before it counts
BETTER = 1.5  # the same where the better start makes a bad path a good one
SEEN = 0.5  # signal of the first level's mean against the noise's own, from which brightness is read out of noise


def examine(case: Case) -> Checked:
    """Pictures from the same noise along the contract's path and along one that has converged."""
    model, facts = case.model, case.model.contract.sampling
    sampler = SAMPLERS.get(facts.sampler)
    if sampler is None:
        raise NotChecked(f"the contract names the sampler {facts.sampler!r}, which does not exist")
    measures: list[Measure] = []
    findings = _start(case, measures)
    distilled = model.contract.guidance.distilled
    seen = case.data is not None and bool(case.latents.isfinite().all())
    sharp = consistency.calibration(case) if seen else None
    if isinstance(sampler, LCM):
        if sharp is not None and not sharp.distilled and not distilled:
            findings.append(_unfit(case, "the sampler lcm jumps to whole images, and this network was not distilled"
                                         " for it:"
                                   f" at full noise it gives means (slope {sharp.noisy.value:.2f})"))  # fmt: skip
        return Checked(tuple(findings), tuple(measures))
    if distilled or (sharp is not None and sharp.distilled):
        return Checked(tuple(findings), (*measures, Measure("steps of a distilled model", facts.steps)))
    try:
        ends, mine = paths(case)
    except InputError as reason:
        raise NotChecked(f"pictures cannot be drawn: {reason}") from reason
    random = noisy(facts.sampler)
    rough = roughness(mine, ends)
    measures.append(
        Measure("difference of log power spectra from converged pictures", rough, bound=f"at most {ROUGH:g}")
    )
    error = apart(mine, ends)
    if not random:
        measures.append(
            measured(f"error against {REFERENCE} in {converged(model)} steps", error, f"at most {FAR:g}")
        )  # fmt: skip
    faint = float(mine.std((0, 2, 3)).mean() / ends.std((0, 2, 3)).mean())
    measures.append(Measure("deviation of pictures, of converged ones", faint, bound=f"at least {FAINT:g}"))
    bent = None if random else _bent(case, measures)
    schedule = model.process.schedule
    whole = random and not isinstance(schedule, RectifiedFlow) and facts.steps >= schedule.timesteps
    # a path of fresh noise over the whole schedule leads where the model leads, by definition (Ho et al. 2020)
    bad = not whole and (rough > ROUGH or (faint < FAINT if random else error.value > FAR))
    plots: list[Plot] = []
    if not random and facts.steps >= TWICE * converged(model) and error.high < SAME:
        findings.append(_wasted(case, error, measures))
    if bent is not None:
        findings.append(bent)
    elif bad:
        finding, plot = _remedy(case, ends, error, rough, random, measures)
        findings.append(finding)
        plots.append(plot)
    return Checked(tuple(findings), tuple(measures), tuple(plots))


def _bent(case: Case, measures: list[Measure]) -> Finding | None:
    """Where a flow's shift is far from usual: the same steps with shift 1 and 3, against a path that bends nothing."""
    model, facts = case.model, case.model.contract.sampling
    schedule = model.process.schedule
    if not isinstance(schedule, RectifiedFlow) or schedule.mu != "none" or USUAL[0] <= schedule.shift <= USUAL[1]:
        return None
    ends = case.draw(shifted(model, 1.0), PICTURES, sampler=REFERENCE, steps=CONVERGED).latents
    tried = {
        shift: apart(case.draw(shifted(model, shift), PICTURES).latents, ends) for shift in (*SHIFTS, schedule.shift)
    }
    best = min(SHIFTS, key=lambda shift: tried[shift].value)
    mine = tried[schedule.shift]
    measures += [measured(f"error with shift {shift:g} against a converged path", tried[shift]) for shift in tried]
    if mine.value < WORSE * tried[best].value or mine.value - tried[best].value < LEAST:
        return None
    return Finding(
        "schedule.shift", "harmful",
        f"with shift {schedule.shift:g} {facts.sampler} in {facts.steps} steps ends {mine.value:.2f} of the deviation"
        " of"
        f" pictures from where the model leads, with shift {best:g} {tried[best].value:.2f}",
        f"Set shift to {best:g} (scheduler_config.json; process.schedule.shift).",
        strength=mine.value / tried[best].value / WORSE, measures=tuple(measures[-len(tried):]),
    )  # fmt: skip


def _wasted(case: Case, error: Mean, measures: list[Measure]) -> Finding:
    facts, enough = case.model.contract.sampling, converged(case.model)
    return Finding(
        "speed.steps", "harmful",
        f"{facts.sampler} in {facts.steps} steps comes to the same pictures as {REFERENCE} in {enough} (difference"
        f" {error.value:.2f} of their deviation): {facts.steps / enough:.1f} times the time for nothing",
        f"Use {REFERENCE} in {enough} steps, or fewer.",
        f"mezzotint generate PROMPT --model {case.path} --sampler {REFERENCE} --steps {enough}",
        strength=facts.steps / enough, measures=tuple(measures),
    )  # fmt: skip


def _start(case: Case, measures: list[Measure]) -> list[Finding]:
    """Where the path begins: a schedule that ends in noise must be entered there (Lin et al. 2023, section 3.3)."""
    model, facts = case.model, case.model.contract.sampling
    schedule = model.process.schedule
    first = settle(model, Request()).path.steps[0].now
    deviation, cells = 0.5, 4096.0
    if case.data is not None and bool(case.latents.isfinite().all()):
        deviation, cells = float(case.latents.mean((2, 3)).std(0).mean()), float(case.latents[0, 0].numel())
    claimed = first.alpha * deviation * cells**0.5 / first.sigma
    measures.append(Measure("brightness that the first level claims, against that of noise alone", claimed))
    if isinstance(schedule, RectifiedFlow) or facts.spacing == "trailing":
        return []
    if deviation * cells**0.5 / schedule.ratios()[-1] > SEEN / 5:  # its last level shows brightness, too
        return []
    seen, strength = "pictures all get medium brightness", claimed / SEEN
    if claimed <= SEEN:
        if claimed < SEEN / 10 or noisy(facts.sampler):
            return []
        ends, own = paths(case)
        mine, other = apart(own, ends), apart(case.draw(trailing(model), PICTURES).latents, ends)
        needed = BETTER if mine.high > FAR >= other.high else WORSE  # from what may be a bad path to one that is none
        measures += [
            measured("error of the path from its start", mine),
            measured("the same with trailing spacing", other, f"at least 1/{needed:g} of it"),
        ]
        if mine.value < needed * other.value or mine.value - other.value < LEAST:
            return []
        seen = f"it ends {mine.value:.2f} of the deviation of pictures from where the model leads, with trailing"
        seen += f" spacing {other.value:.2f}"
        strength = mine.value / other.value / needed
    return [
        Finding(
            "schedule.start", "harmful",
            f"the schedule ends in noise and the path starts at timestep {first.t:g}, where alpha is"
            f" {first.alpha:.3f}: {seen}",
            'Use trailing spacing ("timestep_spacing": "trailing"; sampling.spacing = "trailing").',
            strength=strength, measures=tuple(measures),
        )
    ]  # fmt: skip


def _unfit(case: Case, says: str) -> Finding:
    good = "flow_euler" if isinstance(case.model.process.schedule, RectifiedFlow) else "dpmpp_2m"
    return Finding(
        "sampler.unfit", "harmful", says, f"Use {good} in 20 steps.",
        f"mezzotint generate PROMPT --model {case.path} --sampler {good} --steps 20", strength=3.0,
    )  # fmt: skip


def _remedy(
    case: Case, ends: Tensor, error: Mean, rough: float, random: bool, measures: list[Measure]
) -> tuple[Finding, Plot]:
    """More steps, another shift, or another sampler: the first that brings the path to its end."""
    model, facts = case.model, case.model.contract.sampling
    size = f"{error.value:.2f} of the deviation of pictures" if not random else f"{rough:.2f} in log power"
    says = f"{facts.sampler} in {facts.steps} steps ends far from where the model leads ({size})"
    curve = [(float(facts.steps), error.value)]
    other = "flow_euler" if isinstance(model.process.schedule, RectifiedFlow) else "dpmpp_2m"
    if random:
        few = min(facts.steps, FEW)
        plain = apart(case.draw(model, PICTURES, sampler=other, steps=few).latents, ends)
        if plain.value <= FAR:
            finding = replace(
                _unfit(case, f"{says}, where {other} in {few} does not ({plain.value:.2f}): a sampler that draws"
                             " fresh noise"
                       " needs more steps"), also=("sampler.steps",),
            )  # fmt: skip
            return finding, Plot(
                "error by sampler", "", "error", {"error": [(0, plain.value)]}, "bars", labels=(other,)
            )
    enough = facts.steps
    for steps in [s for s in LADDER if s > facts.steps]:
        trial = case.draw(model, PICTURES, steps=steps).latents
        value = roughness(trial, ends) if random else apart(trial, ends).value
        curve.append((float(steps), value))
        enough = steps
        if value < (ROUGH if random else FAR) / 1.5:
            break
    finding = Finding(
        "sampler.steps", "harmful", says, f"Use {enough} steps, or a sampler of higher order.",
        f"mezzotint generate PROMPT --model {case.path} --steps {enough}",
        strength=max(rough / ROUGH, 1.0 if random else error.value / FAR), measures=tuple(measures),
    )  # fmt: skip
    return finding, Plot("error by steps", "steps", "error", {facts.sampler: curve}, log_x=True, log_y=True)
