"""From what a request says to what a network reads: conditioning, and the baseline that guidance compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

import torch

from mezzotint.conditioning import Conditioning
from mezzotint.contract import ClassFacts
from mezzotint.errors import InputError
from mezzotint.families.model import Model
from mezzotint.request import Request


def steering(model: Model, requests: Sequence[Request], scale: float) -> tuple[Conditioning, Conditioning | None]:
    """The conditioning of every image (B = sum of counts) and its baseline; None where the model needs no baseline.

    Text is encoded once for each distinct prompt. A model with classes and without text takes its prompt as a class
    name. InputError where a request asks for what the model was not trained to read.
    """
    facts = model.contract
    distilled = facts.guidance.distilled
    if scale != 1.0 and not distilled and facts.guidance.dropout <= 0.0:
        raise InputError(f"guidance {scale:g} needs a model trained with its condition dropped at times: use 1")
    if any(request.negative for request in requests) and (distilled or scale == 1.0):
        why = "this model is distilled and has none" if distilled else "that is off at scale 1"
        raise InputError(f"a negative prompt acts through guidance, and {why}: leave it out, or raise the guidance")
    wanted = _read(model, [(request.prompt, request.label) for request in requests])
    counts = torch.tensor([request.count for request in requests])
    if distilled:
        wanted = replace(wanted, guidance=torch.full((len(requests),), scale))
    positive = _spread(wanted, counts, model)
    if distilled or scale == 1.0:
        return positive, None
    return positive, _spread(_read(model, [(request.negative, None) for request in requests]), counts, model)


def _read(model: Model, wishes: Sequence[tuple[str, int | str | None]]) -> Conditioning:
    classes = model.contract.classes
    prompts = [prompt for prompt, _ in wishes]
    label = None
    if classes is not None:
        if model.text is None and any(prompt and given is not None for prompt, given in wishes):
            raise InputError("this model was trained without text: name the class as label or as prompt, not both")
        chosen = [given if given is not None or model.text else prompt or None for prompt, given in wishes]
        label = torch.tensor([class_index(classes, name) for name in chosen])
    elif any(given is not None for _, given in wishes):
        raise InputError("this model has no classes: " + ("use a prompt" if model.text else "leave the label out"))
    if model.text is None:
        if classes is None and any(prompts):
            raise InputError("this model was trained without text: leave the prompt out")
        return Conditioning(label=label)
    distinct = list(dict.fromkeys(prompts))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    text = model.text.encode(distinct).map(lambda tensor: tensor.cpu()[rows])
    return Conditioning(tokens=text.tokens, mask=text.mask, pooled=text.pooled, label=label)


def class_index(classes: ClassFacts, label: int | str | None) -> int:
    """The row of a class by name or index; no label is the null class."""
    names = classes.names
    if label is None:
        if classes.null is None:
            raise InputError(f"this model needs a label: 0 to {len(names) - 1}, or one of {', '.join(names)}")
        return classes.null
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        near = get_close_matches(label, names, n=1, cutoff=0.0)
        raise InputError(f"no class {label!r}: did you mean {near[0]!r}? Classes: {', '.join(names)}")
    if not 0 <= label < len(names) and label != classes.null:
        raise InputError(f"label {label} is out of range: 0 to {len(names) - 1} ({', '.join(names)})")
    return label


def _spread(conditioning: Conditioning, counts: torch.Tensor, model: Model) -> Conditioning:
    """One row an image, on the model's device; floating parts in its dtype."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.repeat_interleave(counts, 0).to(model.device, dtype)

    return conditioning.map(place)
