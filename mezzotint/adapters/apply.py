"""Adapters on a network: computed beside it, or merged into its weights; the given network stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.adapters.lowrank import Adapter, LowRank

Network = TypeVar("Network", bound=nn.Module)
Weighted = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True, slots=True)
class Delta:
    """W' = gain W + up down: all adapters of one module in one, in float32."""

    down: Tensor  # (R, in, ...), R the sum of the ranks
    up: Tensor  # (out, R), scales and weights multiplied in
    gain: Tensor | None  # (out,), where there are magnitudes

    def merged(self, weight: Tensor) -> Tensor:
        """W', computed in float32 and stored as W is."""
        base = weight.float()
        if self.gain is not None:
            base = base * _column(self.gain, base.ndim)
        return (base + _product(self.up, self.down)).to(weight.dtype)


def attach(network: Network, part: str, adapters: Weighted) -> Network:
    """A network that computes W x + scale up(down(x)) where `adapters` touch it, at their weights.

    It shares every tensor with the given network, which is not changed: requests with different adapters can use one
    model at the same time, and letting go of the result is all there is to undoing it. Adapters of weight 0 are left
    out. A module with a magnitude follows peft: the weight multiplies `scale` within the norm.
    """

    def adapted(module: nn.Module, delta: Delta) -> nn.Module:
        match module:
            case nn.Linear() if type(module) is nn.Linear:
                return AdaptedLinear(module, delta)
            case nn.Conv2d() if type(module) is nn.Conv2d and module.groups == 1:
                return AdaptedConv2d(module, delta)
        raise ValueError(f"a {type(module).__name__} cannot compute with adapters beside it; merge them instead")

    return _changed(network, part, adapters, adapted)


def merge(network: Network, part: str, adapters: Weighted) -> Network:
    """A network with weights W + sum of weight scale up down, as fast as the base.

    The base's own tensors are not written to, so the base comes back to the bit by using it; tensors that no adapter
    touches are shared.
    """

    def merged(module: nn.Module, delta: Delta) -> nn.Module:
        weight = getattr(module, "weight")  # noqa: B009 - any module with a weight
        _replace(module, "weight", nn.Parameter(delta.merged(weight), requires_grad=False))
        return module

    return _changed(network, part, adapters, merged)


class AdaptedLinear(nn.Linear):
    """y = gain (W x) + b + up(down(x)); a linear layer in all but what it computes."""

    down: Tensor
    up: Tensor
    gain: Tensor | None

    def __init__(self, base: nn.Linear, delta: Delta) -> None:
        nn.Module.__init__(self)
        _take_over(self, base, delta)

    def forward(self, input: Tensor) -> Tensor:
        if self.gain is None:
            return F.linear(input, self.weight, self.bias) + self.side(input)
        return self.on(input, F.linear(input, self.weight))

    def side(self, input: Tensor) -> Tensor:
        return F.linear(F.linear(input, self.down), self.up)

    def on(self, input: Tensor, plain: Tensor) -> Tensor:
        """y, where W x is known."""
        y = (plain if self.gain is None else plain * self.gain) + self.side(input)
        return y if self.bias is None else y + self.bias


class AdaptedConv2d(nn.Conv2d):
    """The same for a convolution: down has its kernel, stride and padding, up is pointwise."""

    down: Tensor
    up: Tensor
    gain: Tensor | None

    def __init__(self, base: nn.Conv2d, delta: Delta) -> None:
        nn.Module.__init__(self)
        _take_over(self, base, delta)

    def forward(self, input: Tensor) -> Tensor:
        if self.gain is None:
            return self._conv_forward(input, self.weight, self.bias) + self.side(input)
        return self.on(input, self._conv_forward(input, self.weight, None))

    def side(self, input: Tensor) -> Tensor:
        return F.conv2d(self._conv_forward(input, self.down, None), self.up[..., None, None])

    def on(self, input: Tensor, plain: Tensor) -> Tensor:
        """y, where W x is known."""
        y = (plain if self.gain is None else plain * self.gain[:, None, None]) + self.side(input)
        return y if self.bias is None else y + self.bias[:, None, None]


def combine(weight: Tensor, changes: Sequence[tuple[LowRank, float]]) -> Delta:
    """All low-rank changes of one weight, each with its weight w, as one: ranks add up, in float32.

    A change with a magnitude m is, with V = W + w scale up down and g = m / |V| (rows), (g - 1) W + g w scale up down.
    """
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    gain: Tensor | None = None
    for low, strength in changes:
        down = low.down.to(weight.device, torch.float32)
        up = low.up.to(weight.device, torch.float32).flatten(1) * (strength * low.scale)  # (out, r)
        if low.magnitude is not None:
            norm = (weight.float() + _product(up, down)).flatten(1).norm(dim=1)  # (out,)
            own = low.magnitude.to(norm) / norm
            up = own[:, None] * up
            gain = own if gain is None else gain + own - 1
        downs.append(down)
        ups.append(up)
    return Delta(torch.cat(downs), torch.cat(ups, dim=1), gain)


def _changed(
    network: Network, part: str, adapters: Weighted, change: Callable[[nn.Module, Delta], nn.Module]
) -> Network:
    """A twin of the network with `change` made to each module that is touched."""
    touched: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, strength in adapters:
        for low in adapter.parts.get(part, ()) if strength != 0 else ():
            touched.setdefault(low.module, []).append((low, strength))
    if not touched:
        return network
    twin = sharing(network)
    with torch.no_grad():
        for name, changes in touched.items():
            module = twin.get_submodule(name)
            if isinstance(module, (AdaptedLinear, AdaptedConv2d)):
                raise ValueError(f"{name} already computes with adapters: give all of them in one call, on the base")
            delta = combine(getattr(module, "weight"), changes)  # noqa: B009 - any module with a weight
            twin.set_submodule(name, change(module, delta))
    return twin


def sharing(network: Network) -> Network:
    """A copy of every module that shares every tensor."""
    tensors: Iterable[Tensor] = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def _take_over(module: nn.Module, base: nn.Module, delta: Delta) -> None:
    """Become `base`, its tensors included, with a delta beside them; the state dict stays that of the base."""
    module.__dict__.update(base.__dict__)
    weight: Tensor = getattr(base, "weight")  # noqa: B009 - linear or convolution
    for name, tensor in (("down", delta.down), ("up", delta.up), ("gain", delta.gain)):
        module.register_buffer(name, None if tensor is None else tensor.to(weight.dtype), persistent=False)


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    delattr(module, name)
    module.register_parameter(name, parameter)


def _column(vector: Tensor, axes: int) -> Tensor:
    return vector.reshape(-1, *[1] * (axes - 1))


def _product(up: Tensor, down: Tensor) -> Tensor:
    """up down, with the kernel of `down`: (out, r), (r, in, ...) -> (out, in, ...)."""
    return (up @ down.flatten(1)).unflatten(1, down.shape[1:])
