"""Randomness as a pure function of (seed, step): what a stopped run draws next does not depend on when it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mezzotint.data.folder import NO_LABEL


def number(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose of one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A fresh CPU generator for one purpose of one step."""
    return torch.Generator().manual_seed(number(seed, step, purpose))


def shuffled(seed: int, step: int, batch: int, count: int) -> Tensor:
    """Indices (batch,) of step 0, 1, ...: one permutation of `count` images after another, cut into batches."""
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // count, (last - 1) // count + 1)
    chain = torch.cat([_permutation(seed, epoch, count) for epoch in epochs])
    return chain[first - epochs[0] * count :][:batch]


def bucketed(seed: int, step: int, batch: int, counts: Sequence[int]) -> tuple[int, Tensor]:
    """The bucket of step 0, 1, ... and indices (batch,) into it, where a batch cannot mix buckets of counts[b] images.

    In a round bucket b has ceil(counts[b] / batch) batches, the order of all batches being shuffled; its k-th batch of
    the run is shuffled(seed + b, k, batch, counts[b]), so that one bucket draws what `shuffled` draws.
    """
    shares = tuple(-(-count // batch) for count in counts)
    turn, place = divmod(step, sum(shares))
    order = _order(seed, turn, shares)
    bucket = int(order[place])
    before = int((order[:place] == bucket).sum())
    return bucket, shuffled(seed + bucket, turn * shares[bucket] + before, batch, counts[bucket])


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, shares: tuple[int, ...]) -> Tensor:
    buckets = torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))
    return buckets[torch.randperm(len(buckets), generator=generator(seed, turn, "buckets"))]


@lru_cache(maxsize=16)  # two epochs of several buckets
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, epoch, "order"))


def balanced(seed: int, step: int, batch: int, labels: Tensor) -> Tensor:
    """Indices (batch,) whose labels are uniform over those that occur, drawn with replacement within a label.

    Images without a label are one class of their own.
    """
    kinds = labels.unique()
    turns = _turns(seed, step, batch, len(kinds))
    result = torch.empty(batch, dtype=torch.long)
    for place, kind in enumerate(kinds.tolist()):
        slots = (turns == place).nonzero().flatten()
        members = (labels == kind).nonzero().flatten()
        chosen = torch.randint(len(members), (len(slots),), generator=generator(seed, step, f"member {kind}"))
        result[slots] = members[chosen]
    return result


def _turns(seed: int, step: int, batch: int, kinds: int) -> Tensor:
    rng = generator(seed, step, "kinds")
    whole = torch.arange(batch - batch % kinds) % kinds
    rest = torch.randperm(kinds, generator=rng)[: batch % kinds]
    return torch.cat((whole, rest))[torch.randperm(batch, generator=rng)]


def dropped(values: Tensor, share: float, nothing: int, rng: torch.Generator) -> Tensor:
    """`values` (B,) with a share of them, and those that are not there, replaced by `nothing`."""
    drop = torch.rand(len(values), generator=rng) < share
    return torch.where(drop | (values == NO_LABEL), torch.full_like(values, nothing), values)
