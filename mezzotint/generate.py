"""The only inference path: text or class to image, image to image and inpainting differ in data, not in code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint import images
from mezzotint.codec import inpaint_concat, mask_maps
from mezzotint.conditioning import Conditioning, stack
from mezzotint.errors import InputError
from mezzotint.families.adapt import adapted, ruled
from mezzotint.families.control import controlled, hints
from mezzotint.families.model import Engine, Model, Network, working
from mezzotint.families.settings import Settings, looked_at, settle, shared
from mezzotint.families.steering import steering
from mezzotint.guidance import skipped
from mezzotint.process import Estimate, Level, prediction
from mezzotint.request import Request, Result
from mezzotint.sampling import Denoise, Rng, bounded, sample, seeded_noise

if TYPE_CHECKING:
    from mezzotint.sampling.loop import Pin, Watch


def generate(model: Model, request: Request, watch: Watch | None = None, engine: Engine = nullcontext) -> Result:
    """Draw `request.count` images; `watch(index, step, x, history)` sees every step."""
    return generate_batch(model, [request], watch, engine)[0]


@torch.inference_mode()
def generate_batch(
    model: Model, requests: Sequence[Request], watch: Watch | None = None, engine: Engine = nullcontext
) -> list[Result]:
    """Draw the images of several requests as one batch; they may differ in prompt, label, seed, image and mask.

    An image depends on its own request alone, up to float rounding, whatever engine computes it. Raises InputError
    where a request does not fit the model or the others, and where the result is not finite.
    """
    model = ruled(model, requests[0].lora)
    settings = shared([settle(model, request) for request in requests])
    model = equipped(model, requests[0])
    counts = [request.count for request in requests]
    pixels, mask = canvas(model, requests, settings)  # (R, P, H, W), (R, 1, H, W), a row each request
    draws = [seeded_noise([request.seed + i for i in range(request.count)]) for request in requests]
    noise = start_noise(model, requests, settings, draws)  # (B, C, h, w)
    positive, negative = steering(model, requests, settings.guidance.scale, (settings.width, settings.height))
    seen = sights(model, requests, settings, pixels, mask)
    positive = replace(positive, **seen)
    negative = replace(negative, **seen) if negative else None

    x, pin = noise, None
    k = model.contract.inpaint
    if settings.strength is not None:
        with working(model, "codec"):
            known = spread(model.codec.encode(pixels), counts)  # (B, C, h, w)
        x = entrance(model, settings, known, noise)
        pin = pinned(model, known, noise, spread(mask, counts)) if settings.masked and k is None else None

    def rng(like: Tensor) -> Tensor:
        return torch.cat([draw(part) for draw, part in zip(draws, like.split(counts), strict=True)])

    with working(model, "backbone"), engine(model.backbone) as network:
        denoise = denoiser(model, settings, positive, negative, network)
        denoise = bounded(denoise, settings.sampler, model.contract.sampling.clip)
        latents = sample(denoise, x, settings.path, settings.sampler, rng, pin, watch)
    with working(model, "codec"):
        drawn = model.codec.decode(latents)  # (B, P, H, W)
    if not (latents.isfinite().all() and drawn.isfinite().all()):
        where = "codec" if latents.isfinite().all() else "backbone"
        raise InputError(f"the {where} gave numbers that are not finite: use --dtype float32, or other weights")

    if settings.masked:
        drawn = torch.where(spread(mask, counts) > 0, drawn, spread(pixels, counts))
    pictures = images.to_images(drawn)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [Result(pictures[b - n : b], latents[b - n : b]) for n, b in zip(counts, ends, strict=True)]


def equipped(model: Model, request: Request) -> Model:
    """The model with the request's adapters attached and its control networks in front; the given one is unchanged."""
    if request.lora or request.embedding:
        model = adapted(model, request.lora, request.embedding)
    if request.control:
        model = controlled(model, [(path, scale) for path, _, scale in request.control])
    return model


def sights(
    model: Model, requests: Sequence[Request], settings: Settings, pixels: Tensor, mask: Tensor
) -> dict[str, Any]:
    """What the network is shown beside the noise, as fields of a conditioning with a row each image."""
    counts = [request.count for request in requests]
    seen: dict[str, Any] = {}
    with working(model, "codec"):
        k = model.contract.inpaint
        if k is not None:
            maps = inpaint_concat(model.codec, pixels, mask, k, model.contract.mask_cells)
            seen["concat"] = spread(maps, counts).to(model.dtype)  # (B, k * k + C, h, w)
        if settings.references:
            pictures = [[looked_at(model, r.references[i]) for r in requests] for i in range(len(settings.references))]
            rows = [torch.cat([images.to_tensor(p, *p.size) for p in column]) for column in pictures]
            seen["references"] = tuple(
                spread(model.codec.encode(row.to(model.device)), counts).to(model.dtype) for row in rows
            )
        if settings.controls:
            size = settings.width, settings.height
            pictures = [[r.control[i][1] for r in requests] for i in range(len(settings.controls))]
            rows = [torch.cat([images.to_tensor(p, *size) for p in column]).to(model.device) for column in pictures]
            seen["hints"] = tuple(spread(row, counts).to(model.dtype) for row in hints(model, rows))
    return seen


def denoiser(
    model: Model, settings: Settings, positive: Conditioning, negative: Conditioning | None,
    network: Network | None = None,
) -> Denoise:  # fmt: skip
    """(x, level) -> Estimate with guidance: both branches in one call where it is active, else the positive alone.

    `network` computes the backbone; None: the backbone itself.
    """
    network = network or model.backbone
    both = stack([positive, negative]) if negative else None
    second = replace(positive, skip=settings.skip)
    guidance, meaning, channels = settings.guidance, model.process.prediction, model.codec.channels

    def denoise(x: Tensor, level: Level[float]) -> Estimate:
        inputs = x.to(model.dtype)  # (B, C, h, w)
        t = torch.full((len(x),), level.t, device=x.device)
        if both is None or not guidance.active(settings.progress(level)):
            conditional = network(inputs, t, positive).float()
            raw, variance = prediction.split(conditional, channels)
        else:
            outputs = network(torch.cat((inputs, inputs)), torch.cat((t, t)), both).float()  # (2 B, C, h, w)
            outputs, variances = prediction.split(outputs, channels)
            conditional, baseline = outputs.chunk(2)
            raw = guidance.combine(conditional, baseline)
            variance = None if variances is None else variances.chunk(2)[0]  # the conditional branch's
        if settings.skip and guidance.skips(settings.index(level), settings.total):
            raw = skipped(raw, conditional, network(inputs, t, second).float(), guidance.skip_scale)
        return prediction.estimate(meaning, raw, x, level, variance)

    return denoise


def entrance(model: Model, settings: Settings, known: Tensor, noise: Tensor) -> Tensor:
    """Where a path from an image begins: the image noised to its first level; noise alone to repaint in full."""
    if settings.masked and settings.strength == 1.0:
        return noise
    return model.process.noised(known, noise, settings.path.steps[0].now) / settings.path.start_scale


def pinned(model: Model, known: Tensor, noise: Tensor, mask: Tensor) -> Pin:
    """Keep known latents outside the mask, at whatever level (Lugmayr et al. 2022, eq. 8, with one noise for all)."""
    repaint = mask_maps(mask, model.codec.factor, 1, model.contract.mask_cells) > 0  # (B, 1, h, w)
    return lambda x, level: torch.where(repaint, x, model.process.noised(known, noise, level))


def canvas(model: Model, requests: Sequence[Request], settings: Settings) -> tuple[Tensor, Tensor]:
    """The picture of every request and where it is repainted; without an image grey, and repainted everywhere."""
    width, height, channels = settings.width, settings.height, model.codec.pixel_channels
    grey, everywhere = torch.zeros(1, channels, height, width), torch.ones(1, 1, height, width)
    pixels = [images.to_tensor(r.image, width, height, channels) if r.image else grey for r in requests]
    masks = [images.mask_to_tensor(r.mask, width, height) if r.mask else everywhere for r in requests]
    return torch.cat(pixels).to(model.device), torch.cat(masks).to(model.device)


def spread(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """From one row a request to one row an image."""
    return rows.repeat_interleave(torch.tensor(counts, device=rows.device), 0)


def start_noise(model: Model, requests: Sequence[Request], settings: Settings, draws: Sequence[Rng]) -> Tensor:
    """Unit noise (B, C, h, w): what a request brings itself, else drawn from its seeds."""
    factor = model.codec.factor
    shape = (model.codec.channels, settings.height // factor, settings.width // factor)
    rows: list[Tensor] = []
    for request, draw in zip(requests, draws, strict=True):
        row, own = torch.empty(request.count, *shape, device=model.device), request.start_noise
        if own is not None and own.shape != row.shape:
            raise InputError(f"the start noise is {tuple(own.shape)}, this request needs {tuple(row.shape)}")
        rows.append(draw(row) if own is None else own.to(row))
    return torch.cat(rows)
