"""Where in a model a name from an adapter file belongs: the folder's names, older spellings, and original layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from mezzotint.adapters.lowrank import BACKBONE

Shapes = Mapping[str, tuple[int, ...]]  # the weight's shape by module


class Change(Protocol):
    """How one matrix of the original layout becomes the folder's, by rows."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]: ...


class Row(Protocol):
    """A row of a key map: a module of the original layout and the folder's modules that it becomes."""

    @property
    def theirs(self) -> str: ...
    @property
    def ours(self) -> tuple[str, ...]: ...
    @property
    def change(self) -> Change: ...


@dataclass(frozen=True, slots=True)
class Place:
    """The modules that one name of a file stands for; `change` divides the rows among them."""

    part: str
    modules: tuple[str, ...]
    change: Change | None = None


# The first word of a dotted name, and kohya's prefix of a name with underscores, by part of the model.
PREFIXES = {
    "unet": BACKBONE,
    "transformer": BACKBONE,
    "diffusion_model": BACKBONE,
    "model.diffusion_model": BACKBONE,
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
KOHYA = {
    "lora_unet": BACKBONE,
    "lora_transformer": BACKBONE,
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
PEFT = "base_model.model."
OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def modules_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every module of a network that an adapter can change, with the shape of its weight."""
    return {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


class Places:
    """All names by which the modules of a model may be called."""

    def __init__(self, modules: Mapping[str, Shapes], layouts: Mapping[str, Sequence[Row]]) -> None:
        self._names = {part: _names(part, shapes, layouts.get(part, ())) for part, shapes in modules.items()}

    def find(self, stem: str) -> Place | None:
        """The place of a name as a file spells it, or None."""
        prefix, name = divided(stem)
        if prefix in KOHYA:
            return self._names.get(KOHYA[prefix], {}).get(name)
        parts = [PREFIXES[prefix]] if prefix in PREFIXES else list(self._names)  # a file may leave it out
        for spelled in (name, modern(name)):
            found = [place for part in parts if (place := self._names.get(part, {}).get(spelled))]
            if len(found) == 1 or (found and found[0].part == BACKBONE):  # two text encoders have the same names
                return found[0]
        return None


def divided(stem: str) -> tuple[str, str]:
    """The prefix that says the part ("" where there is none) and the name within the part."""
    if match := re.match(r"(lora_(?:unet|transformer|te[123]?))_", stem):
        return match[1], stem[match.end() :]
    name = stem.removeprefix(PEFT)
    for prefix in PREFIXES:
        if name.startswith(f"{prefix}."):
            return prefix, name.removeprefix(f"{prefix}.").removeprefix(PEFT)
    return "", name


def modern(name: str) -> str:
    """The folder's name of a module as diffusers spelled it before it used peft.

    An attention's processor held the matrices, and a text encoder's projections had the backbone's names.
    """
    name = name.replace(".processor.", ".")
    if "self_attn.to_" in name:  # text encoders
        stem, _, last = name.rpartition(".")
        return f"{stem}.{OLD_ATTENTION.get(last, last)}"
    return f"{name}.0" if name.endswith(".to_out") else name


def _names(part: str, shapes: Shapes, rows: Sequence[Row]) -> dict[str, Place | None]:
    """Every name to its place; the folder's names come before the original's, and dots before underscores."""
    own = {name: Place(part, (name,)) for name in shapes}
    if part != BACKBONE:  # libraries differ on whether a text encoder's inner model is a level of its own
        for name in shapes:
            other = name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
            own.setdefault(other, Place(part, (name,)))
    original = {
        re.sub(r"^(model\.)?diffusion_model\.", "", row.theirs): Place(part, row.ours, row.change)
        for row in rows
        if row.ours and all(name in shapes for name in row.ours)
    }
    return _underscored(original) | _underscored(own) | original | own


def _underscored(places: Mapping[str, Place]) -> dict[str, Place | None]:
    """Names with underscores for dots; None where two modules collapse into one name."""
    found: dict[str, Place | None] = {}
    for name, place in places.items():
        flat = name.replace(".", "_")
        found[flat] = place if found.get(flat, place) == place else None
    return found
