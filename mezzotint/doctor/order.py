"""In which order a network knows its latent channels: by what it draws, then by what it denoises better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SWEEPS = 8  # times that all pairs are tried


def likely(drawn: Tensor, given: Tensor) -> list[int]:
    """For each channel of what the network draws, the channel of what it is given that is most like it."""
    distance = ((signatures(drawn)[:, None] - signatures(given)[None]) ** 2).sum(-1)  # (C, C)
    order = [-1] * len(distance)
    for _ in range(len(distance)):  # the surest pair first
        row, column = divmod(int(distance.argmin()), len(distance))
        order[row] = column
        distance[row], distance[:, column] = math.inf, math.inf
    return order


def signatures(latents: Tensor) -> Tensor:
    """(C, F) of what tells channels apart: mean, deviation, skewness, and how alike neighbours are both ways."""
    x = latents.clamp(-20, 20)
    average, deviation = x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp(min=1e-6)
    z = (x - average.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    across = (z[..., :, 1:] * z[..., :, :-1]).mean((0, 2, 3))
    down = (z[..., 1:, :] * z[..., :-1, :]).mean((0, 2, 3))
    between = z.mean((2, 3)).std(0)  # how much of the variance is between images
    return torch.stack([average, 2 * deviation.log(), 0.5 * (z**3).mean((0, 2, 3)), 2 * across, 2 * down, between], 1)


def exchanged(order: list[int], error: Callable[[list[int]], float]) -> list[int]:
    """The order to which exchanges of two channels lead that each lower the error of an order, from this one on.

    Every pair is tried; those that gain are made together where they share no channel, the best first. An order that
    is no better than none is left alone.
    """
    now, pairs = error(order), list(itertools.combinations(range(len(order)), 2))
    for _ in range(SWEEPS if now < error(list(range(len(order)))) else 0):
        gains = {pair: now - error(swapped(order, [pair])) for pair in pairs}
        chosen: list[tuple[int, int]] = []
        for pair in sorted(pairs, key=lambda pair: -gains[pair]):
            if gains[pair] > 0 and not {*pair} & {*itertools.chain(*chosen)}:
                chosen.append(pair)
        then = now
        while chosen and (then := error(swapped(order, chosen))) >= now:  # together they may do less than alone
            chosen = chosen[: len(chosen) // 2]
        if not chosen:
            break
        order, now = swapped(order, chosen), then
    return order


def swapped(order: list[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The order with the two of each pair exchanged."""
    found = list(order)
    for a, b in pairs:
        found[a], found[b] = found[b], found[a]
    return found
