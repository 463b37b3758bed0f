"""What fits into a given memory, and what would have to give where a job does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mezzotint.plan.generating import Job, generating
from mezzotint.plan.machines import Machine
from mezzotint.plan.objective import Critics, Training
from mezzotint.plan.phases import Plan
from mezzotint.plan.subject import Subject
from mezzotint.plan.training import training


@dataclass(frozen=True, slots=True)
class Way:
    """A job with something given up, and what it takes then."""

    gives: tuple[str, ...]  # in words
    plan: Plan
    fits: bool


@dataclass(frozen=True, slots=True)
class Fit:
    """A job against a limit: each thing that can give alone, then added up until it fits."""

    plan: Plan
    limit: float
    fits: bool
    alone: tuple[Way, ...]
    together: Way | None  # the first sum that fits; None where none does

    @property
    def says(self) -> str:
        """The answer in a line."""
        if self.fits:
            return "fits"
        if self.together is None:
            return "does not fit, whatever gives"
        return f"fits with {', '.join(self.together.gives)}"


Give = tuple[str, dict[str, Any]]


def fitted(
    subject: Subject, job: Job | Training, machine: Machine, limit: float, critics: Critics | None = None
) -> Fit:  # fmt: skip
    """The job and its cheaper ways against a limit in bytes."""

    def made(changed: Job | Training) -> Plan:
        if isinstance(changed, Job):
            return generating(subject, changed, machine)
        return training(subject, changed, machine, critics)

    plan = made(job)
    if plan.peak <= limit:
        return Fit(plan, limit, True, (), None)
    offers = _of_job(subject, job, machine) if isinstance(job, Job) else _of_training(subject, job)
    alone = tuple(_way((offer,), job, made, limit) for offer in offers)
    together: Way | None = None
    taken: list[Give] = []
    for offer, way in zip(offers, alone, strict=True):
        before = together.plan.peak if together else plan.peak
        if way.fits:
            return Fit(plan, limit, False, alone, way)
        trial = _way((*taken, offer), job, made, limit)
        if trial.plan.peak < before:
            taken, together = _merged(taken, offer), trial
        if trial.fits:
            return Fit(plan, limit, False, alone, trial)
    return Fit(plan, limit, False, alone, None)


def _merged(taken: list[Give], offer: Give) -> list[Give]:
    """What is given so far, a later word on the same thing in place of an earlier one."""
    return [(name, change) for name, change in taken if not change.keys() & offer[1].keys()] + [offer]


def _way(offers: Sequence[Give], job: Any, made: Callable[[Any], Plan], limit: float) -> Way:
    kept: list[Give] = []
    for offer in offers:
        kept = _merged(kept, offer)
    changes = {key: value for _, change in kept for key, value in change.items()}
    plan = made(replace(job, **changes))
    return Way(tuple(name for name, _ in kept), plan, plan.peak <= limit)


def _of_job(subject: Subject, job: Job, machine: Machine) -> list[Give]:
    """What generating can give, the least painful first."""
    offers: list[Give] = []
    if job.batch > 1:
        offers.append(("a batch of 1", {"batch": 1}))
    if job.dtype == "float32" and "bfloat16" in subject.contract.dtypes.backbone:
        offers.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    if machine.kind != "cpu" and not job.offload:
        offers.append(("--offload", {"offload": True}))
    if job.tile is None and subject.contract.latent.factor > 1:
        offers.append(("decoding in tiles of 512", {"tile": 512}))
    if job.quant is None:
        offers.append(("weights in int8", {"quant": "int8"}))
    if job.quant not in ("int4", "nf4"):
        offers.append(("weights in 4 bits", {"quant": "nf4"}))
    return offers


def _of_training(subject: Subject, job: Training) -> list[Give]:
    """What training can give, the least painful first: exact ways, then formats, then the method."""
    offers: list[Give] = []
    if job.images > 1:
        offers.append(("latents made beforehand, one image at a time", {"images": 1}))
    if job.batch > job.accumulation:
        offers.append((f"accumulation = {job.batch}", {"accumulation": job.batch}))
    if not job.recompute:
        offers.append(("recompute = true", {"recompute": True}))
    if job.precision == "float32":
        offers.append(('precision = "bfloat16"', {"precision": "bfloat16"}))
    if job.ema:
        offers.append(("no moving average", {"ema": False}))
    if job.dtype == "float32" and job.method not in ("vae", "patch-pca"):
        offers.append(('base.dtype = "bfloat16"', {"dtype": "bfloat16"}))
    if job.method in ("full", "dreambooth") and job.rank is None and subject.contract.family != "native":
        offers.append(("LoRA of rank 16 in place of all weights", {"method": "lora", "rank": 16}))
    return offers
