"""Train a new word for a model that stays as it is: a few vectors in front of its text encoders (Gal et al. 2022)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.adapters import write_words
from mezzotint.checkpoints import write_tensors
from mezzotint.contract import AdapterContract
from mezzotint.data import metadata
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.text import TextEncoder
from mezzotint.text.rows import Rows, learned
from mezzotint.training import finish, parts, tables
from mezzotint.training.diffusion import Diffusion
from mezzotint.training.methods import Batch, Place
from mezzotint.training.steered import Steered
from mezzotint.training.tables import Recipe, Text

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "learned_embeds.safetensors"


class TextualInversion:
    """v* = argmin over v of the base's own loss, with the word's vectors v in its prompts; nothing else can move."""

    averaged = "network"

    def __init__(self, recipe: Recipe, place: Place) -> None:
        assert recipe.textual_inversion is not None  # recipe.check saw to it
        self.plan = plan = recipe.textual_inversion
        model = parts.model(recipe, place.device)
        said = prompts(plan, recipe)
        text = with_word(model, plan)
        self.core = Diffusion(recipe, place, replace(model, text=text), text_trains=True, prompts=said)
        if recipe.text is None:  # an image without its prompt has nothing to teach the word
            self.core.text_plan = Text(dropout=0.0)
        backbone = parts.settled(model.backbone, place.device)
        self.trained: dict[str, nn.Module] = {"network": Steered(backbone, text).to(place.device)}
        self.rates = {"network": 1.0}
        self.decay = {"network": 0.0}
        self.digests, self.licensed = self.core.digests, self.core.licensed

    def draw(self, step: int) -> Batch:
        """The batch of a step."""
        return self.core.draw(step)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a piece of a batch."""
        return self.core.loss(self.trained["network"], batch), {}

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return self.core.names(batch)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """The validation loss by band of the clock, on prompts with the word."""
        return self.core.validate(network)

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Pictures through the one inference path."""
        assert isinstance(network, Steered)
        return self.core.previews(replace(self.core.model, backbone=network.backbone, text=network.text))

    def save(self, network: nn.Module, folder: Path) -> None:
        """learned_embeds.safetensors with its contract; the folder opens with --embedding."""
        assert isinstance(network, Steered)
        vectors = {name: table.rows.detach() for name, table in rows(network.text).items()}
        contract = AdapterContract.of(
            self.core.model.contract, "embedding", words=[self.plan.word], licence=self.licensed.own,
            lineage=finish.lineage(self.core),
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / FILE, write_words({self.plan.word: vectors}), metadata=contract.to_header())


def prompts(plan: tables.TextualInversion, recipe: Recipe) -> tuple[str, ...]:
    """The templates with the word in them; without templates none, and every caption must hold the word itself."""
    if plan.word.split() != [plan.word]:
        raise InputError(f"textual_inversion.word must be one word without spaces, such as '<thing>': {plan.word!r}")
    for template in plan.templates:
        if "{}" not in template:
            raise InputError(f"{recipe.at}: the template {template!r} has no place {{}} for the word {plan.word}.")
    for folder in (recipe.data.folder, recipe.data.validation):
        for row in metadata.read(Path(folder)) if folder and not plan.templates else ():
            if plan.word not in row.text:
                raise InputError(
                    f"{folder}: the caption of {row.file_name} does not hold {plan.word}, so it would teach nothing."
                    " Write it there, or give textual_inversion.templates."
                )
    return tuple(template.replace("{}", plan.word) for template in plan.templates)


def with_word(model: Model, plan: tables.TextualInversion) -> TextEncoder:
    """The model's text with a new word whose rows train, in float32, and nothing else of it.

    They begin as the vectors of `initial`: one for each token of it, means or repetitions where that is more or fewer
    (vector i of n is the mean of the tokens from floor(i k / n) to ceil((i + 1) k / n) of k).
    """
    if model.text is None:
        raise InputError(f"{model.path} reads no text, so there is no encoder for a new word.")
    start = model.text.vectors(plan.initial)
    known = ", ".join(start)
    for folder in plan.encoders:
        if folder not in start:
            raise InputError(f"textual_inversion.encoders: {model.path} has no {folder}; it has {known}.")
    chosen = {folder: start[folder].float() for folder in plan.encoders or start}
    spread = {folder: F.adaptive_avg_pool1d(rows.T, plan.vectors).T for folder, rows in chosen.items()}
    text = model.text.with_words({plan.word: spread})
    for network in text.networks.values():
        network.eval().requires_grad_(False)
    for table in rows(text).values():
        table.rows.requires_grad_(True)
    return text


def rows(text: TextEncoder) -> dict[str, Rows]:
    """The tables with new words, by the folder of their encoder."""
    return {folder: table for folder, network in text.networks.items() for table in learned(network).values()}
