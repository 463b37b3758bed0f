"""Plans for generating: text, denoising and decoding, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.families.settings import Settings, settle
from mezzotint.generate import denoiser
from mezzotint.plan import formats, kernels
from mezzotint.plan.encoders import Encoder
from mezzotint.plan.machines import Machine
from mezzotint.plan.phases import Phase, Plan, Sum
from mezzotint.plan.subject import Subject
from mezzotint.plan.trace import Traced, imaginary, imagined, trace
from mezzotint.process import Estimate
from mezzotint.request import Request
from mezzotint.sampling import bounded, sample, seeded_noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be generated, and how; what is None the model's contract answers."""

    size: tuple[int, int] | None = None  # width, height
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    images: int = 1
    batch: int = 1
    prompts: int = 1  # distinct ones
    dtype: str = "float32"
    quant: str | None = None
    offload: bool = False
    tile: int | None = None  # pixels: the picture is decoded in squares of this side

    def __post_init__(self) -> None:
        for name in ("images", "batch", "prompts", "steps", "tile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        formats.dtype_of(self.dtype)


def generating(subject: Subject, job: Job, machine: Machine) -> Plan:
    """The plan of a job; InputError where the model cannot serve it."""
    settings, asked = settled(subject, job)
    dtype = formats.DTYPES[job.dtype]
    size, rounds = (settings.width, settings.height), math.ceil(job.images / job.batch)
    weights = resident(subject, dtype, job.quant)
    workspace = kernels.on_cpu if machine.kind == "cpu" else None
    guided = settings.guidance.scale != 1.0 and not subject.contract.guidance.distilled
    phases: list[Phase] = []

    def there(part: str) -> Sum:
        """The weights on the device while a part works; with offload it is alone."""
        if job.offload and machine.kind != "cpu":
            return tuple((name, size) for name, size in weights if name.partition(".")[0] == part)
        return weights

    for encoder in subject.encoders:
        count = 1 + guided
        ran = subject.once((encoder.folder, count, text_dtype(subject, dtype), workspace),
                           lambda e=encoder, c=count: _text(subject, e, c, dtype, workspace))  # fmt: skip
        extra = _dequantised(subject.outline(encoder.folder), dtype, job.quant)
        said = f"{encoder.title}: {count} prompt{'s' if guided else ''} of {encoder.length} tokens"
        phases.append(Phase(f"text.{encoder.folder}", ran, job.prompts, there("text"), extra, said))
    ran = subject.once(("denoise", size, job.batch, guided, dtype, workspace),
                       lambda: _step(subject, settings, job.batch, guided, dtype, workspace))  # fmt: skip
    extra = _dequantised(subject.outline("backbone"), dtype, job.quant)
    said = f"one look of the network at {pictures(job.batch)}{', and at as many without the prompt' if guided else ''}"
    phases.append(Phase("denoise", ran, asked * rounds, there("backbone"), extra, said))
    tile, pieces = _tiles(size, job.tile)
    ran = subject.once(("decode", tile, job.batch, dtype, workspace),
                       lambda: _decode(subject, tile, job.batch, dtype, workspace))  # fmt: skip
    said = pictures(job.batch) if pieces == 1 else f"one of {pieces} tiles of {pictures(job.batch)}"
    phases.append(Phase("decode", ran, rounds * pieces, there("codec"), (), said))
    told = asdict(job) | {"size": f"{size[0]}x{size[1]}", "steps": len(settings.path.steps), "calls": asked,
                          "sampler": job.sampler or subject.contract.sampling.sampler,
                          "guidance": settings.guidance.scale, "device": machine.name}  # fmt: skip
    host = sum(size for _, size in weights) if job.offload and machine.kind != "cpu" else 0.0
    notes = list(subject.notes)
    if job.quant:
        notes.append(f"{job.quant} is counted, not run: this version computes with weights as they are stored")
    if job.tile:
        notes.append("decoding in tiles is counted, not run: this version decodes a picture whole")
    return Plan("generate", subject.name, subject.title, subject.contract.licence.weights, told, subject.parameters, 0,
                tuple(phases), machine, job.images, host, tuple(notes))  # fmt: skip


def settled(subject: Subject, job: Job) -> tuple[Settings, int]:
    """The settings of a job, and how often its sampler asks the network on the way."""
    width, height = job.size or (None, None)
    request = Request(width=width, height=height, steps=job.steps, sampler=job.sampler, guidance=job.guidance)
    settings = settle(subject.outlined(), request)
    facts = subject.contract.guidance
    scale = settings.guidance.scale
    if scale != 1.0 and not facts.embedded and (facts.distilled or facts.dropout <= 0.0):
        why = "is distilled" if facts.distilled else "was never trained without its condition"
        raise InputError(f"{subject.name} {why} and cannot be guided: leave guidance out, or say 1")
    asked = 0

    def free(x: Tensor, level: object) -> Estimate:
        nonlocal asked
        asked += 1
        return Estimate(x, x)

    walk = bounded(free, settings.sampler, subject.contract.sampling.clip)
    sample(walk, torch.zeros(1, 1, 1, 1), settings.path, settings.sampler, seeded_noise([0]))
    return settings, asked


def resident(subject: Subject, dtype: torch.dtype, quant: str | None = None) -> Sum:
    """Bytes of the weights by part: text.<folder>, backbone, codec."""
    text = text_dtype(subject, dtype)
    found = [(f"text.{e.folder}", float(formats.weights(subject.outline(e.folder), text, quant)))
             for e in subject.encoders]  # fmt: skip
    found.append(("backbone", float(formats.weights(subject.outline("backbone"), dtype, quant))))
    codec = subject.outline("codec")
    found.append(("codec", float(formats.weights(codec, codec_dtype(subject, dtype)))))
    return tuple((name, size) for name, size in found if size)


def text_dtype(subject: Subject, dtype: torch.dtype) -> torch.dtype:
    """MiniLM stays in float32; other encoders take the backbone's format."""
    return torch.float32 if any(encoder.kind == "bert" for encoder in subject.encoders) else dtype


def codec_dtype(subject: Subject, dtype: torch.dtype) -> torch.dtype:
    """The backbone's format where the autoencoder works in it, else float32."""
    name = str(dtype).removeprefix("torch.")
    return dtype if name in subject.contract.dtypes.codec else torch.float32


def pictures(count: int) -> str:
    """So many images, in words."""
    return "1 image" if count == 1 else f"{count} images"


def _run(act: Callable[[], object], network: nn.Module, workspace: Any) -> Traced:
    def quietly() -> object:
        with torch.no_grad():
            return act()

    return trace(quietly, (*network.parameters(), *network.buffers()), workspace=workspace)


def _text(subject: Subject, encoder: Encoder, count: int, dtype: torch.dtype, workspace: Any) -> Traced:
    outline = subject.outline(encoder.folder)
    with imagined():
        network = imaginary(outline, text_dtype(subject, dtype))
        return _run(lambda: encoder.read(network, torch.zeros(count, encoder.length, dtype=torch.long)), network,
                    workspace)  # fmt: skip


def _step(
    subject: Subject, settings: Settings, batch: int, guided: bool, dtype: torch.dtype, workspace: Any
) -> Traced:  # fmt: skip
    """What `generate` hands to the sampler, at the first level of the path."""
    latent, size = subject.contract.latent, (settings.width, settings.height)
    level = settings.path.steps[0].now
    subject.outline("backbone")
    with imagined():
        model = subject.model(dtype)

        def act() -> object:
            positive = subject.conditioning(batch, size, model.dtype)
            negative = replace(positive) if guided else None
            x = torch.zeros(batch, latent.channels, size[1] // latent.factor, size[0] // latent.factor)
            return denoiser(model, settings, positive, negative)(x, level)

        return _run(act, model.backbone, workspace)


def _tiles(size: tuple[int, int], tile: int | None) -> tuple[tuple[int, int], int]:
    """Width and height of what is decoded at once, and how many there are; tiles overlap by an eighth."""
    width, height = size
    if tile is None or tile >= max(size):
        return size, 1
    reach = tile - tile // 8
    return (min(tile, width), min(tile, height)), math.ceil(width / reach) * math.ceil(height / reach)


def _decode(subject: Subject, size: tuple[int, int], batch: int, dtype: torch.dtype, workspace: Any) -> Traced:
    latent = subject.contract.latent
    shape = batch, latent.channels, size[1] // latent.factor, size[0] // latent.factor
    subject.outline("codec")
    with imagined():
        model = subject.model(dtype, codec_dtype(subject, dtype))
        return _run(lambda: model.codec.decode(torch.zeros(shape)), model.codec.autoencoder, workspace)


def _dequantised(network: nn.Module, dtype: torch.dtype, quant: str | None) -> Sum:
    return (("one matrix in full", float(formats.largest(network, dtype))),) if quant else ()
