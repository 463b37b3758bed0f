"""From one layout to the other: tensors are renamed, never computed with."""

from __future__ import annotations

from pathlib import Path

from mezzotint.errors import InputError
from mezzotint.families.converted import Converted, Watch
from mezzotint.families.family import Asked, unanswered
from mezzotint.families.load import gather, is_native, named
from mezzotint.families.materials import Layout
from mezzotint.families.to_folder import to_folder
from mezzotint.families.to_single_file import to_single_file
from mezzotint.process import Prediction


def convert(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    prediction: Prediction | str | None = None,
    distilled: bool | None = None,
    parts: str | Path | None = None,
    force: bool = False,
    watch: Watch = lambda what, done, total: None,
) -> Converted:
    """Rewrite a published checkpoint in a layout, "diffusers" or "single-file"; its numbers stay, to the bit.

    `prediction`, `distilled` and `parts` are as in `load`. A target that exists is replaced with `force` alone, and
    then only if it is a model folder or a file; it is whole or absent. InputError where the layout cannot hold what
    the source says.
    """
    source, target = Path(source), Path(target).absolute()
    if not source.exists():
        raise InputError(f"no such checkpoint: {source}")
    if is_native(source):
        raise InputError(f"{source} is a model of Mezzotint's own, which has one layout alone")
    if layout not in ("diffusers", "single-file"):
        raise InputError(f"no layout {layout!r}: one of diffusers, single-file")
    if target == source.resolve() or source.resolve().is_relative_to(target):
        raise InputError(f"{target} holds the source: choose another place")
    asked = Asked(None if prediction is None else named(prediction), distilled)
    family, materials = gather(source, Path(parts) if parts else None)
    question = unanswered(family, materials, asked)
    if question:
        raise InputError(f"{source}: {question.text}")
    return (to_folder if layout == "diffusers" else to_single_file)(family, materials, target, asked, force, watch)
