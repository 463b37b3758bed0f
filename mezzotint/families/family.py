"""A family: the bill of materials that turns parts into a model with its contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mezzotint.errors import InputError
from mezzotint.families.materials import Materials, Original
from mezzotint.process import Prediction
from mezzotint.text import TextEncoder


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user adds where files are silent; None leaves the answer to the files."""

    prediction: Prediction | None = None  # SD 2: epsilon (2.x-base) or velocity (2.0, 2.1)
    distilled: bool | None = None  # FLUX.2 klein: the distilled model or the base


@dataclass(frozen=True, slots=True)
class Question:
    """What only the user can say: the field of `Asked` that answers, and the question."""

    fact: str
    text: str


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of published model, in the folder layout and in its original one.

    `fits` recognises its folders by class names and settings (never by sizes, which fine-tunes and small models
    change). `facts` gives the contract's fields but for what is read off the parts: latent, text, weights, family.
    """

    name: str
    title: str
    pipeline: Callable[[Materials], str]  # class name in the model_index.json that we write
    fits: Callable[[Materials], bool]
    facts: Callable[[Materials, Asked], dict[str, Any]]
    licence: Callable[[Materials], str]
    backbone: str = "unet"  # folder of the backbone
    codec: str = "vae"  # folder of the autoencoder
    text: Callable[[Materials, torch.dtype], TextEncoder | None] | None = None
    original: Original | None = None
    folders: Mapping[str, str] = field(default_factory=dict[str, str])  # parts that the pipeline calls otherwise
    index: Mapping[str, Any] = field(default_factory=dict[str, Any])  # more of the model_index.json that we write
    asks: Callable[[Materials], Question | None] = lambda materials: None
    answers: tuple[str, ...] = ("prediction",)  # the fields of `Asked` that say something about these models
    notes: Callable[[Materials], tuple[str, ...]] = lambda materials: ()  # what the files do not say, assumed


def unanswered(family: Family, materials: Materials, asked: Asked) -> Question | None:
    """The question that the files leave open and the user has not answered; InputError for answers to nothing."""
    for f in fields(Asked):
        if getattr(asked, f.name) is not None and f.name not in family.answers:
            raise InputError(f"{materials.path}: {family.title} has no '{f.name}' to choose: leave --{f.name} out")
    question = family.asks(materials)
    return question if question and getattr(asked, question.fact) is None else None
