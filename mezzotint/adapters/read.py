"""From the tensors of a file to an adapter for the model at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mezzotint.adapters import header
from mezzotint.adapters.family import family
from mezzotint.adapters.keys import Stored, gather, listing
from mezzotint.adapters.lowrank import Adapter, Facts, LowRank
from mezzotint.adapters.places import KOHYA, PEFT, Place, Places, Row, Shapes, divided
from mezzotint.errors import InputError


def describe(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Facts:
    """What a file says of itself, without a model."""
    return _facts(tensors, metadata, gather(tensors))


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    modules: Mapping[str, Shapes],
    layouts: Mapping[str, Sequence[Row]] | None = None,
) -> Adapter:
    """An adapter whose every matrix has its place in a model.

    `metadata` is the header of the safetensors file (for a folder of peft, {"lora_adapter_metadata": the text of its
    adapter_config.json}); `modules` the model's modules by part (`modules_of`), `layouts` the key maps of parts that
    files may name by their original layout. InputError where anything has no place: an adapter that is applied in part
    is the commonest cause of "it has no effect".
    """
    stored = gather(tensors)
    facts = _facts(tensors, metadata, stored)
    places, settings = Places(modules, layouts or {}), header.settings(metadata)
    parts: dict[str, list[LowRank]] = {}
    lost: list[str] = []
    misshapen: list[str] = []
    for item in stored:
        place = places.find(item.stem)
        if place is None:
            lost.append(item.stem)
            continue
        shapes = modules[place.part]
        found = [_fitted(low, shapes[low.module]) for low in _spread(_strengthened(item, settings), place)]
        if not found or not all(_fits(low, shapes[low.module]) for low in found):
            misshapen.append(item.stem)
        parts.setdefault(place.part, []).extend(found)
    if lost or misshapen:
        raise InputError(_misfit(facts, lost, misshapen))
    doubled = [f"{part}.{low.module}" for part, lows in parts.items() for low in lows]
    if len(doubled) != len(set(doubled)):
        twice = sorted({name for name in doubled if doubled.count(name) > 1})
        raise InputError(f"the adapter names {listing(twice, 'modules twice')}, in two spellings.")
    return Adapter({part: tuple(lows) for part, lows in parts.items()}, facts, dict(metadata))


def _misfit(facts: Facts, lost: list[str], misshapen: list[str]) -> str:
    problems = [
        listing(lost, f"of {facts.modules} modules have no place in this model"),
        listing(misshapen, f"of {facts.modules} modules have another shape here"),
    ]
    trained = f" It was trained on {facts.base}." if facts.base else ""
    made_for = f"By its widths it is for {facts.family}." if facts.family else "Use it with the model it was made for."
    return f"the adapter does not fit: {'; '.join(p for p in problems if p)}.\n{made_for}{trained}"


def _facts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], stored: Sequence[Stored]) -> Facts:
    settings = header.settings(metadata)
    scales = {low.scale for item in stored for low in [_strengthened(item, settings)]}
    return Facts(
        format=_format(stored, tensors),
        modules=len(stored),
        ranks=tuple(sorted({len(item.down) for item in stored})),
        scales=tuple(sorted(scales)),
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")),
        magnitudes=any(item.magnitude is not None for item in stored),
        family=family(stored),
        base=header.base(metadata),
        prediction=header.prediction(metadata),
        words=header.words(metadata),
    )


def _format(stored: Sequence[Stored], tensors: Mapping[str, Tensor]) -> str:
    stem = stored[0].stem
    if divided(stem)[0] in KOHYA:
        return "kohya"
    if stem.startswith(PEFT):
        return "peft"
    if stem.startswith(("diffusion_model.", "model.diffusion_model.")):
        return "original"
    return "diffusers" if any(".lora_A." in key for key in tensors) else "diffusers, before peft"


def _strengthened(item: Stored, settings: Mapping[str, header.Settings]) -> LowRank:
    """The matrices with their alpha: the tensor beside them, or else the header, or else none."""
    prefix, name = divided(item.stem)
    said = settings.get(prefix) or settings.get("") or header.Settings()
    alpha = said.alpha_of(name) if item.alpha is None else item.alpha
    if alpha is not None and not math.isfinite(alpha):
        raise InputError(f"{item.stem}: alpha is {alpha}, so the file is damaged.")
    return LowRank(item.stem, item.down, item.up, alpha, said.stabilised and item.alpha is None, item.magnitude)


def _spread(low: LowRank, place: Place) -> list[LowRank]:
    """One change for each module of the place: `down` is shared, `up` and the magnitude are divided as the rows are.

    None at all where the rows cannot be divided.
    """
    if place.change is None:
        return [_named(low, place.modules[0], low.up, low.magnitude)]
    try:
        ups = place.change.split(low.up.flatten(1))
        magnitudes = (None,) * len(ups) if low.magnitude is None else place.change.split(low.magnitude)
    except (InputError, RuntimeError, ValueError):
        return []
    return [_named(low, *three) for three in zip(place.modules, ups, magnitudes, strict=True)]


def _named(low: LowRank, module: str, up: Tensor, magnitude: Tensor | None) -> LowRank:
    return LowRank(module, low.down, up, low.alpha, low.stabilised, magnitude)


def _fitted(low: LowRank, shape: tuple[int, ...]) -> LowRank:
    """A pointwise convolution and a linear layer are the same map: stored as one, wanted as the other."""
    down, up = _kernel(low.down, len(shape)), _kernel(low.up, len(shape))
    return LowRank(low.module, down, up, low.alpha, low.stabilised, low.magnitude)


def _kernel(matrix: Tensor, axes: int) -> Tensor:
    if matrix.ndim == 2 < axes:
        return matrix[(...,) + (None,) * (axes - 2)]
    pointwise = matrix.ndim > axes == 2 and all(size == 1 for size in matrix.shape[2:])
    return matrix.flatten(1) if pointwise else matrix


def _fits(low: LowRank, shape: tuple[int, ...]) -> bool:
    rank, ones = low.rank, torch.Size([1] * (len(shape) - 2))
    return low.down.shape == (rank, *shape[1:]) and low.up.shape == (shape[0], rank, *ones)
