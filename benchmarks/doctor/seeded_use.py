"""Faults of use: samplers and steps, number formats, adapters beside the weights, hooks, threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from patient import Patient, Unfit, contract, scheduler
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.doctor.case import Case

Seed = Callable[[Patient, Random], Patient]
SLOWER = 1.3  # times float32 from which a number format is a fault


def sampled(sampler: str, *steps: int) -> Seed:
    """Another sampler and another number of steps in the contract."""

    def seed(patient: Patient, rng: Random) -> Patient:
        facts = {"sampler": sampler, "steps": rng.choice(steps)}
        contract(patient, lambda told: told["sampling"].update({k: v for k, v in facts.items() if v}))
        return patient

    return seed


def few_steps(*steps: int) -> Seed:
    """So few steps of the model's own sampler."""

    def seed(patient: Patient, rng: Random) -> Patient:
        contract(patient, lambda facts: facts["sampling"].update(steps=rng.choice(steps)))
        return patient

    return seed


def scheduler_of(kind: str, **changes: Any) -> Seed:
    """The scheduler's class in a published file."""

    def seed(patient: Patient, rng: Random) -> Patient:
        scheduler(patient, _class_name=kind, **changes)
        return patient

    return seed


# Speed.


def seconds(dtype: torch.dtype) -> float:
    """Of a convolution and a matrix product in a format, the least of three."""
    x, kernel = torch.randn(8, 64, 16, 16, dtype=dtype), torch.randn(64, 64, 3, 3, dtype=dtype)
    a, b = torch.randn(512, 256, dtype=dtype), torch.randn(256, 256, dtype=dtype)
    found: list[float] = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(5):
            F.conv2d(x, kernel, padding=1)
            a @ b
        found.append(time.perf_counter() - start)
    return min(found[1:])


def slow_format(patient: Patient, rng: Random) -> Patient:
    """A half precision that this machine computes more slowly than float32."""
    plain = seconds(torch.float32)
    slow = [dtype for dtype in (torch.bfloat16, torch.float16) if seconds(dtype) > SLOWER * plain]
    allowed = patient.contract["dtypes"]["backbone"] if patient.is_native else ("bfloat16", "float16")
    slow = [dtype for dtype in slow if str(dtype).removeprefix("torch.") in allowed]
    if not slow:
        raise Unfit("this machine computes half precision as fast as float32")
    return replace(patient, dtype=rng.choice(slow))


def watched(patient: Patient, rng: Random) -> Patient:
    """Hooks that look at every layer's output in Python, as left over from debugging."""
    looked = rng.randint(2000, 6000)

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            values = [float(value) for value in output.detach().flatten()[:looked]]
            module.__dict__["seen"] = (min(values), max(values))

    def change(case: Case) -> Case:
        for module in case.bare.backbone.modules():
            if not list(module.children()):
                module.register_forward_hook(watch)
        return case

    return replace(patient, change=change)


def one_thread(patient: Patient, rng: Random) -> Patient:
    """One thread on a machine with several cores."""
    import os

    if (os.cpu_count() or 1) < 2:
        raise Unfit("this machine has one core")
    return replace(patient, crowded=True)
