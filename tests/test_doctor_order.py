"""The order of latent channels: by what they look like, and by exchanges that lower an error."""

from __future__ import annotations

import torch

from mezzotint.doctor.order import exchanged, likely

TRUTH = [5, 2, 7, 0, 3, 6, 1, 4]


def misplaced(order: list[int]) -> float:
    return float(sum(a != b for a, b in zip(order, TRUTH, strict=True)))


def test_channels_are_found_by_what_they_look_like() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(32, 8, 8, 8, generator=rng) + torch.arange(8.0).view(1, -1, 1, 1)
    given = torch.empty_like(drawn)
    given[:, TRUTH] = torch.randn(32, 8, 8, 8, generator=rng) + torch.arange(8.0).view(1, -1, 1, 1)
    assert likely(drawn, given) == TRUTH


def test_exchanges_lead_to_the_order_of_least_error() -> None:
    start = [2, 5, 7, 0, 3, 1, 4, 6]  # a pair and a ring of three are wrong
    assert exchanged(start, misplaced) == TRUTH


def test_exchanges_that_spoil_each_other_are_not_made_together() -> None:
    def error(order: list[int]) -> float:
        first, second, third = (order[2 * k] > order[2 * k + 1] for k in range(3))
        return 0.5 * (first and second) - (first != second) - third

    assert exchanged([0, 1, 2, 3, 5, 4], error) == [1, 0, 2, 3, 5, 4]


def test_an_order_that_is_no_better_than_none_is_left_alone() -> None:
    asked: list[list[int]] = []

    def error(order: list[int]) -> float:
        asked.append(order)
        return float(order != [0, 1, 2])

    assert exchanged([1, 2, 0], error) == [1, 2, 0] and len(asked) == 2
