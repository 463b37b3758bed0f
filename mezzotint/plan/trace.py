"""What a computation costs, found by running it on tensors without numbers.

The real modules run under `FakeTensorMode`: every operator is dispatched as on the CPU (the attention kernel is chosen,
autograd saves and frees) but nothing is computed and nothing allocated. What is counted is therefore the true graph:
its operations, the bytes that its operators read and write, and which storages are alive at the same time.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mezzotint.backbones import dit, flux2
from mezzotint.families.model import places
from mezzotint.layers.operators import kind_of
from mezzotint.plan.operators import Call, shape_of

Network = TypeVar("Network", bound=nn.Module)
aten = torch.ops.aten
LOOKING = ("prim::device", "aten::detach", "aten::lift_fresh", "aten::_local_scalar_dense")  # that touch no number
MAKING = ("empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided")  # that write none


@dataclass(frozen=True, slots=True)
class Traced:
    """The cost of one run."""

    calls: Mapping[Call, float]  # equal calls with their number
    peak: int  # bytes: the largest sum of storages alive at once, what was there before apart
    at_peak: Mapping[str, int]  # the same by what it is: activations, gradients, workspace
    kept: int  # bytes still alive at the end

    @property
    def flops(self) -> float:
        """Floating-point operations of convolutions, attention and linear layers, a multiply and an add being two."""
        return sum(call.flops * count for call, count in self.calls.items())

    @property
    def by_kind(self) -> dict[str, float]:
        """Floating-point operations by kind of operator, the largest first."""
        found: dict[str, float] = {}
        for call, count in self.calls.items():
            if call.flops:
                found[call.kind] = found.get(call.kind, 0.0) + call.flops * count
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def operators(self) -> float:
        """Calls that do any work."""
        return sum(self.calls.values())


@contextmanager
def imagined() -> Iterator[FakeTensorMode]:
    """Tensors made inside have shapes, types and lifetimes and no numbers; what modules cache is kept apart."""
    tables = (dit.position_table, flux2.position_table)
    for table in tables:
        table.cache_clear()
    try:
        with FakeTensorMode() as mode:
            yield mode
    finally:
        for table in tables:
            table.cache_clear()


@contextmanager
def outlined() -> Iterator[None]:
    """Tensors made inside are on the meta device, also where others are imagined: the shapes of networks."""
    with unset_fake_temporarily(), torch.device("meta"):
        yield


def imaginary(outline: Network, dtype: torch.dtype, trains: bool | None = False) -> Network:
    """A network of the shape of one on the meta device, in `dtype`, its tensors made inside `imagined`.

    `trains` None leaves it to the outline which parameters do, and those are float32. What is shared in the outline is
    shared in it. Tables that are computed from settings stay float32.
    """
    tensors = [*outline.parameters(), *outline.buffers()]
    network = copy.deepcopy(outline, {id(tensor): tensor for tensor in tensors})
    stored = {id(tensor) for tensor in network.state_dict(keep_vars=True).values()}
    made: dict[int, Tensor] = {}
    for table, name, tensor in places([network]):
        if id(tensor) not in made:
            moves = tensor.requires_grad if trains is None else trains
            wanted = dtype if tensor.is_floating_point() and id(tensor) in stored else tensor.dtype
            fresh = torch.empty(tensor.shape, dtype=torch.float32 if trains is None and moves else wanted)
            made[id(tensor)] = nn.Parameter(fresh, moves) if isinstance(tensor, nn.Parameter) else fresh
        table[name] = made[id(tensor)]
    return network if trains is None else network.train(trains)


def trace(
    act: Callable[[], object], given: Iterable[Tensor] = (), gradients: Callable[[], Iterable[Tensor]] = tuple,
    workspace: Callable[[Call, Sequence[Tensor], Sequence[Tensor]], int] | None = None,
) -> Traced:  # fmt: skip
    """Run `act` inside `imagined` and say what it costs.

    `given` are tensors that were there before and are counted elsewhere (weights); `gradients` names, after the run,
    those that are gradients of weights. `workspace` says how many bytes a kernel takes while it runs besides what it
    returns.
    """
    watching = _Watching(workspace)
    for tensor in given:
        watching.know(tensor)
    with watching:
        result = act()
    keys = {_key(tensor) for tensor in gradients()}
    found = watching.summary(keys)
    del result
    return found


class _Watching(TorchDispatchMode):
    """Counts operators and follows storages from their first appearance to their death."""

    def __init__(self, workspace: Callable[[Call, Sequence[Tensor], Sequence[Tensor]], int] | None) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.workspace = workspace
        self.alive: dict[int, tuple[Any, int, int]] = {}  # storage: reference, number, bytes
        self.events: list[tuple[int, int]] = []  # (number of the storage, bytes; negative where it dies)
        self.born = 0

    def know(self, tensor: Tensor) -> None:
        """Follow a storage without counting it."""
        self._follow(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.name().partition(".")[0] in LOOKING:
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._follow(tensor)
        if func.overloadpacket.__name__ not in MAKING and not _looks(func, inputs, outputs):
            self._count(func, args, kwargs, out, inputs, outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if kwargs.get("approximate") == "tanh":  # several times slower than the exact one on some processors
            name += "_tanh"
        formula = flop_registry.get(func.overloadpacket)
        flops = 0.0 if formula is None else formula(*args, **kwargs, out_val=out)
        moved = sum(t.numel() * t.itemsize for t in inputs) + sum(t.numel() * t.itemsize for t in outputs)
        first = next((t for t in (*outputs, *inputs) if t.is_floating_point()), None)
        dtype = "float32" if first is None else str(first.dtype).removeprefix("torch.")
        call = Call(name, kind_of(name), dtype, shape_of(name, inputs, outputs), float(flops), float(moved))
        self.calls[call] += 1
        extra = self.workspace(call, inputs, outputs) if self.workspace else 0
        if extra:
            self.events += [(-1, extra), (-1, -extra)]

    def _follow(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes() if counted else 0
        number = self.born = self.born + 1
        self.events.append((number, size))

        def gone(_: object) -> None:
            self.alive.pop(key, None)
            self.events.append((number, -size))

        self.alive[key] = weakref.ref(storage, gone), number, size

    def summary(self, gradients: set[int]) -> Traced:
        """The peak and what it is made of, from the events in their order."""
        marked = {self.alive[key][1] for key in gradients if key in self.alive}
        now, peak, at = 0, 0, 0
        for place, (_, size) in enumerate(self.events):
            now += size
            if now > peak:
                peak, at = now, place
        parts: Counter[str] = Counter()
        for number, size in self.events[: at + 1]:
            what = "workspace" if number < 0 else "gradients" if number in marked else "activations"
            parts[what] += size
        at_peak = {what: size for what, size in parts.items() if size}
        return Traced(dict(self.calls), peak, at_peak, now)


def _looks(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operator only gives a tensor another shape: it changes nothing and returns a storage it was given."""
    if func._schema.is_mutable:
        return False
    known = {_key(tensor) for tensor in inputs}
    return bool(outputs) and all(_key(tensor) in known for tensor in outputs)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
