"""Where a request's time goes, how near a step comes to what this machine can do, and what would make it quicker."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mezzotint.doctor import ceiling, clock, earlier, overheads, planned, remedies, timing
from mezzotint.doctor.case import Case
from mezzotint.doctor.clock import Work
from mezzotint.doctor.finding import Checked, Finding, Measure, Plot
from mezzotint.doctor.remedies import Seen, Tried
from mezzotint.doctor.timing import Timed
from mezzotint.families.model import Model, working

PYTHON = 0.35  # share of a step between operators; the starter model has below 0.1, networks of toys 0.5
EVALUATIONS, MOSTLY = 50, 0.8  # of the network, and their share of a request
CODEC, TEXT = 0.6, 0.4  # share of a request
GUIDED = 1.3  # a second branch may be nearly free where calls decide and not numbers
FAULTS = 5  # pages read back from disk in a step, once everything has been in memory


def examine(case: Case) -> Checked:
    """Measure a request's parts, then try what would make it quicker."""
    model, request = case.model, timing.asked(case)
    told, text = timing.encoding(model, request)
    case.say("speed: a step")
    with working(model, "backbone"):
        works = timing.sizes(model, request, told)
        seen, step, kinds, faults = timing.step_of(case, works)
        sampler, evaluations = clock.walked(seen.work)
    decode, encode = timing.codec(model, [work for work, _ in works])
    area = timing.area(request) / timing.area(seen.work.request)
    parts = {
        "text": text.value, "steps": evaluations * step.value * area, "sampler": sampler, "codec.decode": decode.value,
    }  # fmt: skip
    measures = [
        step.measure, *(each.measure for each in kinds), *(each.measure for each in (text, decode, encode)),
        Measure("sampler", sampler, unit="s"), Measure("request", sum(parts.values()), unit="s"),
        Measure("evaluations", evaluations), *machine(seen, step),
    ]  # fmt: skip
    size = seen.work.settings
    foreseen = case.foresee((size.width, size.height))
    case.say("speed: remedies")
    with working(model, "backbone"):
        tried = remedied(seen, works)
    tried += [overheads.offload(seen, sum(parts.values())), scarce(model, faults), (dominant(parts, evaluations), []),
              planned.against(foreseen, step, kinds, text, decode)]  # fmt: skip
    if not any(finding.cause == "speed.python" for found, _ in tried for finding in found):
        tried.append((dispatched(seen, kinds, step), []))
    if case.trace is not None and case.trace.is_dir():
        tried.append(earlier.loading(case.trace, step.value * area / (2 if seen.work.guided else 1)))
    findings = [finding for found, _ in tried for finding in found]
    measures += [each for _, more in tried for each in more]
    report = earlier.report_of(case.trace)
    if report is not None:
        found, more = earlier.regressed(report, measures)
        findings, measures = findings + found, measures + more
    return Checked(tuple(findings), tuple(measures), plots(parts, kinds))


def machine(seen: Seen, step: Timed) -> list[Measure]:
    """The work of a step against the machine's ceiling."""
    roof = ceiling.ceiling(str(seen.device), seen.model.dtype, torch.get_num_threads(), *seen.largest)
    work = sum(seen.flops.values())
    weights = sum(parameter.nbytes for parameter in seen.model.backbone.parameters())
    return [
        Measure("rows", 2 if seen.work.guided else 1), Measure("weights", weights / 1e9, unit="GB"),
        Measure("work", work / 1e9, unit="GFLOP"),
        Measure("rate", work / step.value / 1e9, work / max(step.spans) / 1e9, work / min(step.spans) / 1e9,
                unit="GFLOP/s"),
        Measure("ceiling.matrix", roof.matrix / 1e9, unit="GFLOP/s"),
        Measure("ceiling.convolution", roof.convolution / 1e9, unit="GFLOP/s"),
        Measure("ceiling.copy", roof.copy / 1e9, unit="GB/s"),
        Measure("reached", 100 * roof.seconds(seen.flops) / step.value, unit="%"),
        Measure("memory.weights", 100 * 2 * weights / roof.copy / step.value, unit="%"),
    ]  # fmt: skip


def remedied(seen: Seen, works: Sequence[tuple[Work, float]]) -> list[Tried]:
    """What each remedy gives; where a number format is slow, nothing else can be told before that is mended."""
    first = remedies.number_format(seen)
    quickest = dict((id(work), spent) for work, spent in works)[id(seen.light)]
    if quickest > clock.LONG:
        return [first, ([], [Measure("pairs", 0, bound="a step takes too long to be run in pairs")])]
    if any(finding.grade == "harmful" for finding in first[0]):
        return [first]
    return [
        first, overheads.hooks(seen), overheads.text_within(seen), overheads.adapters(seen), overheads.threads(seen),
        overheads.untidy(seen), remedies.attention(seen), remedies.memory_format(seen), guidance(seen),
        overheads.recompiled(seen, works[0][0] if len(works) > 1 else None),
    ]  # fmt: skip


def guidance(seen: Seen) -> Tried:
    """What the second branch costs."""
    if not seen.work.guided:
        return [], []
    alone = clock.prepared(seen.model, replace(seen.light.request, guidance=1.0), (seen.light.told[0], None))
    found = clock.paired(seen.light.step, alone.step, seen.device, bound=GUIDED)
    told = [remedies.measure("guidance", found)]
    if not found.beyond(GUIDED):
        return [], told
    says = f"guidance makes a step {found.value:.2f} times as long{seen.place}: it asks the network a second time"
    do = "Where speed counts, guide the middle of the path alone (guidance_interval), or distil guidance (method lcm)."
    return [Finding("speed.guidance", "note", says, do, "", found.value / GUIDED)], told


def dominant(parts: Mapping[str, float], evaluations: int) -> list[Finding]:
    """Which part a request spends its time in, where that says what to do."""
    whole = sum(parts.values())
    share = {name: spent / whole for name, spent in parts.items()}
    found: list[Finding] = []
    if share["steps"] > MOSTLY and evaluations >= EVALUATIONS:
        says = f"{evaluations} runs of the network are {100 * share['steps']:.0f} % of the {whole:.2g} s of a request"
        do = "Try fewer steps, or a sampler that needs fewer: the probe of the sampler says what the pictures lose."
        found.append(Finding("speed.steps", "note", says, do, "", evaluations / EVALUATIONS))
    if share["codec.decode"] > CODEC:
        says = f"decoding is {100 * share['codec.decode']:.0f} % of the {whole:.2g} s of a request"
        do = "Draw fewer pictures at full size, or look at latents while choosing: the steps themselves are quick."
        found.append(Finding("speed.codec", "note", says, do, "", share["codec.decode"] / CODEC))
    if share["text"] > TEXT:
        says = f"encoding the prompt is {100 * share['text']:.0f} % of the {whole:.2g} s of a request"
        do = "Draw several images of a prompt at once (--count): it is encoded once for all of them."
        found.append(Finding("speed.text", "note", says, do, "", share["text"] / TEXT))
    return found


def dispatched(seen: Seen, kinds: Sequence[Timed], step: Timed) -> list[Finding]:
    """Whether a step passes between operators rather than in them."""
    python = next((each for each in kinds if each.name == "step.python"), None)
    if python is None or seen.operators is None:
        return []
    shares = [spent / step.value for spent in python.spans]
    if statistics.median(shares) < PYTHON or sum(share > PYTHON / 2 for share in shares) < 0.8 * len(shares):
        return []
    share = statistics.median(shares)
    says = (
        f"{100 * share:.0f} % of a step passes between its {seen.operators.calls} operators: the network is so small "
        "that calling it decides"
    )
    do = "Draw more images at once (--count): they cost little more than one."
    return [Finding("speed.python", "note", says, do, "", share / PYTHON)]


def scarce(model: Model, faults: Sequence[int]) -> Tried:
    """Whether the weights stay in memory from step to step."""
    now = ceiling.memory()
    networks = [network for part in ("text", "backbone", "codec") for network in model.networks(part).values()]
    need = sum(tensor.nbytes for network in networks for tensor in network.parameters())
    each = statistics.median(faults)
    told = [Measure("memory.faults", each, min(faults), max(faults), f"below {FAULTS}", "pages a step")]
    told += [
        Measure(f"memory.{name}", value / 1e9, unit="GB")
        for name, value in (("available", now.available), ("resident", now.resident), ("swapped", now.swapped))
        if value is not None
    ]
    often = sum(count >= FAULTS for count in faults) >= clock.AGREE * len(faults)
    tight = now.available is not None and now.resident is not None and now.available + now.resident < 1.1 * need
    swapped = (now.swapped or 0.0) > 0.05 * max(need, 1.0) and now.swapped is not None and now.swapped > 2**26
    if not (often and len(faults) > 2) and not tight and not swapped:
        return [], told
    says = f"the model needs {need / 1e9:.2g} GB, {(now.available or 0) / 1e9:.2g} GB are free"
    says += f", {(now.swapped or 0) / 1e9:.2g} GB of this process are swapped out" if swapped else ""
    says += f", and every step reads {each:.0f} pages back from disk" if often else ""
    do = "Close what else needs memory, load with --offload, or use a number format that this machine computes quickly."
    command = "mezzotint generate --offload ..."
    grade = "harmful" if often else "note"
    return [Finding("speed.memory", grade, says, do, command, max(1.0, each / FAULTS), tuple(told))], told


def plots(parts: Mapping[str, float], kinds: Sequence[Timed]) -> tuple[Plot, ...]:
    """A request by part, and a step by kind of layer."""
    bars = [Plot("A request by part", "part", "seconds", {"seconds": list(enumerate(parts.values()))}, "bars",
                 labels=tuple(parts))]  # fmt: skip
    if kinds:
        spent = [(float(place), 1000 * each.value) for place, each in enumerate(kinds)]
        names = tuple(each.name.removeprefix("step.") for each in kinds)
        bars.append(
            Plot("A step by kind of layer", "kind", "milliseconds", {"milliseconds": spent}, "bars", labels=names)
        )
    return tuple(bars)
