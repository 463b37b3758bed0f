"""`mezzotint plan`: what a job will cost, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mezzotint.cli import console
from mezzotint.cli.options import priced
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from mezzotint.plan.fit import Fit
    from mezzotint.plan.generating import Job
    from mezzotint.plan.machines import Machine
    from mezzotint.plan.objective import Training
    from mezzotint.plan.phases import Plan
    from mezzotint.plan.subject import Subject


@dataclass(frozen=True)
class Options:
    """Say what generating or training will cost: parameters, operations, memory by part, time and money.

    MODEL is a folder or file, of which configurations and headers alone are read, or the name of a published model
    (sd1.5, sdxl, sd3.5-large, flux2-dev, dit-xl/2; a wrong name lists them all), for which no weights are needed.
    Several are compared. The real modules run on tensors without numbers, so the peak is that of the true graph: which
    weights are there while text is read, while denoising, while decoding, and the largest set of activations of each.

    For example:

        mezzotint plan sdxl --device a100-40 --dtype float16 --images 1000 --price-per-hour 2
        mezzotint plan sd1.5 models/mine --train lora full --batch 4 --device rtx-4090
        mezzotint plan sd3.5-medium flux2-klein-4b --fit 12GiB --dtype bfloat16 --device l4
        mezzotint plan --calibrate
    """

    model: tyro.conf.Positional[tuple[str, ...]] = ()
    """Model folders, files, or names of published models; with --fit none means all published ones."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; the size the model was trained at where left out."""
    steps: int | None = None
    """Steps of the sampler, or of training (1000 where left out)."""
    sampler: str | None = None
    """How to walk from noise to image; the model's own choice where left out."""
    guidance: float | None = None
    """How strongly to follow the prompt; 1 is no guidance."""
    batch: int = 1
    """Images at a time."""
    images: int | None = None
    """Images to make (1 where left out), or in the training data (32 where left out)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The number format of the weights; in training, of those that do not train."""
    quant: Literal["int8", "fp8", "int4", "nf4"] | None = None
    """Store the matrices of linear layers narrower."""
    device: str = "cpu"
    """cpu, an accelerator of this machine (cuda), or a public one: h100, h200, a100-40, a100-80, l40s, l4, t4,
    rtx-3090, rtx-4090, rtx-5090, mi300x."""
    offload: bool = False
    """Keep every part on the CPU but for the time that it works."""
    tile: int | None = None
    """Decode in tiles of so many pixels a side."""
    train: tuple[str, ...] = ()
    """Training methods in place of generating: full, vae, patch-pca, lora, dreambooth, textual-inversion, controlnet,
    lcm."""
    accumulation: int = 1
    """Training: pieces that a batch is computed in."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Training: the format that the network computes in."""
    recompute: bool = False
    """Training: activations are computed again in the backward pass."""
    no_average: bool = False
    """Training: without the moving average of the weights."""
    rank: int | None = None
    """Training: the rank of LoRA; dreambooth and lcm train adapters where it is said."""
    prior: bool = False
    """Training: dreambooth with as many images of the class in every step."""
    price_per_hour: float | None = None
    """What an hour of the device costs, for the cost of the job."""
    fit: str | None = None
    """A size of memory, like 12GiB: what fits, and what would have to give for what does not."""
    calibrate: bool = False
    """Measure this machine once, about half a minute, and keep the result for every later plan."""
    explain: bool = False
    """Print the sum behind every figure."""
    html: Path | None = None
    """Write a page with everything into this file."""
    prediction: str | None = None
    """What the network predicts, epsilon or velocity, where a file does not say (Stable Diffusion 2)."""
    distilled: Literal["yes", "no"] | None = None
    """Whether a FLUX.2 klein file is the distilled model."""
    parts: Path | None = None
    """A folder with what a single file lacks: vae, text_encoder."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    """Print the plans; the exit code is 1 where --fit was asked and something does not fit as it is."""
    from mezzotint.plan import report, words

    price = priced(options.price_per_hour)
    limit = None if options.fit is None else words.bytes_of(options.fit)
    if options.calibrate:
        measure(options)
        if not options.model:
            return 0
    names = options.model or (known() if options.fit else ())
    if not names:
        raise InputError("plan: name a model, such as sdxl or models/mine; `mezzotint plan --help` says more.")
    on = machine(options.device)
    wanted = [(subject, job) for subject in (subject_of(options, name) for name in names) for job in jobs(options)]
    plans: list[Plan] = []
    fits: list[Fit] = []
    with console.progress(quiet=options.json) as bars:
        bar = bars.add_task("planning", total=len(wanted))
        for subject, job in wanted:
            if limit is None:
                plans.append(planned(subject, job, on))
            else:
                fits.append(fitted(subject, job, on, limit))
            bars.advance(bar)
    if options.html:
        report.write(plans, fits, options.html, price)
    if options.json:
        console.print_json([report.to_dict(plan, price) for plan in plans] + [report.fit_dict(fit) for fit in fits])
    else:
        print("\n".join(written(plans, fits, price, options.explain)))
        if options.html:
            print(f"\n{options.html}")
    return int(any(not fit.fits for fit in fits))


def written(plans: list[Plan], fits: list[Fit], price: float | None, explain: bool) -> list[str]:
    """What the terminal shows: one plan in full, several side by side, what fits."""
    from mezzotint.plan import report

    found = report.compared(plans, price) if len(plans) > 1 else []
    if len(plans) == 1 or explain:
        for plan in plans:
            found += [""] * bool(found) + report.lines(plan, price, explain)
    for before, fit in zip([None, *fits], fits, strict=False):
        apart = bool(found) and not (fit.fits and (before is None or before.fits))  # tables stand apart
        found += [""] * apart + report.fit_lines(fit)
    return found


def jobs(options: Options) -> list[Job | Training]:
    """What is planned for each model; InputError for numbers that make no sense."""
    from mezzotint.plan.generating import Job
    from mezzotint.plan.objective import Training

    size = size_of(options.size)
    for name in ("batch", "steps", "images", "accumulation", "rank", "tile"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be a whole number of at least 1, not {value}")
    if not options.train:
        return [Job(
            size=size, steps=options.steps, sampler=options.sampler, guidance=options.guidance,
            images=options.images or options.batch, batch=options.batch, dtype=options.dtype, quant=options.quant,
            offload=options.offload, tile=options.tile,
        )]  # fmt: skip
    for name in ("sampler", "guidance", "quant", "tile"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is for generating: leave it out with --train")
    return [
        Training(
            method=method, size=size, steps=options.steps or 1000, batch=options.batch,
            accumulation=options.accumulation, images=options.images or 32, dtype=options.dtype,
            precision=options.precision, recompute=options.recompute, ema=not options.no_average,
            rank=options.rank or (16 if method == "lora" else None), prior=options.prior,
        )
        for method in options.train
    ]  # fmt: skip


def planned(subject: Subject, job: Job | Training, on: Machine) -> Plan:
    """The plan of a job."""
    from mezzotint.plan.generating import Job, generating
    from mezzotint.plan.training import training
    from mezzotint.training import adversary

    return generating(subject, job, on) if isinstance(job, Job) else training(subject, job, on, adversary)


def fitted(subject: Subject, job: Job | Training, on: Machine, limit: float) -> Fit:
    """The job against a limit."""
    from mezzotint.plan import fit
    from mezzotint.training import adversary

    return fit.fitted(subject, job, on, limit, adversary)


def subject_of(options: Options, name: str) -> Subject:
    """The model of a name or path, with what the user says where its files are silent."""
    from mezzotint.families.family import Asked
    from mezzotint.families.load import named
    from mezzotint.plan import subject

    said = None if options.prediction is None else named(options.prediction)
    return subject.find(name, Asked(said, console.answer(options.distilled)), options.parts)


def machine(device: str) -> Machine:
    """The device as it was measured, or a public one by its name; InputError lists those."""
    from mezzotint.families.devices import device_of
    from mezzotint.plan import calibrate, machines

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        return machines.accelerator(device)
    if kind == "cpu":
        return calibrate.kept("cpu") or calibrate.unmeasured()
    try:
        device_of(device)
    except InputError as error:
        raise InputError(f"--device {device} is not in this machine: name a public one, such as h100") from error
    found = calibrate.kept(device)
    if found is None:
        raise InputError(f"--device {device} was not measured yet: run mezzotint plan --calibrate --device {device}")
    return found


def measure(options: Options) -> None:
    """Measure the device and keep what was found."""
    from mezzotint.plan import calibrate

    with console.progress(quiet=options.json) as bars:
        bar = bars.add_task("measuring")
        found = calibrate.calibrate(options.device, lambda done, total: bars.update(bar, completed=done, total=total))
    path = calibrate.keep(found, options.device)
    if options.json:
        if not options.model:
            console.print_json({"machine": found.name, "file": str(path), "overhead": found.overhead})
    else:
        print(f"{found.name}: {found.source}; kept in {path}")


def known() -> tuple[str, ...]:
    """The published models."""
    from mezzotint.plan.zoo import ZOO

    return tuple(ZOO)


def size_of(text: str | None) -> tuple[int, int] | None:
    """Width and height from 512x384."""
    from mezzotint.cli import generate

    width, height = generate.size_of(text)
    return None if width is None or height is None else (width, height)
