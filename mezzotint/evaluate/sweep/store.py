"""Results by the digest of everything that they depend on: what is there is not drawn again.

store/KEY.json is written last, so a killed run leaves a result whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from mezzotint import files, images
from mezzotint.backbones.features import Features
from mezzotint.checkpoints import read_tensors, write_tensors
from mezzotint.errors import InputError
from mezzotint.evaluate.sweep.reference import Reference
from mezzotint.evaluate.sweep.setting import Target


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting drawn for one batch of wishes."""

    seconds: Mapping[str, float] = field(default_factory=dict[str, float])  # by run that measured: of the batch
    memory: int | None = None  # bytes beyond the weights at most, where it was looked at
    latent: Sequence[float] = ()  # error of each image, in deviations of the reference's pictures
    pixel: Sequence[float] = ()  # error of each image in grey levels
    failure: str = ""  # why there are no images


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of results."""

    folder: Path

    def read(self, identity: Mapping[str, Any]) -> Cell | None:
        """The result of this identity, None where it was never finished."""
        content = self._json(self._at(identity, ".json"))
        return None if content is None else Cell(**content["cell"])

    def write(
        self, identity: Mapping[str, Any], cell: Cell, pictures: Sequence[Image], features: Features | None
    ) -> None:
        """Keep a result with its first pictures and the features of all of them."""
        for i, picture in enumerate(pictures):
            files.write_with(self._at(identity, f"-{i}.png"), picture.save)
        if features is not None:
            write_tensors(
                self._at(identity, ".safetensors"), {"features": torch.from_numpy(features.astype(np.float16))}
            )
        self.update(identity, cell)

    def update(self, identity: Mapping[str, Any], cell: Cell) -> None:
        """Keep a result whose pictures are there already."""
        files.write_json(self._at(identity, ".json"), {"cell": asdict(cell), "identity": identity})

    def pictures(self, identity: Mapping[str, Any], count: int) -> list[Image]:
        """The first pictures of a result that is there."""
        paths = [self._at(identity, f"-{i}.png") for i in range(count)]
        return [images.read(path) for path in paths if path.is_file()]

    def features(self, identity: Mapping[str, Any]) -> Features | None:
        """Patch features (B, P, 40) of a result's pictures, None where they were not looked at."""
        path = self._at(identity, ".safetensors")
        return read_tensors(path)["features"].float().numpy() if path.is_file() else None

    def read_reference(self, identity: Mapping[str, Any]) -> Reference | None:
        """The converged images of this identity, None where they were never finished."""
        content = self._json(self._at(identity, ".json"))
        if content is None:
            return None
        latents = read_tensors(self._at(identity, ".safetensors"))["latents"]
        pictures = self.pictures(identity, len(latents))
        return Reference(Target(**content["target"]), latents, pictures, content["steps"], float(content["gap"]))

    def write_reference(self, identity: Mapping[str, Any], reference: Reference) -> None:
        """Keep converged images."""
        for i, picture in enumerate(reference.pictures):
            files.write_with(self._at(identity, f"-{i}.png"), picture.save)
        write_tensors(self._at(identity, ".safetensors"), {"latents": reference.latents})
        facts = {"target": asdict(reference.target), "steps": reference.steps, "gap": str(reference.gap)}
        files.write_json(self._at(identity, ".json"), {**facts, "identity": identity})

    def _at(self, identity: Mapping[str, Any], ending: str) -> Path:
        return self.folder / f"{files.sha256_json(identity)[:24]}{ending}"

    def _json(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no JSON: {error}. Delete it, it is measured again.") from error
