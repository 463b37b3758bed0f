"""How much a fault really changes: files, the denoising error on the user's images, pictures, the codec, time."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from faults import Fault
from patient import Patient
from torch import Tensor

from mezzotint.doctor.case import Case
from mezzotint.doctor.readings import claimed, score
from mezzotint.errors import InputError
from mezzotint.families.model import working

IMAGES, DRAWN, MOST = 12, 4, 12  # images looked at, pictures drawn, steps taken for them
LEAST = {"error": 0.03, "picture": 0.1, "codec": 0.02, "time": 1.2}  # a change of any from which something happened


def verified(patient: Patient, fault: Fault, rng: Random) -> dict[str, Any]:
    """Numbers of the healthy model and of the faulty one, and a line that compares them."""
    before, files = looked_at(patient), digest(patient)
    patient = fault.seed(patient, rng)
    after = looked_at(patient)
    change: dict[str, float] = {"files": float(digest(patient) != files)}
    for key in ("error", "codec", "peak"):
        if key in before and key in after:
            change[key] = after[key] - before[key]
    if "time" in before and "time" in after:
        change["time"] = after["time"] / before["time"]
    if "pictures" in before and "pictures" in after:
        change["picture"] = distance(before["pictures"], after["pictures"])
    told = {key: round(value, 4) if math.isfinite(value) else str(value) for key, value in change.items()}
    happened = [k for k, least in LEAST.items() if k in change and not abs(change[k]) < least]
    if "refused" in after:
        happened.append("refused")
    numbers = {key: value for key, value in after.items() if key not in ("pictures",)}
    idle = fault.seen and not happened
    verdict = "NOTHING HAPPENS" if idle else ", ".join(happened) or "options or data"
    says = " ".join(f"{key} {value:+.3g}" for key, value in change.items() if key != "files")
    return {
        "change": told, "healthy": before.get("error"), "numbers": numbers, "happened": happened,
        "idle": idle, "says": f"{says} -> {verdict}",
    }  # fmt: skip


@torch.no_grad()
def looked_at(patient: Patient) -> dict[str, Any]:
    """log error of the reading that the files claim, pictures, the codec's error, its largest activation, time."""
    try:
        case = replace(patient, count=IMAGES).case()
    except InputError as reason:
        return {"refused": str(reason)}
    found: dict[str, Any] = {}
    if case.data is not None:
        try:
            if bool(case.latents.isfinite().all()):
                found["error"] = score(case, claimed(case)).mean.value
        except (InputError, ValueError, RuntimeError, IndexError) as reason:
            found["trouble"] = f"{type(reason).__name__}: {reason}"
        found["codec"], found["peak"] = codec(case)
    start = time.perf_counter()
    fewer = {"steps": min(MOST, case.bare.contract.sampling.steps)}
    try:
        drawn = case.draw(case.model, DRAWN, **fewer)
        found["pictures"] = drawn.pixels.clamp(-1, 1)
    except (InputError, ValueError, RuntimeError, IndexError) as reason:
        found["trouble"] = f"{type(reason).__name__}: {reason}"
    found["time"] = time.perf_counter() - start
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of pictures of the same wishes, in deviations of the first."""
    if a.shape != b.shape:
        return math.inf
    return float(((a - b).square().mean() / a.var()).sqrt().nan_to_num(math.inf))


def codec(case: Case) -> tuple[float, float]:
    """Root mean square error of pictures there and back, and the logarithm to base 10 of the largest activation."""
    peak = 0.0

    def watch(module: Any, args: Any, output: Any) -> None:
        nonlocal peak
        if isinstance(output, Tensor):
            peak = max(peak, float(output.abs().max()))

    hooks = [module.register_forward_hook(watch) for module in case.bare.codec.autoencoder.modules()]
    with working(case.bare, "codec"):
        back = case.bare.codec.decode(case.latents.clone())
        case.bare.codec.encode(case.images.pixels)
    for hook in hooks:
        hook.remove()
    return float((back - case.images.pixels).square().mean().sqrt()), math.log10(max(peak, 1e-9))


def digest(patient: Patient) -> str:
    """Of all files that the doctor would read, and the options."""
    whole = hashlib.sha256()
    adapters = [file for file, _ in patient.lora]
    for place in [patient.path, patient.data, patient.cache, patient.trace, *adapters]:
        every = sorted(p for p in Path(place).rglob("*") if p.is_file()) if place and place.is_dir() else [place]
        for file in every:
            whole.update(f"{file and file.name}".encode())
            if file is not None and file.is_file():
                whole.update(file.read_bytes())
    whole.update(repr((patient.lora, patient.dtype, patient.crowded)).encode())
    return whole.hexdigest()
