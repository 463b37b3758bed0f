"""Parts in their original form: names, numbers, and what a header says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.text import NO_WEIGHTS
from mezzotint.errors import InputError
from mezzotint.families.family import Family
from mezzotint.families.materials import DISTILLED, Material, Materials, Section
from mezzotint.process import Prediction

WORDS = {Prediction.VELOCITY: "v"}  # as headers call it


def original(section: Section, material: Material) -> dict[str, Tensor]:
    """A part under its original names; InputError where the layout has no place for a tensor."""
    tensors = weights(material)
    try:
        for name, value in (section.implied(material.config) if section.implied else {}).items():
            stored = tensors.pop(name, value)
            if stored.shape != value.shape or not torch.equal(stored, value.to(stored)):
                raise InputError(f"the original layout has no place for {name}, which is not what it implies")
        return restored(tensors, section.rows(material.config)) if section.rows else tensors
    except InputError as error:
        raise InputError(f"{material.at}: {error}") from error


def weights(material: Material) -> dict[str, Tensor]:
    """A part's tensors under the published names, without those that carry no weights."""
    tensors = material.tensors
    if not material.kind.startswith("CLIP"):
        return dict(tensors)
    bare = not any(name.startswith("text_model.") for name in tensors)  # as transformers 5 writes them
    named = {f"text_model.{k}" if bare and not k.startswith("text_projection") else k: v for k, v in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name not in NO_WEIGHTS}


def said(family: Family, materials: Materials, facts: Mapping[str, Any]) -> dict[str, str]:
    """What goes into the header: facts that names and shapes do not tell."""
    prediction = facts["process"].prediction
    width, height = facts["size"]
    header = {
        "mezzotint.family": family.name,
        "modelspec.prediction_type": WORDS.get(prediction, prediction.value),
        "modelspec.resolution": f"{width}x{height}",
    }
    if family.pipeline(materials) == "Flux2KleinPipeline":
        header[DISTILLED] = "yes" if facts["guidance"].distilled else "no"
    return header
