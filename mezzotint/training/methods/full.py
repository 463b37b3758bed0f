"""Train a whole backbone under its process: a new one, or that of any model, on latents computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mezzotint import families
from mezzotint.families import Model
from mezzotint.training import finish, parts
from mezzotint.training.diffusion import Diffusion
from mezzotint.training.methods import Batch, Place
from mezzotint.training.tables import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


class Full:
    """Every weight of the backbone moves; the codec and the text encoders stay as they are."""

    averaged = "backbone"

    def __init__(self, recipe: Recipe, place: Place, core: Diffusion | None = None) -> None:
        self.core = core or Diffusion(recipe, place, parts.model(recipe, place.device))
        self.trained: dict[str, nn.Module] = {"backbone": parts.trainable(self.core.model.backbone, place.device)}
        self.rates = {"backbone": 1.0}
        self.digests, self.licensed = self.core.digests, self.core.licensed

    def draw(self, step: int) -> Batch:
        """The batch of a step."""
        return self.core.draw(step)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a piece of a batch."""
        return self.core.loss(self.trained["backbone"], batch), {}

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return self.core.names(batch)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """The validation loss by band of the clock."""
        return self.core.validate(network)

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Pictures through the one inference path, on validation images where the model repaints."""
        return self.core.previews(self._model(network))

    def save(self, network: nn.Module, folder: Path) -> None:
        """A model folder with its contract."""
        families.save(self._model(network), folder)

    def _model(self, network: nn.Module) -> Model:
        return replace(self.core.model, backbone=network, contract=finish.contract(self.core))
