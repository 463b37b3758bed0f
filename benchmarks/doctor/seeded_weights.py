"""Faults of weights: not finite, zero, fresh, damaged, coarse, not averaged, copied, of another checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from patient import WEIGHTS, Patient, Unfit, backbone, generator, part, resealed, tensors, traced, uniform
from safetensors.torch import load_file, save_file
from torch import Tensor

Seed = Callable[[Patient, Random], Patient]
Tensors = dict[str, Tensor]
BLOCK = re.compile(r"(.*?(?:resnets|attentions)\.\d+|(?:transformer_blocks)\.\d+)\.")
# The last layer of each residual branch, or what lets the branch through: zero at the start of a training.
LAST = (".conv2.weight", ".conv2.bias", ".to_out.0.weight", ".to_out.0.bias", ".proj_out.weight", ".proj_out.bias",
        ".norm1.linear.weight", ".norm1.linear.bias", ".norm1_context.linear.weight",
        ".norm1_context.linear.bias")  # fmt: skip


def blocks(found: Tensors) -> dict[str, list[str]]:
    """Names of tensors by the residual or attention block that they belong to."""
    by: dict[str, list[str]] = {}
    for name in found:
        if match := BLOCK.match(name):
            by.setdefault(match[1], []).append(name)
    return by


def matrices(found: Tensors) -> list[str]:
    """Weights of some size."""
    return [
        name for name, tensor in found.items() if tensor.ndim > 1 and tensor.numel() >= 1024 and "embed" not in name
    ]


def not_finite(patient: Patient, rng: Random) -> Patient:
    """A few numbers of one or two tensors are not finite."""
    with backbone(patient) as found:
        for name in rng.sample(matrices(found), rng.choice((1, 2))):
            flat = found[name].view(-1)
            flat[torch.randint(len(flat), (rng.randint(1, 20),), generator=generator(rng))] = rng.choice(
                (float("nan"), float("inf"), -float("inf"))
            )
    return patient


def zero(patient: Patient, rng: Random) -> Patient:
    """The last layers of some blocks are zero, as they start: those blocks never trained."""
    with backbone(patient) as found:
        by = blocks(found)
        for block in rng.sample(sorted(by), max(2, round(len(by) * uniform(rng, 0.3, 0.6)))):
            for name in by[block]:
                if name.endswith(LAST):
                    found[name] = torch.zeros_like(found[name])
    return patient


def fresh(patient: Patient, rng: Random) -> Patient:
    """Some blocks as PyTorch draws them: their keys did not match when the checkpoint was read."""
    draw = generator(rng)
    with backbone(patient) as found:
        by = blocks(found)
        for block in rng.sample(sorted(by), 1 if len(by) < 8 else rng.choice((1, 2))):
            for name in by[block]:
                tensor = found[name]
                if tensor.ndim > 1:
                    bound = tensor[0].numel() ** -0.5
                    found[name] = (2 * torch.rand(tensor.shape, generator=draw) - 1) * bound
                elif "norm" in name and name.endswith("weight"):
                    found[name] = torch.ones_like(tensor)
                else:
                    found[name] = torch.zeros_like(tensor)
    return patient


def shuffled(patient: Patient, rng: Random) -> Patient:
    """The entries of a few weights in another order: a wrong stride, or rows and columns mistaken."""
    draw = generator(rng)
    with backbone(patient) as found:
        for name in rng.sample(matrices(found), rng.choice((2, 3, 4))):
            tensor = found[name]
            found[name] = tensor.flatten()[torch.randperm(tensor.numel(), generator=draw)].view_as(tensor)
    return patient


def transposed(patient: Patient, rng: Random) -> Patient:
    """Square matrices transposed, or kernels mirrored, as by a converter from another framework."""
    with backbone(patient) as found:
        square = [n for n in matrices(found) if found[n].ndim == 2 and found[n].shape[0] == found[n].shape[1]]
        kernels = [name for name in matrices(found) if found[name].ndim == 4 and found[name].shape[-1] == 3]
        for name in rng.sample(square, max(1, len(square) // 3)):
            found[name] = found[name].T
        for name in rng.sample(kernels, len(kernels) // 3):
            found[name] = found[name].transpose(2, 3)
    return patient


def scaled(patient: Patient, rng: Random) -> Patient:
    """The weights of some blocks times a factor: merged twice, or a scale that was not divided out."""
    factor = uniform(rng, 2.5, 5.0) ** rng.choice((-1, 1))
    with backbone(patient) as found:
        by = blocks(found)
        for block in rng.sample(sorted(by), max(1, len(by) // 4)):
            for name in by[block]:
                if found[name].ndim > 1:
                    found[name] *= factor
    return patient


def noisy(patient: Patient, rng: Random) -> Patient:
    """Every weight moved at random by a share of its tensor's deviation: a merge gone wrong."""
    share, draw = uniform(rng, 0.3, 0.7), generator(rng)
    with backbone(patient) as found:
        for name in matrices(found):
            tensor = found[name]
            found[name] = tensor + share * tensor.std() * torch.randn(tensor.shape, generator=draw)
    return patient


def rounded(bits: int) -> Seed:
    """Each weight on 2^bits - 1 even levels up to its tensor's largest number, as naive integer quantisation does."""

    def seed(patient: Patient, rng: Random) -> Patient:
        top = 2 ** (bits - 1) - 1
        with backbone(patient) as found:
            for name in matrices(found):
                step = found[name].abs().max() / top
                found[name] = (found[name] / step).round() * step
        return patient

    return seed


def eighth(kind: torch.dtype) -> Seed:
    """Cast to a format of eight bits without a scale, and back."""

    def seed(patient: Patient, rng: Random) -> Patient:
        with backbone(patient) as found:
            for name in matrices(found):
                found[name] = found[name].to(kind).float()
        return patient

    return seed


def checkpoint(patient: Patient) -> Path:
    assert patient.trace is not None
    found = sorted((patient.trace / "checkpoints").glob("step-*"))
    if not found:
        raise Unfit("its run kept no checkpoint")
    return found[-1]


def live(patient: Patient) -> Tensors:
    """The weights that were trained, of which the run saved the average."""
    place = checkpoint(patient)
    average = load_file(place / "ema.safetensors")
    for file in sorted(place.glob("*.safetensors")):
        if file.stem != "ema" and not file.stem.endswith(".optimiser"):
            found = load_file(file)
            if found.keys() == average.keys():
                return found
    raise Unfit("its checkpoint has no weights of the same names as their average")


def not_averaged(patient: Patient, rng: Random) -> Patient:
    """The trained weights were saved, not their average."""
    patient = traced(patient)
    now = live(patient)
    with backbone(patient) as found:
        if found.keys() != now.keys():
            raise Unfit("its checkpoint has other names")
        found.update(now)
    return patient


def other_checkpoint(patient: Patient, rng: Random) -> Patient:
    """Weights of another moment of the same run under the contract of this one."""
    try:
        now = live(traced(patient))
    except Unfit:
        now = None
    with backbone(patient, sealed=False) as found:
        if now is not None:
            found.update(now)
        else:
            for name in matrices(found):
                found[name] = found[name] * (1 + 0.01 * torch.randn(found[name].shape, generator=generator(rng)))
    return replace(patient, trace=None)


def other_contract(patient: Patient, rng: Random) -> Patient:
    """contract.json of another model of the same codec and classes."""
    other = {"dit-clean": "unet-zsnr", "unet-zsnr": "dit-clean"}[patient.name]
    source = patient.nest.model(other) / "contract.json"
    if not source.is_file():
        raise Unfit(f"{other} is not there")
    (patient.path / "contract.json").write_text(source.read_text())
    return patient


def tied(patient: Patient, rng: Random) -> Patient:
    """Blocks copied over others of the same shape, by a key map with a slip in a number."""
    with backbone(patient) as found:
        by = blocks(found)
        shape = {
            block: tuple(sorted((name[len(block) :], tuple(found[name].shape)) for name in names))
            for block, names in by.items()
        }
        pairs = [(a, b) for a in by for b in by if a != b and shape[a] == shape[b]]
        if not pairs:
            raise Unfit("no two of its blocks have one shape")
        written: set[str] = set()
        for source, target in rng.sample(pairs, len(pairs)):
            if target not in written and source not in written and len(written) < 3:
                written.add(target)
                for name in by[source]:
                    found[target + name[len(source) :]] = found[name].clone()
    return patient


# What a training does.


def forgotten(patient: Patient, rng: Random) -> Patient:
    """Much further along the way of its own fine-tuning: far too long at far too high a rate."""
    assert patient.base is not None
    start, factor = load_file(part(patient.base) / WEIGHTS), uniform(rng, 6.0, 10.0)
    with backbone(patient) as found:
        for name in found:
            found[name] = start[name] + factor * (found[name] - start[name])
    return patient


def unchanged(patient: Patient, rng: Random) -> Patient:
    """A fine-tuning whose result is its base, number for number, in its checkpoint as in the finished model."""
    assert patient.base is not None
    patient = traced(patient)
    start = load_file(part(patient.base) / WEIGHTS)
    with tensors(part(patient.path) / WEIGHTS) as found:
        found.update(start)
    for file in sorted(checkpoint(patient).glob("*.safetensors")):
        if not file.stem.endswith(".optimiser"):
            save_file({name: start[name].contiguous() for name in load_file(file)}, file)
    resealed(patient)
    return patient
