"""Training methods as graphs: what trains, what is frozen beside it, and the loss of a piece of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.adapters.targets import choose
from mezzotint.adapters.training import Settings, trainable
from mezzotint.backbones.controlnet import Controlled
from mezzotint.backbones.initialise import from_base
from mezzotint.conditioning import Conditioning, stack
from mezzotint.errors import InputError
from mezzotint.plan import formats
from mezzotint.plan.codec_methods import patch_pca, vae
from mezzotint.plan.encoders import spoken
from mezzotint.plan.generating import text_dtype
from mezzotint.plan.objective import Critics, Network, Prepared, Training, bytes_of, noised, objective
from mezzotint.plan.subject import Subject
from mezzotint.plan.trace import imaginary, outlined
from mezzotint.process import Level, prediction
from mezzotint.sampling import LCM
from mezzotint.text.rows import with_rows


def full(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """Every weight of the backbone, in float32."""
    network = imaginary(subject.outline("backbone"), torch.float32, trains=True)
    weight = bytes_of(network)
    return Prepared([network], objective(subject, size, network), {"backbone": weight}, weight, weight)


def lora(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """Two thin matrices beside each chosen one; the base is frozen in the recipe's dtype."""
    dtype = formats.DTYPES[job.dtype]
    network = _adapted(subject, job, dtype)
    added = bytes_of(network, moving=True)
    weights = {"backbone, frozen": bytes_of(network) - added, "adapter": added}
    return Prepared([network], objective(subject, size, _calling(network, dtype)), weights, added, added)


def dreambooth(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """The whole or a LoRA; with prior images both losses are in one sum."""
    inner = (lora if job.rank else full)(subject, job, size, critics)
    if not job.prior:
        return inner
    return replace(inner, loss=lambda count: inner.loss(count) + inner.loss(count))


def textual_inversion(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """Rows of the text encoders' tables; the gradient passes the whole backbone and the encoders."""
    text = subject.contract.text
    if text is None or not subject.encoders:
        raise InputError(f"{subject.name} reads no text, so there is no encoder for a new word")
    dtype = formats.DTYPES[job.dtype]
    backbone = imaginary(subject.outline("backbone"), dtype)
    encoders = [imaginary(subject.outline(e.folder), text_dtype(subject, dtype)) for e in subject.encoders]
    worded: list[nn.Module] = []
    for encoder, network in zip(subject.encoders, encoders, strict=True):
        table: Any = network.get_submodule(encoder.table)
        rows = torch.empty(job.vectors, table.weight.shape[1])
        twin = with_rows(network, encoder.table, rows, table.weight.shape[0])
        learned: Any = twin.get_submodule(encoder.table)
        learned.rows.requires_grad_(True)
        worded.append(twin)

    def read(x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        said = spoken(subject.encoders, worded, len(x), text.width, text.pooled, subject.zeros)
        told = replace(told, tokens=said.tokens, pooled=said.pooled)
        told = told.map(lambda part: part.to(dtype) if part.is_floating_point() else part)
        return backbone(x.to(dtype), t, told)

    rows = sum(bytes_of(network, moving=True) for network in worded)
    weights = {
        "backbone, frozen": bytes_of(backbone),
        **{
            f"text.{e.folder}, frozen": bytes_of(network) for e, network in zip(subject.encoders, encoders, strict=True)
        },
    }
    loss = objective(subject, size, read)
    return Prepared([*worded], loss, weights, rows, rows, [backbone], reads_text=True)


def controlnet(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """A copy of the base's encoder with its stem and zero convolutions, in front of the frozen base."""
    dtype, latent = formats.DTYPES[job.dtype], subject.contract.latent
    base = imaginary(subject.outline("backbone"), dtype)
    with outlined():
        made: Any = from_base(subject.outline("backbone"), latent.factor, {})
    control: Any = imaginary(made, torch.float32, trains=True)
    for layer in getattr(control, "unread", ()):
        layer.requires_grad_(False)
    network = Controlled(base, [control], [1.0])
    width, height = size
    shown = (
        (3, height, width)
        if control.hint == "pixels"
        else (latent.channels, height // latent.factor, width // latent.factor)
    )

    def hinted(x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        return network(x, t, replace(told, hints=(torch.zeros(len(x), *shown),)))

    weight = bytes_of(control)
    weights = {"backbone, frozen": bytes_of(base), "control": weight}
    loss = objective(subject, size, hinted)
    return Prepared([control], loss, weights, weight, weight, [base])


def lcm(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """The student once with gradients; teacher, guided in one call, and target without."""
    dtype, facts = formats.DTYPES[job.dtype], subject.contract.guidance
    teacher = imaginary(subject.outline("backbone"), dtype)
    if job.rank:  # beside the teacher's own weights, which are counted once
        target = student = _adapted(subject, job, dtype)
        own = bytes_of(student, moving=True)
    else:
        student = imaginary(subject.outline("backbone"), torch.float32, trains=True)
        own = bytes_of(student)
        target = imaginary(subject.outline("backbone"), torch.float32) if job.ema else student
    guided = not (facts.distilled or facts.embedded) and facts.dropout > 0
    process, width, height = subject.contract.process, *size
    sampler, latent = LCM(), subject.contract.latent

    def raw(network: nn.Module, x: Tensor, level: Level[Tensor], told: Conditioning) -> Tensor:
        inner = next(network.parameters()).dtype
        told = told.map(lambda part: part.to(inner) if part.is_floating_point() else part)
        return prediction.split(network(x.to(inner), level.t, told).float(), latent.channels)[0]

    def consistent(said: Tensor, x: Tensor, level: Level[Tensor]) -> Tensor:
        skip, out = (scale.view(-1, 1, 1, 1) for scale in sampler.scalings(level.t))
        return skip * x + out * prediction.estimate(process.prediction, said, x, level).clean

    def loss(count: int) -> Tensor:
        clean, noise, level = noised(subject, count, size)
        x = process.noised(clean, noise, level)
        told = subject.conditioning(count, (width, height), torch.float32)
        with torch.no_grad():
            if guided:
                twice = Level(level.t.repeat(2), level.alpha, level.sigma)
                both = raw(teacher, torch.cat((x, x)), twice, stack([told, replace(told)]))
                conditional, baseline = both.chunk(2)
                said = baseline + 5.0 * (conditional - baseline)
            else:
                said = raw(teacher, x, level, told)
            parts = prediction.estimate(process.prediction, said, x, level)
            lower = level.alpha * parts.clean + level.sigma * parts.noise
            theirs = consistent(raw(target, lower, level, told), lower, level)
        ours = consistent(raw(student, x, level, told), x, level)
        squared = (ours - theirs) ** 2
        return (squared / ((squared + 1e-6).sqrt() + 1e-3)).flatten(1).mean(1).mean()

    weights = {"teacher": bytes_of(teacher), "student": own}
    return Prepared([student], loss, weights, own, own, [teacher, target])


METHODS: Mapping[str, Callable[[Subject, Training, tuple[int, int], Critics | None], Prepared]] = {
    "full": full, "vae": vae, "patch-pca": patch_pca, "lora": lora, "dreambooth": dreambooth,
    "textual-inversion": textual_inversion, "controlnet": controlnet, "lcm": lcm,
}  # fmt: skip


def _adapted(subject: Subject, job: Training, dtype: torch.dtype) -> nn.Module:
    """The base with low-rank changes that train."""
    outline = subject.outline("backbone")
    with outlined():
        adapted = trainable(outline, choose(outline, job.targets), Settings(job.rank or 16), 0)
    return imaginary(adapted, dtype, trains=None)


def _calling(network: nn.Module, dtype: torch.dtype) -> Network:
    """What the network reads comes in the format of the frozen weights, the clock apart."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return lambda x, t, told: network(cast(x), t, told.map(cast))
