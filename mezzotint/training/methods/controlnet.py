"""Train a control network on a base that stays as it is: the picture follows a mask, edges, or any picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mezzotint import images
from mezzotint.backbones.controlnet import Controlled
from mezzotint.backbones.initialise import from_base
from mezzotint.contract import AdapterContract
from mezzotint.data import conditions
from mezzotint.data.folder import ImageFolder
from mezzotint.digests import tensors_digest
from mezzotint.errors import InputError
from mezzotint.families.control import check, load_control, save_control, shown
from mezzotint.families.model import working
from mezzotint.training import finish, parts, previews
from mezzotint.training.diffusion import Diffusion
from mezzotint.training.methods import Batch, Place
from mezzotint.training.tables import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


class Control:
    """The loss is that of training the whole; what moves is the copy of the encoder, its stem and zero convolutions.

    No gradient passes the base's encoder, which therefore keeps nothing for the way back; its second half only passes
    gradients on.
    """

    averaged = "network"

    def __init__(self, recipe: Recipe, place: Place) -> None:
        assert recipe.controlnet is not None  # recipe.check saw to it
        self.plan = recipe.controlnet
        self.model = parts.model(recipe, place.device)
        self.control = parts.trainable(self._start(), place.device)
        for layer in getattr(self.control, "unread", ()):
            layer.requires_grad_(False)
        network = Controlled(parts.settled(self.model.backbone, place.device), [self.control], [1.0])
        self.pictures: dict[int, Tensor] = {}  # by folder: what the control network is shown of each image
        self.core = Diffusion(recipe, place, self.model, extend=self._hints)
        if self.control.hint == "latents":  # made at every step
            self.model.codec.autoencoder.to(place.device)
        self.trained: dict[str, nn.Module] = {"network": network}
        self.rates = {"network": 1.0}
        self.digests, self.licensed = dict(self.core.digests), self.core.licensed
        if self.plan.start:
            self.digests["start"] = tensors_digest(self.control.state_dict())

    def draw(self, step: int) -> Batch:
        """The batch of a step, with the hint of every image."""
        return self.core.draw(step)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a piece of a batch."""
        return self.core.loss(self.trained["network"], batch), {}

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return self.core.names(batch)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """The validation loss by band of the clock, every image with its own hint."""
        return self.core.validate(network)

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Condition pictures of validation images, each beside what the network makes of it."""
        base, control = _divided(network)  # of sharded networks these two alone are whole

        def follow(source: ImageFolder, index: int) -> tuple[nn.Module, Image]:
            return control, self._picture(source, index)

        return previews.drawn(self.core, replace(self.model, backbone=base), follow)

    def save(self, network: nn.Module, folder: Path) -> None:
        """The folder of a control network with its contract; it opens with --control."""
        contract = AdapterContract.of(
            self.model.contract, "control", licence=self.licensed.own, lineage=finish.lineage(self.core)
        )
        save_control(_divided(network)[1], contract, folder, self.plan.condition)

    def _start(self) -> nn.Module:
        """A copy of the base's encoder, or a control network to go on from."""
        if not self.plan.start:
            return from_base(self.model.backbone, self.model.codec.factor, self.plan.config)
        if self.plan.config:
            raise InputError("controlnet.start takes its network as it is: leave controlnet.config out.")
        check(self.model, Path(self.plan.start))
        return load_control(self.plan.start)

    def _hints(
        self, source: ImageFolder, index: Tensor, flips: list[tuple[int, ...]], rng: torch.Generator
    ) -> Batch:  # fmt: skip
        """What the control network is shown of a batch, mirrored as its images are."""
        pictures = conditions.shown(self._pictures(source), index, flips)  # (B, 3, H, W)
        if self.control.hint == "pixels":
            return {"hint": shown(self.model, self.control, pictures)}
        with torch.no_grad(), working(self.model, "codec"):
            weight: Any = next(self.model.codec.autoencoder.parameters(), pictures)
            return {"hint": shown(self.model, self.control, pictures.to(weight)).float().cpu()}

    def _pictures(self, source: ImageFolder) -> Tensor:
        if id(source) not in self.pictures:
            self.pictures[id(source)] = conditions.pictures(source, self.plan.condition, self.plan.edges)
        return self.pictures[id(source)]

    def _picture(self, source: ImageFolder, index: int) -> Image:
        return images.to_images(conditions.shown(self._pictures(source), torch.tensor([index]), [()]))[0]


def _divided(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Base and control network, out of the network that trains or its average."""
    assert isinstance(network, Controlled)
    return network.backbone, network.networks[0]
