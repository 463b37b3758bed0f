"""Low-rank changes that train: put beside a network's matrices by peft, and taken out again as an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mezzotint.adapters.apply import sharing
from mezzotint.adapters.family import family
from mezzotint.adapters.header import base, prediction, words
from mezzotint.adapters.keys import Stored
from mezzotint.adapters.lowrank import Adapter, Facts, LowRank
from mezzotint.errors import InputError

Network = TypeVar("Network", bound=nn.Module)
NAME = "default"  # of peft's adapter within each layer


@dataclass(frozen=True, slots=True)
class Settings:
    """How strong and of what kind the changes are: W' = W + scale up down, scale = alpha / rank."""

    rank: int = 16
    alpha: float | None = None  # None: the rank, which is a scale of 1
    stabilised: bool = False  # scale = alpha / sqrt(rank) (Kalajdzievski 2023)
    magnitudes: bool = False  # DoRA (Liu et al. 2024)
    dropout: float = 0.0  # of what goes into `down`, while training

    @property
    def strength(self) -> float:
        """alpha as a number."""
        return float(self.rank if self.alpha is None else self.alpha)


def trainable(network: Network, modules: Sequence[str], settings: Settings, seed: int) -> Network:
    """A network in which low-rank changes of `modules` train, in float32, and nothing else.

    It has the class and the configuration of the given one and shares every tensor with it, so the given one goes on
    as the base, frozen. `down` starts random, a function of the seed alone, and `up` at zero: at the start it computes
    what the base does. It is in evaluation mode but for the dropout of the changes.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("training LoRA needs the package peft. Run: pip install 'mezzotint[train]'") from error
    found = sharing(network).eval().requires_grad_(False)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.strength,  # pyright: ignore[reportArgumentType] (any number will do)
        use_rslora=settings.stabilised, use_dora=settings.magnitudes, lora_dropout=settings.dropout,
        target_modules="|".join(map(re.escape, modules)),  # as an expression: a list would match by ending
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, found)
    layers = _layers(found)
    if layers.keys() != {*modules}:
        raise InputError(f"peft cannot change {', '.join(sorted({*modules} ^ layers.keys())[:3])} here.")
    for layer in layers.values():
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.float().requires_grad_(True)
        layer.lora_dropout.train()
    return found


def collect(
    networks: Mapping[str, nn.Module], settings: Settings, metadata: Mapping[str, str] | None = None
) -> Adapter:
    """The adapter in networks that `trainable` made, by part of the model, copied; `metadata` is for the header."""
    parts: dict[str, tuple[LowRank, ...]] = {}
    for part, network in networks.items():
        if layers := _layers(network):
            parts[part] = tuple(_change(name, layer, settings) for name, layer in layers.items())
    changes = [low for lows in parts.values() for low in lows]
    notes = dict(metadata or {})
    facts = Facts(
        format="peft",
        modules=len(changes),
        ranks=tuple(sorted({low.rank for low in changes})),
        scales=tuple(sorted({low.scale for low in changes})),
        parameters=sum(t.numel() for low in changes for t in (low.down, low.up, low.magnitude) if t is not None),
        magnitudes=settings.magnitudes,
        family=family([Stored(low.module, low.down, low.up, low.alpha, low.magnitude) for low in changes]),
        base=base(notes),
        prediction=prediction(notes),
        words=words(notes),
    )
    return Adapter(parts, facts, notes)


def _layers(network: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the module that each stands for."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def _change(name: str, layer: Any, settings: Settings) -> LowRank:
    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True).contiguous()

    magnitude = copied(layer.lora_magnitude_vector[NAME].weight).flatten() if settings.magnitudes else None
    down, up = (copied(half[NAME].weight) for half in (layer.lora_A, layer.lora_B))
    return LowRank(name, down, up, settings.strength, settings.stabilised, magnitude)
