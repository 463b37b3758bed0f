"""A model: the parts that belong together and the contract that says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mezzotint.codec import Codec
from mezzotint.contract import Contract
from mezzotint.process import Process
from mezzotint.text import TextEncoder

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Model:
    """What `load` returns and `generate` takes; training makes one of its parts to preview and to save."""

    contract: Contract
    backbone: nn.Module  # backbone(x (B, C, h, w), t (B,), conditioning) -> raw (B, C or 2C, h, w)
    codec: Codec
    text: TextEncoder | None = None
    path: Path | None = None  # where it was read from

    @property
    def family(self) -> str:
        return self.contract.family

    @property
    def process(self) -> Process:
        return self.contract.process

    @property
    def device(self) -> torch.device:
        return self._first().device

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    def _first(self) -> torch.Tensor:
        return cast("torch.Tensor", next(self.backbone.parameters()))
