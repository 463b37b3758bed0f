"""From what a request says to what a network reads: conditioning, and the baseline that guidance compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

import torch

from mezzotint.conditioning import Conditioning
from mezzotint.contract import ClassFacts
from mezzotint.errors import InputError
from mezzotint.families.model import Model, working
from mezzotint.request import Request


def steering(
    model: Model, requests: Sequence[Request], scale: float, size: tuple[int, int]
) -> tuple[Conditioning, Conditioning | None]:
    """The conditioning of every image (B = sum of counts) and its baseline; None where the model needs no baseline.

    Text is encoded once for each distinct prompt. A model with classes and without text takes its prompt as a class
    name. `size` is width and height in pixels. InputError where a request asks for what the model was not trained to
    read.
    """
    facts, guided = model.contract.guidance, answerable(model, requests, scale)
    wishes = [(request.prompt, request.label) for request in requests]
    against = [(request.negative, None) for request in requests] if guided else []
    rows = _read(model, wishes + against, negatives=len(against), chunked=_chunked(requests))
    if model.contract.picture:
        told = [picture(model.contract.picture, request, size, False) for request in requests]
        told += [picture(model.contract.picture, request, size, True) for request in requests if guided]
        rows = replace(rows, time_ids=torch.tensor(told))
    if facts.embedded:
        rows = replace(rows, guidance=torch.full((len(wishes) + len(against),), scale))
    counts = torch.tensor([request.count for request in requests])
    positive = _spread(rows.map(lambda tensor: tensor[: len(wishes)]), counts, model)
    return positive, _spread(rows.map(lambda tensor: tensor[len(wishes) :]), counts, model) if guided else None


def answerable(model: Model, requests: Sequence[Request], scale: float) -> bool:
    """Whether guidance acts; InputError where a request asks for what the model was not trained to read.

    Nothing is encoded: what is wrong with a request is known before anything is computed.
    """
    facts = model.contract.guidance
    if scale != 1.0 and facts.distilled and not facts.embedded:
        raise InputError(f"this model is distilled and cannot be guided: use guidance 1, not {scale:g}")
    if scale != 1.0 and not facts.distilled and facts.dropout <= 0.0:
        raise InputError(f"guidance {scale:g} needs a model trained with its condition dropped at times: use 1")
    guided = scale != 1.0 and not facts.distilled
    if any(request.negative for request in requests) and not guided:
        why = "this model is distilled and has none" if facts.distilled else "that is off at scale 1"
        raise InputError(f"a negative prompt acts through guidance, and {why}: leave it out, or raise the guidance")
    negatives = [(request.negative, None) for request in requests if guided]
    labels(model, [*((request.prompt, request.label) for request in requests), *negatives])
    return guided


def labels(model: Model, wishes: Sequence[tuple[str, int | str | None]]) -> torch.Tensor | None:
    """The class of each wish (prompt, label); None where the model has no classes, InputError where it has not this."""
    classes, prompts = model.contract.classes, [prompt for prompt, _ in wishes]
    if classes is not None:
        if model.text is None and any(prompt and given is not None for prompt, given in wishes):
            raise InputError("this model was trained without text: name the class as label or as prompt, not both")
        chosen = [given if given is not None or model.text else prompt or None for prompt, given in wishes]
        return torch.tensor([class_index(classes, name) for name in chosen])
    if any(given is not None for _, given in wishes):
        raise InputError("this model has no classes: " + ("use a prompt" if model.text else "leave the label out"))
    if model.text is None and any(prompts):
        raise InputError("this model was trained without text: leave the prompt out")
    return None


def _chunked(requests: Sequence[Request]) -> bool:
    ways = {request.long_prompt for request in requests}
    if len(ways) > 1:
        raise InputError("requests drawn as one batch must agree, and differ in long_prompt: draw them apart")
    return ways == {"chunk"}


def _read(
    model: Model, wishes: Sequence[tuple[str, int | str | None]], negatives: int = 0, chunked: bool = False
) -> Conditioning:
    """A row for each wish, the last `negatives` of them being what to keep away from."""
    label, prompts = labels(model, wishes), [prompt for prompt, _ in wishes]
    if model.text is None:
        return Conditioning(label=label)
    distinct = list(dict.fromkeys(prompts))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    with working(model, "text"):
        text = model.text.encode(distinct, chunked).map(lambda tensor: tensor.cpu()[rows])
    if model.text.stands_for_nothing == "zeros":
        said = torch.ones(len(prompts))
        for row in range(len(prompts) - negatives, len(prompts)):
            said[row] = float(prompts[row] != "")
        text = text.map(lambda tensor: tensor * said.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1)))
    return replace(text, label=label)


def picture(names: Sequence[str], request: Request, size: tuple[int, int], negative: bool) -> list[float]:
    """The numbers about the picture that SDXL is told, by name (Podell et al. 2023, section 2.2)."""
    width, height = size
    original_width, original_height = request.original_size or size
    left, top = request.crop
    known = {
        "original_height": original_height, "original_width": original_width, "crop_top": top, "crop_left": left,
        "target_height": height, "target_width": width,
        "aesthetic": request.negative_aesthetic if negative else request.aesthetic,
    }  # fmt: skip
    return [float(known[name]) for name in names]


def class_index(classes: ClassFacts, label: int | str | None) -> int:
    """The row of a class by index, by name, or by one of the synonyms that a name lists between commas.

    No label is the null class. Of classes that share a synonym the last one has it, as in the reference library.
    """
    names = classes.names
    if label is None:
        if classes.null is None:
            raise InputError(f"this model needs a label: 0 to {len(names) - 1}, or one of {listed(names)}")
        return classes.null
    if isinstance(label, str):
        rows = {word.strip(): row for row, name in enumerate(names) for word in name.split(",")}
        rows |= {name: row for row, name in enumerate(names)}
        if label in rows:
            return rows[label]
        near = get_close_matches(label, rows, n=1, cutoff=0.0)
        raise InputError(f"no class {label!r}: did you mean {near[0]!r}? Classes: {listed(names)}")
    if not 0 <= label < len(names) and label != classes.null:
        raise InputError(f"label {label} is out of range: 0 to {len(names) - 1} ({listed(names)})")
    return label


def listed(names: Sequence[str]) -> str:
    """Names on one line; of very many the first few."""
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:6])} and {len(names) - 6} more"


def _spread(conditioning: Conditioning, counts: torch.Tensor, model: Model) -> Conditioning:
    """One row an image, on the model's device; floating parts in its dtype."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.repeat_interleave(counts, 0).to(model.device, dtype)

    return conditioning.map(place)
