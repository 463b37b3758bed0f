"""What is known of a training when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezzotint import files

FOLDER = "lineage"  # in that of the model, written when everything else is there


@dataclass(frozen=True, slots=True)
class Trained:
    """Plain facts; digests are SHA-256."""

    name: str  # of the model
    method: str
    kind: str  # model, LoRA, embedding, control network, autoencoder
    recipe: Mapping[str, Any]  # as it was resolved
    contract: Mapping[str, Any]
    data: Mapping[str, Any]  # as Manifest.to_dict: digest, folder, files
    base: str | None  # digest of the weights that it started from
    licence: str
    data_licence: str | None
    base_licence: str | None
    started: str  # UTC, ISO
    ended: str
    software: Mapping[str, str]  # package: version
    commit: str | None = None  # of the checkout that trained
    measures: Mapping[str, float] = field(default_factory=dict[str, float])  # such as the last validation loss


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by relative name of all files of a finished model, but for those of its lineage."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder) for path in found]
    return {name.as_posix(): files.sha256_file(folder / name) for name in names if name.parts[0] != FOLDER}
