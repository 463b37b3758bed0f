"""What a training run to plan is, and what its methods share: the loss on noised images, bytes, what rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.families.model import places
from mezzotint.plan import formats
from mezzotint.plan.subject import Subject
from mezzotint.process import Level, prediction

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A run to plan; what is not said is what a recipe defaults to."""

    method: str = "full"
    size: tuple[int, int] | None = None  # width, height; None: the model's
    steps: int = 1000
    batch: int = 1
    accumulation: int = 1
    images: int = 32  # of the data set
    dtype: str = "float32"  # of weights that do not train
    precision: str = "float32"  # that the network computes in
    recompute: bool = False
    ema: bool = True
    rank: int | None = None  # of LoRA; with dreambooth and lcm None trains the whole
    targets: tuple[str, ...] = ("attention",)
    prior: bool = False  # dreambooth: as many images of the class in every step
    vectors: int = 1  # textual inversion
    decoder: bool = False  # vae: the decoder alone, as a start from a published one has it

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "images", "vectors", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        formats.dtype_of(self.dtype)
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, not '{self.precision}'")


class Critics(Protocol):
    """What judges an autoencoder; `mezzotint.training.adversary` is one."""

    def PatchDiscriminator(self, pixel_channels: int, channels: int, layers: int) -> nn.Module: ...

    def perceptual_distance(self, network: Any, ours: Tensor, theirs: Tensor) -> Tensor: ...

    def balance(self, distance: Tensor, adversarial: Tensor, last: Tensor) -> Tensor: ...

    def hinge(self, real: Tensor, fake: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Prepared:
    """A method ready to be traced."""

    trained: Sequence[nn.Module]  # networks some of whose parameters train
    loss: Callable[[int], Tensor]  # of a piece of so many images
    weights: Mapping[str, float]  # bytes on the device in every step, by part
    averaged: float  # bytes that the moving average takes
    written: float  # bytes of the finished file
    frozen: Sequence[nn.Module] = ()  # other networks that the loss calls
    reads_text: bool = False  # prompts are read in every step
    notes: tuple[str, ...] = ()


def objective(subject: Subject, size: tuple[int, int], network: Network) -> Callable[[int], Tensor]:
    """The loss that every method on noised images has: mean w |raw - target|^2."""
    process, channels = subject.contract.process, subject.contract.latent.channels

    def loss(count: int) -> Tensor:
        clean, noise, level = noised(subject, count, size)
        x = process.noised(clean, noise, level)
        raw = network(x, level.t, subject.conditioning(count, size, torch.float32)).float()
        said, _ = prediction.split(raw, channels)
        error = (said - prediction.target(process.prediction, clean, noise, level)) ** 2
        return (torch.ones(count) * error.flatten(1).mean(1)).mean()

    return loss


def noised(subject: Subject, count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Level[Tensor]]:
    latent = subject.contract.latent
    shape = count, latent.channels, size[1] // latent.factor, size[0] // latent.factor
    ones = torch.ones(count, 1, 1, 1)
    return torch.zeros(shape), torch.zeros(shape), Level(torch.ones(count), ones, ones)


def bytes_of(network: nn.Module, moving: bool = False) -> float:
    """Bytes of a network's tensors, each once; of what trains alone."""
    tensors = {id(t): t for _, _, t in places([network]) if not moving or t.requires_grad}
    return float(sum(t.numel() * t.itemsize for t in tensors.values()))
