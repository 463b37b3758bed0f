"""What the tests of the original layouts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mezzotint.checkpoints.keymap import Entry, renamed, restored


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert tensor.is_meta or torch.equal(found[name], tensor), name


def there_and_back(tensors: Mapping[str, Tensor], entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The original's tensors of a folder's, once both ways were seen to be inverse to the bit."""
    entries = list(entries)
    original = restored(tensors, entries)
    assert_same(renamed(original, entries), tensors)
    assert_same(restored(renamed(original, entries), entries), original)
    return original


def on_meta(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state dict of a network of any size, without its memory."""
    with torch.device("meta"):
        return build().state_dict()


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
