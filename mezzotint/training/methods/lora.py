"""Train low-rank changes of a model that stays as it is: LoRA and DoRA (Hu et al. 2021; Liu et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mezzotint.training import lowrank, parts
from mezzotint.training.diffusion import Diffusion
from mezzotint.training.methods import Batch, Place
from mezzotint.training.tables import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


class Lora:
    """The loss is that of training the whole; what moves are two thin matrices beside each chosen one."""

    averaged = "network"

    def __init__(self, recipe: Recipe, place: Place, core: Diffusion | None = None) -> None:
        assert recipe.lora is not None  # recipe.check saw to it
        self.plan = recipe.lora
        model = core.model if core else parts.model(recipe, place.device)
        network = lowrank.adapt_for_training(model, self.plan, recipe.seed)  # refuses targets before any work is done
        self.core = core or Diffusion(recipe, place, model, text_trains=bool(self.plan.text_targets))
        self.trained: dict[str, nn.Module] = {"network": network.to(place.device)}
        self.rates = lowrank.rates("network", self.plan)
        self.digests, self.licensed = self.core.digests, self.core.licensed

    def draw(self, step: int) -> Batch:
        """The batch of a step."""
        return self.core.draw(step)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a piece of a batch."""
        return self.core.loss(lowrank.calling(self.core.model, self.trained["network"]), batch), {}

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return self.core.names(batch)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """The validation loss by band of the clock."""
        return self.core.validate(lowrank.calling(self.core.model, network))

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Pictures through the one inference path."""
        return self.core.previews(lowrank.with_network(self.core.model, network))

    def save(self, network: nn.Module, folder: Path) -> None:
        """The adapter in the recipe's layouts; the folder opens with --lora."""
        lowrank.write_adapter(self.core, network, self.plan, folder)
