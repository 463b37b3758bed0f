"""What a conversion reports: files, progress, and what it left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mezzotint.errors import InputError
from mezzotint.families.materials import Layout

# What of a single file is not carried over, by the beginnings of the names.
KINDS = (
    ("model_ema.", "averaged copies of the weights (EMA)"),
    ("cond_stage_model.model.transformer.resblocks.", "the text encoder's last layer, which is never read"),
    ("loss.", "the autoencoder's loss"),
    ("first_stage_model.loss.", "the autoencoder's loss"),
)
OTHER_KIND = "tables and flags that the folder's configuration says"
Watch = Callable[[str, int, int], object]  # what is being written, bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and what of the source the other layout has no place for, in groups with their members."""

    family: str
    layout: Layout
    files: tuple[Path, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def free(place: Path, force: bool) -> None:
    """InputError where something is there already that was not given up."""
    taken = place.exists() and not (place.is_dir() and not any(place.iterdir()))
    if taken and not force:
        raise InputError(f"{place} exists: choose another place, or replace it with --force")


def grouped(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Tensors that are left out, by what they are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        kind = next((kind for start, kind in KINDS if name.startswith(start)), OTHER_KIND)
        groups.setdefault(kind, []).append(name)
    return {kind: tuple(sorted(members)) for kind, members in groups.items()}


@dataclass
class Counted:
    """Bytes written so far, handed on to a watch."""

    watch: Watch
    total: int
    done: int = 0

    def at(self, what: str) -> Callable[[int], None]:
        """What a writer of one part calls with the bytes of each piece."""

        def advance(count: int) -> None:
            self.done += count
            self.watch(what, self.done, self.total)

        return advance
