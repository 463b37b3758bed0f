"""Several adapters on one network, each on the rows of a batch that are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.adapters.apply import AdaptedConv2d, AdaptedLinear, sharing

Network = TypeVar("Network", bound=nn.Module)
Adapted = AdaptedLinear | AdaptedConv2d


@dataclass
class Places:
    """Which rows of the batch at hand belong to which network: (network, first row, row after the last)."""

    rows: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])


@dataclass(frozen=True)
class Joint(Generic[Network]):
    """A network that computes as each of several networks does, on their rows."""

    network: Network
    places: Places

    def place(self, networks: Sequence[int], counts: Sequence[int]) -> None:
        """Say whose the rows of the next batch are: for each stretch the network's number and its count of rows."""
        first = 0
        self.places.rows.clear()
        for number, count in zip(networks, counts, strict=True):
            self.places.rows.append((number, first, first + count))
            first += count


def joint(base: Network, twins: Sequence[Network]) -> Joint[Network]:
    """The base and networks that `attach` made of it as one: W x is computed once, what adapters add on their own rows.

    It shares every tensor with them. A batch must lie in the first dimension of whatever the touched modules read.
    """
    network, places = sharing(base), Places()
    touched: dict[str, dict[int, Adapted]] = {}
    for number, twin in enumerate(twins):
        for name, module in twin.named_modules():
            if isinstance(module, (AdaptedLinear, AdaptedConv2d)):
                touched.setdefault(name, {})[number] = module
    for name, changes in touched.items():
        module = base.get_submodule(name)
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        network.set_submodule(name, Rows(module, changes, places))
    return Joint(network, places)


class Rows(nn.Module):
    """A layer of the base, with the changes of each network on its rows."""

    def __init__(self, base: nn.Linear | nn.Conv2d, changes: dict[int, Adapted], places: Places) -> None:
        super().__init__()
        self.base, self.places = base, places
        self.changes = changes  # no submodules: they are the twins' own

    def forward(self, input: Tensor) -> Tensor:
        base = self.base
        plain = F.linear(input, base.weight) if isinstance(base, nn.Linear) else base._conv_forward(
            input, base.weight, None
        )  # fmt: skip
        bias = 0 if base.bias is None else base.bias if isinstance(base, nn.Linear) else base.bias[:, None, None]
        y = plain + bias
        for number, first, last in self.places.rows:
            change = self.changes.get(number)
            if change is not None:
                y[first:last] = change.on(input[first:last], plain[first:last])
        return y
