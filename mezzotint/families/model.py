"""A model: the parts that belong together and the contract that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from mezzotint.codec import Codec
from mezzotint.conditioning import Conditioning
from mezzotint.contract import Contract
from mezzotint.layers.pages import Pages
from mezzotint.process import Process
from mezzotint.text import TextEncoder

PartName = Literal["text", "backbone", "codec"]
Network = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]  # as a backbone is asked: see below
Engine = Callable[[nn.Module], AbstractContextManager[Network]]  # who computes a backbone while a path is walked


@dataclass(frozen=True, slots=True)
class Model:
    """What `load` returns and `generate` takes; training makes one of its parts to preview and to save."""

    contract: Contract
    backbone: nn.Module  # backbone(x (B, C, h, w), t (B,), conditioning) -> raw (B, C or 2C, h, w)
    codec: Codec
    text: TextEncoder | None = None
    path: Path | None = None  # where it was read from
    works_on: torch.device | None = None  # set where parts rest on the CPU and come here while they are in use

    @property
    def family(self) -> str:
        return self.contract.family

    @property
    def process(self) -> Process:
        return self.contract.process

    @property
    def device(self) -> torch.device:
        return self.works_on or self._first().device

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    def networks(self, part: PartName) -> Mapping[str, nn.Module]:
        """The networks of a part by name."""
        if part == "text":
            return self.text.networks if self.text else {}
        return {part: self.backbone if part == "backbone" else self.codec.autoencoder}

    def _first(self) -> torch.Tensor:
        return cast("torch.Tensor", next(self.backbone.parameters()))


def placed(model: Model, device: str | torch.device, offload: bool) -> Model:
    """The model with its parts on the device, or resting on the CPU and coming there while they work."""
    if offload:
        return replace(model, works_on=torch.device(device))
    model.backbone.to(device)
    model.codec.autoencoder.to(device)
    if model.text is not None:
        model.text.to(device)
    return model


@contextmanager
def working(model: Model, part: PartName) -> Iterator[None]:
    """Keep a part where the work is done for the length of the block, where the model was loaded with `offload`.

    The resting tensors stay what they are and are put back afterwards; those that are mapped from files give their
    memory back, to be read again when next needed.
    """
    if model.works_on is None:
        yield
        return
    resting: list[tuple[Any, str, torch.Tensor]] = []
    moved: dict[int, torch.Tensor] = {}  # one tensor may have several names
    for store, name, tensor in places(model.networks(part).values()):
        resting.append((store, name, tensor))
        if id(tensor) not in moved:
            there = tensor.detach().to(model.works_on)
            moved[id(tensor)] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
        store[name] = moved[id(tensor)]
    try:
        yield
    finally:
        pages = Pages()
        for store, name, tensor in resting:
            store[name] = tensor
            pages.release(tensor)


def places(networks: Iterable[nn.Module]) -> list[tuple[Any, str, torch.Tensor]]:
    """Where every parameter and buffer is kept: the table, the name in it, the tensor."""
    tables: list[Any] = []
    for network in networks:
        for module in network.modules():
            tables += [module._parameters, module._buffers]
    return [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
