"""Every image under every caption or label: which one the network takes it for."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from mezzotint.doctor import readings, trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.readings import MIDDLE, Reading
from mezzotint.doctor.statistics import mean

MOST = 8  # captions or labels that every image is tried with
HELPS = 0.02  # gain in log error of another caption, from which it is understood


def exchanged(case: Case, words: list[str]) -> bool:
    """Whether images of some captions or labels would all do better under another one, as where some were exchanged.

    Which one that is for each is told by one noise and judged by the other, so that what is best by chance gains
    nothing.
    """
    known, own, tables = every(case, words)
    gains = torch.zeros(len(words))
    for i in range(len(known)):
        mine = own == i
        for chosen, judge in ((0, 1), (1, 0)):
            to = int(tables[chosen][mine].mean(0).argmin())
            gains[mine] += (tables[judge][mine, i] - tables[judge][mine, to]) / 2
    gain = mean(gains[own >= 0])
    return gain.low > 0 and gain.value > HELPS


def every(case: Case, words: list[str]) -> tuple[list[str], Tensor, list[Tensor]]:
    """The D commonest captions or labels, which is each image's (N,), -1: none, and two tables (N, D) of errors."""

    def run() -> tuple[list[str], Tensor, list[Tensor]]:
        known = [word for word, _ in Counter(words).most_common(MOST)]
        own = torch.tensor([known.index(word) if word in known else -1 for word in words])
        return known, own, [_table(case, trials.own(case).reading, words, known, draw) for draw in (1, 2)]

    return case.once("every caption", run)


def _table(case: Case, claim: Reading, words: list[str], known: list[str], draw: int) -> Tensor:
    """(N, D) log error of each image with each caption, by one noise."""
    columns: list[Tensor] = []
    for word in known:
        rows = torch.full((len(words),), words.index(word))
        columns.append(
            error(case, claim.named(word, steering=case.steering.map(lambda tensor, rows=rows: tensor[rows])), draw)
        )
    return torch.stack(columns, 1)


def error(case: Case, reading: Reading, draw: int) -> Tensor:
    """(N,) log error of each image by one noise."""
    return readings.score(case, reading, MIDDLE[1::2], draw=draw).log_error.mean(1)
