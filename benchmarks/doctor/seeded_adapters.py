"""Faults of adapters: keys, base, strength, emptiness, missing parts, adapters against each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from patient import Patient, Unfit, copied, generator, tensors, uniform
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Seed = Callable[[Patient, Random], Patient]
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def file_of(patient: Patient) -> Path:
    return patient.lora[0][0]


def stems(found: dict[str, Tensor]) -> list[str]:
    return sorted(name.removesuffix(DOWN) for name in found if name.endswith(DOWN))


def silent(file: Path, notes: dict[str, str] | None = None) -> None:
    """The file without our contract in its header, as other trainers write it."""
    save_file(load_file(file), file, {"format": "pt", **(notes or {})})


def prefix_renamed(patient: Patient, rng: Random) -> Patient:
    """All keys under a prefix that no tool reads."""
    wrong = rng.choice(("lora_model_", "lora_dit_", "module_unet_", "unet_lora_"))
    with tensors(file_of(patient)) as found:
        for name in list(found):
            found[name.replace("lora_unet_", wrong).replace("lora_te_", wrong)] = found.pop(name)
    return patient


def half_renamed(patient: Patient, rng: Random) -> Patient:
    """The layers of some blocks under names of another network's: the adapter is applied in part or not at all."""
    with tensors(file_of(patient)) as found:
        every = stems(found)
        for stem in rng.sample(every, max(1, round(len(every) * uniform(rng, 0.3, 0.7)))):
            other = stem.replace("attentions", "attn_blocks").replace("self_attn", "attention")
            if other == stem:
                other = f"{stem}_proj"
            for end in (DOWN, UP, ALPHA):
                if stem + end in found:
                    found[other + end] = found.pop(stem + end)
    return patient


def layers_shuffled(patient: Patient, rng: Random) -> Patient:
    """An adapter of another base: its matrices say nothing to these layers."""
    with tensors(file_of(patient)) as found:
        alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for stem in stems(found):
            alike[(tuple(found[stem + DOWN].shape), tuple(found[stem + UP].shape))].append(stem)
        for group in alike.values():
            by = rng.randrange(1, max(2, len(group)))
            order = [*group[by:], *group[:by]]  # none stays where it was
            before = {stem: (found[stem + DOWN], found[stem + UP]) for stem in group}
            for stem, other in zip(group, order, strict=True):
                found[stem + DOWN], found[stem + UP] = before[other]
    silent(file_of(patient))
    return patient


def other_seed(patient: Patient, rng: Random) -> Patient:
    """The adapter that was trained on the model of another seed."""
    from nursery import ROOT

    every = sorted(ROOT.glob(f"seed-*/{patient.name}/kohya.safetensors"))
    others = [file for file in every if file.parent != patient.nest.model(patient.name)]
    if not others:
        raise Unfit("no other seed has such an adapter")
    target = copied(rng.choice(others), patient.scratch / "other.safetensors")
    silent(target)
    return replace(patient, lora=((target, 1.0),))


def for_velocity(patient: Patient, rng: Random) -> Patient:
    """An adapter that was trained on a model of another prediction, as its header says."""
    silent(file_of(patient), {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-v1/lora"})
    return layers_shuffled_loud(patient, rng)


def layers_shuffled_loud(patient: Patient, rng: Random) -> Patient:
    """As `layers_shuffled`, with the header as it is."""
    file = file_of(patient)
    with safe_open(file, "pt") as stored:
        said = stored.metadata()
    layers_shuffled(patient, rng)
    save_file(load_file(file), file, said)
    return patient


def alpha(change: Callable[[float, int], float]) -> Seed:
    """Another alpha in the file: W' = W + (alpha / rank) up down."""

    def seed(patient: Patient, rng: Random) -> Patient:
        with tensors(file_of(patient)) as found:
            for stem in stems(found):
                rank = len(found[stem + DOWN])
                now = float(found.get(stem + ALPHA, torch.tensor(float(rank))))
                found[stem + ALPHA] = torch.tensor(float(change(now, rank)))
        return patient

    return seed


def weighted(*weights: float) -> Seed:
    """The user gives the adapter another weight."""

    def seed(patient: Patient, rng: Random) -> Patient:
        return replace(patient, lora=((file_of(patient), rng.choice(weights)),))

    return seed


def emptied(low: float, high: float) -> Seed:
    """The second matrix at its start, or hardly away from it."""

    def seed(patient: Patient, rng: Random) -> Patient:
        factor = uniform(rng, low, high) if low else 0.0
        with tensors(file_of(patient)) as found:
            for name in found:
                if name.endswith(UP):
                    found[name] *= factor
        return patient

    return seed


def without_text(patient: Patient, rng: Random) -> Patient:
    """The text encoder's part was dropped when the file was converted; its header still speaks of it."""
    with tensors(file_of(patient)) as found:
        text = [name for name in found if name.startswith("lora_te")]
        if not text:
            raise Unfit("it has no part for the text encoder")
        for name in text:
            del found[name]
    notes = {"ss_network_module": "networks.lora", "ss_text_encoder_lr": "0.002", "ss_unet_lr": "0.002",
             "ss_network_train_unet_only": "False", "ss_network_args": "{}"}  # fmt: skip
    with safe_open(file_of(patient), "pt") as stored:
        said = stored.metadata()
    save_file(load_file(file_of(patient)), file_of(patient), {**(said or {}), **notes})
    return patient


def against(patient: Patient, rng: Random) -> Patient:
    """Two adapters of which the second takes back what the first does."""
    other = copied(file_of(patient), patient.scratch / "second.safetensors")
    share = uniform(rng, 0.8, 1.2)
    with tensors(other) as found:
        for name in found:
            if name.endswith(UP):
                found[name] *= -share
    return replace(patient, lora=((file_of(patient), 1.0), (other, 1.0)))


def doubled(patient: Patient, rng: Random) -> Patient:
    """The same adapter under two names, each at full weight or more."""
    other = copied(file_of(patient), patient.scratch / "copy.safetensors")
    weight = rng.choice((1.5, 2.0, 2.5))
    return replace(patient, lora=((file_of(patient), weight), (other, weight)))


def not_finite(patient: Patient, rng: Random) -> Patient:
    """Numbers that are not finite in a few matrices, as a diverged half-precision run leaves them."""
    with tensors(file_of(patient)) as found:
        for stem in rng.sample(stems(found), 3):
            matrix = found[stem + rng.choice((DOWN, UP))]
            matrix.view(-1)[rng.randrange(matrix.numel())] = rng.choice((float("nan"), float("inf")))
    return patient


def widened(patient: Patient, rng: Random) -> Patient:
    """The same change spread over rank 512: it draws the same picture, slowly, while it computes beside the weights."""
    wide, draw = 512, generator(rng)
    with tensors(file_of(patient)) as found:
        for stem in stems(found):
            down, up = found[stem + DOWN], found[stem + UP]
            rank = len(down)
            spread, _ = torch.linalg.qr(torch.randn(wide, rank, generator=draw))  # (512, r), orthonormal columns
            found[stem + DOWN] = (spread @ down.flatten(1)).unflatten(1, down.shape[1:])
            found[stem + UP] = (up.flatten(1) @ spread.T).view(len(up), wide, *up.shape[2:])
            now = float(found.get(stem + ALPHA, torch.tensor(float(rank))))
            found[stem + ALPHA] = torch.tensor(now / rank * wide)
    return patient
