"""Training methods: each is one file that says what trains, what the loss is and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.training.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from mezzotint.training.finish import Licensed

# recipe name -> file, class
METHODS = {
    "full": ("full", "Full"),
    "vae": ("vae", "Vae"),
    "patch-pca": ("patch_pca", "PatchPCAFit"),
    "lora": ("lora", "Lora"),
    "dreambooth": ("dreambooth", "DreamBooth"),
    "textual-inversion": ("textual_inversion", "TextualInversion"),
    "controlnet": ("controlnet", "Control"),
    "lcm": ("lcm", "Consistency"),
}

Batch = dict[str, Tensor]  # every tensor has the images first; "index" names them


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run happens."""

    folder: Path  # the run folder
    device: torch.device
    watch: Callable[[str, int, int], None]  # (what, done, all) while things are prepared
    say: Callable[[str], None] | None = None  # takes the lines of the data's audit; None: nothing is audited


class Method(Protocol):
    """What the loop needs; everything random in `draw` is a function of the recipe's seed and the step alone.

    Of what `trained` holds, the parameters that ask for gradients when the run starts are optimised, averaged and kept
    in checkpoints; the others are frozen. The longest prefix in `rates` wins; without one the rate is the recipe's.
    Where several processes train, the loop puts wrapped networks into `trained`: a loss calls those, and only them.
    """

    trained: dict[str, nn.Module]  # what trains, each under an optimiser of its own
    rates: dict[str, float]  # learning rate against the recipe's, by dotted prefix of "<trained name>.<parameter>"
    averaged: str  # the trained part whose average is validated, previewed and saved
    licensed: Licensed  # what comes out, and what it is made from
    digests: dict[str, str]  # what a resumed run must find unchanged: data, codec, text

    def draw(self, step: int) -> Batch:
        """The whole batch of a step, on the CPU: images, noise, times, what is dropped, masks."""
        ...

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a piece of a batch, and single numbers to report with it."""
        ...

    def names(self, batch: Batch) -> list[str]:
        """The files of a batch."""
        ...

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Numbers of the averaged network on fixed images, noise and times; empty without validation data."""
        ...

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Pictures of the averaged network."""
        ...

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write the averaged network as a finished model."""
        ...


@runtime_checkable
class Following(Protocol):
    """A method whose loss looks at the moving average, as a distillation does at its target network."""

    def averaging(self, network: nn.Module) -> None:
        """Called once before the first step, with the average after a restore; never where `ema.decay` is 0."""
        ...


@runtime_checkable
class Sparing(Protocol):
    """A method some of whose matrices must not decay, such as embeddings of words."""

    decay: dict[str, float]  # weight decay against the recipe's, by dotted prefix as in `rates`


def method(recipe: Recipe, place: Place) -> Method:
    """Make the method that a recipe names; only its file is imported."""
    if recipe.method not in METHODS:
        raise InputError(f"method '{recipe.method}' is not available in this version; choose {' or '.join(METHODS)}.")
    module, name = METHODS[recipe.method]
    make: Callable[[Recipe, Place], Method] = getattr(import_module(f"mezzotint.training.methods.{module}"), name)
    return make(recipe, place)
