"""What is swept: a model in each number format, and the wishes whose images are drawn over and over."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mezzotint.contract import Contract
from mezzotint.errors import InputError
from mezzotint.evaluate.sweep.setting import Setting, few_step
from mezzotint.families import Model
from mezzotint.families.adapt import ruled
from mezzotint.generate import generate_batch
from mezzotint.pipeline import record
from mezzotint.request import Request, Result

if TYPE_CHECKING:
    from mezzotint.sampling.loop import Watch


@dataclass(frozen=True, slots=True)
class Subject:
    """Models by number format, digests in their contracts; one wish an image, each with a count of 1 and its seed.

    `options` are words that a command of `mezzotint generate` needs beside those of a setting, to draw the same.
    """

    models: Mapping[str, Model]
    wishes: tuple[Request, ...]
    batch: int = 4
    options: tuple[str, ...] = ()

    @property
    def precise(self) -> str:
        """The number format that the reference is computed in: float32 where it is there, else the first."""
        return "float32" if "float32" in self.models else next(iter(self.models))

    @property
    def contract(self) -> Contract:
        """What the model works under, the wishes' adapters included."""
        return ruled(self.models[self.precise], self.wishes[0].lora).contract

    @property
    def follows_ode(self) -> bool:
        """Whether there is a converged image to compare with."""
        return not few_step(self.contract)

    @property
    def rounds(self) -> int:
        """How many batches all wishes make; every setting is drawn once in each."""
        return -(-len(self.wishes) // self.batch)

    def round(self, index: int) -> tuple[Request, ...]:
        """The wishes of a batch."""
        return self.wishes[index * self.batch : (index + 1) * self.batch]

    def draw(self, setting: Setting, wishes: Sequence[Request], watch: Watch | None = None) -> list[Result]:
        """The images of these wishes as one batch."""
        return generate_batch(self.models[setting.dtype], [setting.request(wish) for wish in wishes], watch)

    def identity(self, setting: Setting, wishes: Sequence[Request]) -> dict[str, Any]:
        """Everything that a result depends on, as plain data: weights, contract, requests, noise, machine, software."""
        model = self.models[setting.dtype]
        return {
            "requests": [{**record(model, setting.request(wish)), "seed": wish.seed} for wish in wishes],
            "contract": model.contract.model_dump(mode="json"),
            "machine": machine(model),
        }


def machine(model: Model) -> dict[str, Any]:
    """Where seconds were measured."""
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        "device": model.device.type, "gpu": gpu, "processor": processor(), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def wishes(
    model: Model, base: Request, count: int, prompts: Sequence[str] = (), labels: Sequence[int | str] = ()
) -> tuple[Request, ...]:
    """`count` wishes that take prompts or labels in turns, image i with the base's seed + i.

    A model with classes draws all of them where none is named. InputError where a model of text is told nothing, for
    guidance by nothing would change nothing.
    """
    classes = model.contract.classes
    if not prompts and not labels:
        if classes is not None and model.text is None:
            labels = range(len(classes.names)) if len(classes.names) <= count else spread(len(classes.names), count)
        elif model.text is not None:
            raise InputError("this model reads text: give at least one --prompt, or --data with captions")
    told = [(text, label) for text in prompts or ("",) for label in labels or (None,)]
    return tuple(
        replace(base, prompt=text, label=label, seed=base.seed + i, count=1)
        for i, (text, label) in zip(range(count), told * -(-count // len(told)), strict=False)
    )


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` places, evenly."""
    return [i * total // count for i in range(count)]
