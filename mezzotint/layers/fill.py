"""From tensors to a network: built without memory, filled in place, nothing missing and nothing left over."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from mezzotint.errors import InputError, NotFinite
from mezzotint.layers.pages import Pages

Network = TypeVar("Network", bound=nn.Module)

LARGEST = 2**22  # no count or width in a published configuration comes near it
AT_ONCE = 2**21  # numbers converted and checked before the memory they came from is given back


def fill(
    build: Callable[[], Network],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    at: object,
    device: str | torch.device = "cpu",
    complete: Callable[[Network], None] = lambda network: None,
) -> Network:
    """Build a network on the meta device and put the tensors in place, as `dtype` on `device`, in evaluation mode.

    `dtype` None keeps what is stored. `complete` computes what is in no file (tables of rotary embeddings). Weights
    already as wanted are not copied. Others are converted one after the other, and the memory of what was mapped from
    a file is given back on the way: the peak is the result itself and little more. InputError, which begins with `at`,
    lists missing, unexpected and misshapen tensors briefly, and names the first one that holds NaN or infinite numbers.
    """
    network = _built(build, len(tensors), at)
    expected = network.state_dict()
    problems = [
        _listing("missing", sorted(expected.keys() - tensors.keys())),
        _listing("unexpected", sorted(tensors.keys() - expected.keys())),
        _listing("of another shape", _misshapen(expected, tensors)),
        _listing("of another kind", _of_another_kind(expected, tensors)),
    ]
    if any(problems):
        raise InputError(f"{at} does not fit its configuration: {'; '.join(p for p in problems if p)}")
    pages, ready = Pages(), dict[str, Tensor]()
    for name, tensor in tensors.items():
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        ready[name] = _placed(f"{at}: the tensor {name}", tensor.detach(), wanted, torch.device(device), pages)
    network.load_state_dict(ready, strict=True, assign=True)
    complete(network)
    adrift = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if adrift:  # a buffer outside the state dict must be computed in forward, or it would be garbage here
        raise ValueError(f"{type(network).__name__} keeps non-persistent buffers: {adrift}")
    return network.eval().requires_grad_(False)


def configure(config: Any, settings: Mapping[str, Any], at: Path) -> Any:
    """A network's configuration (a dataclass with `from_config`) from JSON data; InputError names the file `at`."""
    try:
        for key, value in settings.items():
            _refuse_absurd(key, value)
        return config.from_config(settings)
    except (InputError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
        raise InputError(f"{at}: {error}") from error


def _refuse_absurd(key: str, value: object) -> None:
    """InputError for a whole number that could only be a count nobody can build, before anything is counted with it."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_absurd(key, item)
    elif isinstance(value, dict):
        for item in value.values():
            _refuse_absurd(key, item)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"'{key}' = {value:.6g} is beyond anything, no network can be built: use the published one")


def _built(build: Callable[[], Network], tensors: int, at: object) -> Network:
    try:
        with torch.device("meta"), _no_larger_than(tensors):
            return build()
    except (
        InputError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError, MemoryError,
    ) as error:  # fmt: skip
        raise InputError(f"{at}: no network can be built from its configuration: {error}") from error


@contextmanager
def _no_larger_than(tensors: int) -> Iterator[None]:
    """Stop a network that grows far beyond the tensors there are for it: a configuration may ask for a billion layers.

    The bound leaves room, so that a network that merely does not fit is built and compared name by name.
    """
    mine, most, seen = threading.get_ident(), 4 * tensors + 400, 0

    def count(module: nn.Module, name: str, added: Any) -> None:
        nonlocal seen
        seen += threading.get_ident() == mine
        if seen > most:
            raise InputError(f"it asks for far more than the {tensors} tensors there are")

    hooks = [
        registry.register_module_parameter_registration_hook(count),
        registry.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _placed(what: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, pages: Pages) -> Tensor:
    """A tensor as `dtype` on `device`: itself if it is that already, else converted as its mapped memory is freed."""
    if tensor.dtype == dtype and tensor.device == device:
        _refuse_not_finite(what, tensor, tensor)
        return tensor
    result = torch.empty_like(tensor, dtype=dtype, device=device)
    for numbers, place in _in_order(tensor, result, AT_ONCE):
        place.copy_(numbers)
        if not _bounded(place):
            _refuse_not_finite(what, place, numbers)
        pages.release(numbers)
    return result


def _in_order(source: Tensor, target: Tensor, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of about so many numbers of two tensors, place for place, in the order of the source's memory."""
    if not source.numel():
        return
    axes = sorted(range(source.ndim), key=lambda axis: -source.stride(axis))
    source, target = source.permute(axes), target.permute(axes)
    if source.is_contiguous() and target.is_contiguous():
        source, target = source.view(-1), target.view(-1)
    rows = max(1, numbers * len(source) // source.numel())
    yield from zip(source.split(rows), target.split(rows), strict=True)


def _refuse_not_finite(what: str, numbers: Tensor, source: Tensor) -> None:
    """InputError where `numbers`, converted from `source`, hold NaN or Inf: one pass that allocates nothing."""
    if _finite(numbers):
        return
    if _finite(source):
        kind = str(numbers.dtype).removeprefix("torch.")
        raise InputError(f"{what} reaches {source.abs().max():.3g}, too large for {kind}: use float32 or bfloat16")
    raise NotFinite(f"{what} holds NaN or infinite numbers: the file is damaged or its training failed. Use another.")


def _finite(numbers: Tensor) -> bool:
    if not numbers.is_floating_point():
        return True
    return all(_bounded(piece) for piece, _ in _in_order(numbers, numbers, AT_ONCE))


def _bounded(piece: Tensor) -> bool:
    """Whether a piece holds numbers only: its least and its largest are finite, for NaN wins over every number."""
    if not piece.is_floating_point():
        return True
    least, largest = torch.aminmax(piece.float() if piece.itemsize == 1 else piece)
    return math.isfinite(least.item()) and math.isfinite(largest.item())


def _misshapen(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    both = sorted(expected.keys() & tensors.keys())
    return [
        f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}"
        for name in both
        if tensors[name].shape != expected[name].shape
    ]


def _of_another_kind(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    both = sorted(expected.keys() & tensors.keys())
    return [
        f"{name} {str(tensors[name].dtype).removeprefix('torch.')}"
        for name in both
        if tensors[name].is_floating_point() != expected[name].is_floating_point()
    ]


def _listing(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{more})" if names else ""
