"""New words: rows of their own behind a frozen table of token vectors (Gal et al. 2022, section 3.1)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import InputError
from mezzotint.text.vocabulary import Vocabulary

Network = TypeVar("Network", bound=nn.Module)
Words = Mapping[str, Mapping[str, Tensor]]  # (n, D) of each new word, by the folder of the encoder that reads them


class Rows(nn.Module):
    """e(i) = weight[i] for i < first, rows[i - first] from there on; no gradient ever reaches `weight` (V, D).

    `rows` (K, D) keep their own dtype, so that they can learn in float32 beside a narrower table.
    """

    def __init__(self, weight: nn.Parameter, rows: Tensor, first: int) -> None:
        super().__init__()
        self.weight, self.first = weight, first
        self.rows = nn.Parameter(rows.detach().to(weight.device), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        given = F.embedding(ids.clamp(max=self.first - 1), self.weight.detach())  # (..., D)
        learned = F.embedding((ids - self.first).clamp(min=0), self.rows).to(given.dtype)  # (..., D)
        return torch.where((ids < self.first)[..., None], given, learned)

    def whole(self) -> Tensor:
        """One table (first + K, D); rows of `weight` that no token has are gone."""
        return torch.cat((self.weight[: self.first].detach(), self.rows.detach().to(self.weight.dtype)))


def with_rows(network: Network, place: str, rows: Tensor, first: int) -> Network:
    """The same network, every tensor shared, that reads `rows` (K, D) from number `first` on at `place`."""
    tensors = [*network.parameters(), *network.buffers()]
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    table = twin.get_submodule(place)
    known = nn.Parameter(table.whole(), requires_grad=False) if isinstance(table, Rows) else table.weight
    twin.set_submodule(place, Rows(cast("nn.Parameter", known), rows, first))
    return twin


def learned(network: nn.Module) -> dict[str, Rows]:
    """Every table with new words in a network, by its place."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Rows)}


def whole(network: nn.Module) -> dict[str, Tensor]:
    """The state dict with new words as rows of their table, as a file or a digest has them."""
    tensors: dict[str, Tensor] = network.state_dict()
    for place, table in learned(network).items():
        tensors[f"{place}.weight"] = table.whole()
        del tensors[f"{place}.rows"]
    return tensors


def matrices(words: Words, folder: str, width: int, name: str) -> dict[str, Tensor]:
    """The rows (n, D) of every new word for one encoder; InputError where they are missing or do not fit."""
    found: dict[str, Tensor] = {}
    for word, vectors in words.items():
        rows = vectors.get(folder)
        if rows is None:
            raise InputError(f"the new word {word} has no vectors for {name}")
        if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
            shape = tuple(rows.shape)
            raise InputError(f"the new word {word} has vectors of shape {shape}; {name} reads (n, {width})")
        found[word] = rows
    return found


def spread_out(words: Mapping[str, Tensor]) -> list[str]:
    """The tokens of new words in the order of their rows: a word with several is read as `<x><x>_1...`.

    Textual inversion files of several vectors are read so.
    """
    return [token for word, rows in words.items() for token in (word, *(f"{word}_{i}" for i in range(1, len(rows))))]


def grown(
    network: Network, place: str, vocabulary: Vocabulary, words: Words, folder: str, name: str
) -> tuple[Network, Vocabulary]:
    """A network and its vocabulary with new words, numbered on from the last one; both given ones stay as they are."""
    table = cast("Tensor", network.get_submodule(place).weight)
    rows = matrices(words, folder, table.shape[1], name)
    first, room = len(vocabulary.tokenizer), size(network, place)
    if first > room:
        raise InputError(f"{name} has {room} rows for {first} tokens, so new ones have no place of their own")
    return with_rows(network, place, torch.cat(list(rows.values())), first), vocabulary.with_words(spread_out(rows))


def size(network: nn.Module, place: str) -> int:
    """How many rows a table has, new ones included."""
    table = network.get_submodule(place)
    return table.first + len(table.rows) if isinstance(table, Rows) else len(cast("Tensor", table.weight))


def vectors_at(network: nn.Module, place: str, ids: list[int]) -> Tensor:
    """The vectors (k, D) of tokens."""
    table = network.get_submodule(place)
    with torch.no_grad():
        return table(torch.tensor(ids, device=cast("Tensor", table.weight).device))
