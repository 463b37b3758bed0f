"""`mezzotint doctor`: why a model's pictures are bad or slow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mezzotint.cli import console
from mezzotint.cli.options import nearest
from mezzotint.errors import InputError, NotFinite

if TYPE_CHECKING:
    from rich.progress import Progress

    from mezzotint.doctor.planned import Foresee, Planned

OUT = Path("out") / "doctor"
# What probes take of each other's time, measured on the starter model: only how long the rest may take is told by it.
SHARES = {
    "weights": 2.0, "latent": 6.0, "schedule": 1.0, "text": 2.0, "guidance": 2.0, "adapters": 1.0, "cache": 0.5,
    "data": 0.3, "fit": 2.0, "sampler": 6.0, "speed": 2.0,
}  # fmt: skip
SMALL = 0.1  # share of a probe that is not named


@dataclass(frozen=True)
class Options:
    """Say why a model's pictures are bad, or slow: the cause, the evidence, what mends it.

    PATH is a model (folder or single file), an adapter or a cache (then --base names the model), or a run folder of
    training. A few dozen images of what the model was trained on make most probes possible: what a network says of
    itself is not believed, but tried on them. The answer comes with a page of everything that was measured. The exit
    code is 0 where nothing costs quality or time, and 1 where something does.

    For example:

        mezzotint doctor models/solar-cells --data cells
        mezzotint doctor sd15.safetensors --data photos --lora cracks.safetensors@0.8
        mezzotint doctor cracks.safetensors --base models/sd15 --data photos
        mezzotint doctor runs/my-training
        mezzotint doctor models/solar-cells --only speed --json
    """

    path: tyro.conf.Positional[Path]
    """A model, an adapter, a latent or text cache, or a run folder."""
    data: Path | None = None
    """A folder of images such as the model was trained on, with captions where it has metadata.jsonl."""
    base: Path | None = None
    """The model that PATH was made from: an adapter or cache is examined on it, a model compared with it."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE@WEIGHT: an adapter on the model; may be given several times."""
    cache: Path | None = None
    """The folder or file of latent and text caches that the model was trained on."""
    trace: Path | None = None
    """The run folder of the model's training, or the doctor.json of a former examination, to compare the speed."""
    images: int = 24
    """How many images of --data are looked at."""
    seed: int = 0
    """Where all chance comes from."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A probe by name, to run it alone; may be given several times."""
    out: Path | None = None
    """The folder for the page; out/doctor/NAME after PATH where left out."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The number format of the network."""
    prediction: str | None = None
    """What the network predicts, epsilon or velocity, where the model does not say (Stable Diffusion 2 files)."""
    distilled: Literal["yes", "no"] | None = None
    """Whether a FLUX.2 klein is the distilled model, where its file does not say."""
    parts: Path | None = None
    """A folder with what a single file lacks: vae, text_encoder, tokenizer."""
    json: bool = False
    """Print the diagnosis as JSON."""


def run(options: Options) -> int:
    """Examine, write the page, print the answer; the exit code is 1 where a cause was found."""
    from mezzotint.doctor.probes import PROBES

    for name in options.only:
        if name not in PROBES:
            raise InputError(f"no probe '{name}'{nearest(name, PROBES)}. There are {', '.join(PROBES)}.")
    if options.images < 1:
        raise InputError(f"--images must be at least 1, not {options.images}")

    import torch

    from mezzotint.cli.generate import weighted
    from mezzotint.doctor import report
    from mezzotint.doctor import subject as subjects
    from mezzotint.doctor.diagnose import refused
    from mezzotint.families.devices import device_of

    subject = subjects.recognise(
        options.path, data=options.data, base=options.base, cache=options.cache, trace=options.trace,
        lora=[weighted(text, "--lora") for text in options.lora],
    )  # fmt: skip
    if subject.limited and (beyond := [name for name in options.only if name not in subject.probes]):
        raise InputError(f"--only {beyond[0]}: {subject.limited}")
    names = [name for name in PROBES if name in (options.only or subject.probes)]
    if not options.json:
        for remark in subject.remarks:
            print(f"mezzotint: {remark}", file=sys.stderr)
    with console.progress(quiet=options.json) as bars:
        at = options.path.resolve()
        out = options.out or OUT / (at.stem if at.is_file() else at.name)
        out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is refused before the work
        try:
            case = subjects.opened(
                subject, count=options.images, seed=options.seed, device=str(device_of(options.device)),
                dtype=getattr(torch, options.dtype), say=teller(bars, names, quiet=options.json),
                prediction=options.prediction, distilled=console.answer(options.distilled), parts=options.parts,
            )  # fmt: skip
            if subject.model is not None:
                case = replace(case, foresee=foreseen(options, subject.model))
            found = subjects.examined(subject, case, names)
        except NotFinite as reason:
            found = refused(options.path, reason)
    page = report.write(found, out)
    if options.json:
        console.print_json({**report.to_dict(found), "page": str(page)})
    else:
        print("\n".join(report.lines(found, page)))
    return 0 if found.healthy else 1


def foreseen(options: Options, model: Path) -> Foresee:
    """What the planner says of one picture on this machine, adapters apart; nothing where the machine is not measured
    or the model cannot be planned."""

    def foresee(size: tuple[int, int]) -> Planned | None:
        from mezzotint.cli import plan as planning
        from mezzotint.doctor.planned import Planned
        from mezzotint.families.family import Asked
        from mezzotint.families.load import named
        from mezzotint.plan import subject
        from mezzotint.plan.generating import Job, generating

        said = None if options.prediction is None else named(options.prediction)
        try:
            on = planning.machine(options.device)
            planned = subject.find(str(model), Asked(said, console.answer(options.distilled)), options.parts)
            phases = generating(planned, Job(size=size, dtype=options.dtype), on).phases
        except InputError:
            return None
        spent = {phase.name: on.seconds(phase.traced.calls) for phase in phases}
        if None in spent.values():
            return None
        texts = [seconds or 0.0 for name, seconds in spent.items() if name.startswith("text.")]
        step = next(phase for phase in phases if phase.name == "denoise")
        return Planned(spent["denoise"] or 0.0, on.by_kind(step.traced.calls), sum(texts), spent["decode"] or 0.0,
                       max(phase.memory for phase in phases) + on.base)  # fmt: skip

    return foresee


def teller(bars: Progress, names: list[str], *, quiet: bool) -> Callable[[str], None]:
    """Shows which probe looks, how far the whole is and how long it may take: as a bar, or as lines elsewhere."""
    task = bars.add_task("loading", total=len(names))
    shares = [SHARES.get(name, SMALL) for name in names]
    began = time.monotonic()

    def say(what: str) -> None:
        nonlocal began
        if what not in names:  # a step inside of a probe, or before the first
            bars.update(task, description=what)
            return
        place = names.index(what)
        if place == 0:
            began = time.monotonic()
        done, spent = sum(shares[:place]), time.monotonic() - began
        left = f", about {spent / done * sum(shares[place:]):.0f} s more" if done >= 1 else ""
        bars.update(task, completed=place, description=f"{what}{left}")
        if not quiet and bars.disable:
            print(f"mezzotint: {what}, {place + 1} of {len(names)}{left}", file=sys.stderr, flush=True)

    return say
