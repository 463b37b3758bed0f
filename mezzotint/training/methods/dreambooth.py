"""A subject from a few images of it, without losing the class that it is one of (Ruiz et al. 2023)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.training import parts, prior
from mezzotint.training.diffusion import Diffusion
from mezzotint.training.methods import Batch, Method, Place
from mezzotint.training.methods.full import Full
from mezzotint.training.methods.lora import Lora
from mezzotint.training.tables import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

FEW, MANY = 3, 30  # images of a subject
PRIOR = "prior/"  # before the names of what belongs to the images of the class


class DreamBooth:
    """loss = L(subject) + prior_weight L(class), each the loss of its images under its prompt (eq. 2).

    The class's images are drawn by the base before anything trains, or real ones are given. `batch` counts the
    subject's images; as many of the class come with them. What moves is the whole backbone, or adapters where the
    recipe has a [lora] table.
    """

    def __init__(self, recipe: Recipe, place: Place) -> None:
        plan = recipe.dreambooth
        assert plan is not None  # recipe.check saw to it
        model = parts.model(recipe, place.device)
        _check(recipe)
        live = bool(recipe.lora and recipe.lora.text_targets)
        said = (plan.prompt,) if plan.prompt else ()
        self.prior: Diffusion | None = None
        folder = Path(plan.class_folder) if plan.class_folder else None
        if plan.prior_images:
            folder = Path(plan.prior_folder) if plan.prior_folder else place.folder / "prior"
            prior.images(
                model, plan, folder, recipe.data.size, recipe.seed, lambda a, b: place.watch("class images", a, b)
            )
        if folder is not None:
            data = recipe.data.model_copy(update={"folder": str(folder), "validation": None, "sampling": "shuffle"})
            of_class = recipe.model_copy(update={"data": data, "seed": recipe.seed + 1})  # noise of its own
            prompts = (plan.class_prompt,) if plan.class_prompt else ()
            self.prior = Diffusion(of_class, place, model, live, prompts=prompts, label=plan.class_label, name="prior")
        self.core = Diffusion(recipe, place, model, live, prompts=said, label=plan.label)
        self.weight = plan.prior_weight
        count = sum(len(images) for images in self.core.images)
        if not FEW <= count <= MANY:
            warnings.warn(f"{recipe.data.folder} has {count} images; a subject takes {FEW} to {MANY}", stacklevel=2)
        self.inner: Method = Lora(recipe, place, self.core) if recipe.lora else Full(recipe, place, self.core)
        self.trained, self.rates, self.averaged = self.inner.trained, self.inner.rates, self.inner.averaged
        self.licensed = self.core.licensed
        self.digests = self.core.digests | ({"class images": self.prior.digests["data"]} if self.prior else {})

    def draw(self, step: int) -> Batch:
        """Images of the subject, and as many of its class."""
        batch = self.core.draw(step)
        if self.prior:
            batch |= {f"{PRIOR}{key}": value for key, value in self.prior.draw(step).items()}
        return batch

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses in one sum."""
        network = self.trained[self.averaged]
        loss = self.core.loss(network, {key: value for key, value in batch.items() if not key.startswith(PRIOR)})
        if self.prior is None:
            return loss, {}
        own = {key.removeprefix(PRIOR): value for key, value in batch.items() if key.startswith(PRIOR)}
        of_class = self.prior.loss(network, own)
        return loss + self.weight * of_class, {"loss/subject": loss.detach(), "loss/class": of_class.detach()}

    def names(self, batch: Batch) -> list[str]:
        """The image files of the subject."""
        return self.core.names(batch)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """The validation loss by band of the clock."""
        return self.core.validate(network)

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Pictures of the subject."""
        return self.inner.preview(network, step)

    def save(self, network: nn.Module, folder: Path) -> None:
        """A model folder, or adapters."""
        self.inner.save(network, folder)


def _check(recipe: Recipe) -> None:
    plan = recipe.dreambooth
    assert plan is not None
    if plan.prior_images and plan.class_folder:
        raise InputError(f"{recipe.at}: class_folder stands in place of prior_images: leave one of them out.")
    if plan.prior_images and not (plan.class_prompt or plan.class_label):
        raise InputError(f"{recipe.at}: prior images need dreambooth.class_prompt (or class_label) to be drawn with.")
    if plan.prior_images and plan.prompt and plan.prompt == plan.class_prompt:
        raise InputError(f"{recipe.at}: dreambooth.prompt and class_prompt are the same, so nothing names the subject.")
