"""The network on the user's images under other captions or labels: none, and another image's."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.conditioning import Conditioning
from mezzotint.data.folder import NO_LABEL
from mezzotint.doctor import readings
from mezzotint.doctor.case import Case
from mezzotint.doctor.readings import MIDDLE, Reading, Score

OWN, NOTHING, ANOTHER = "its caption", "no caption", "another's caption"  # what steers


def wishes(case: Case) -> list[str]:
    """What is said of each image: its caption, or its label where the model has classes and no text."""
    if case.model.text is not None:
        return list(case.images.captions)
    return ["" if label == NO_LABEL else str(label) for label in case.images.labels.tolist()]


def steered(case: Case, name: str, steering: Conditioning, draw: int = 0) -> tuple[Reading, list[readings.Answer]]:
    """The claimed reading but for what steers it, and the answers at the middle ratios; asked once for each name."""
    claim, n = readings.claimed(case).named(name, steering=steering), len(case.usable)
    asked = case.once(f"answers with {name}, {draw}", lambda: readings.raw_of(case, claim, MIDDLE, n, draw))
    return claim, asked


def unsteered(case: Case) -> Score:
    """How well the network denoises the user's images without captions and labels, at the middle ratios."""
    return readings.judged(*steered(case, NOTHING, case.unsteered), MIDDLE)


def swapped(case: Case) -> Score:
    """How well it does with the caption or label of another image."""
    return readings.judged(*steered(case, ANOTHER, exchanged(case)), MIDDLE)


def exchanged(case: Case, draw: int = 0) -> Conditioning:
    """The conditioning with each image's caption or label replaced by another image's different one."""
    rows = mismatched(wishes(case), draw)
    return case.once(f"exchanged {draw}", lambda: case.steering.map(lambda tensor: tensor[rows]))


def mismatched(words: list[str], draw: int = 0) -> Tensor:
    """For each image another one with another caption, in a fixed order; another order for every draw."""
    n = len(words)
    found = torch.arange(n)
    for i in range(n):
        for step in range(1 + 3 * draw, n + 3 * draw):
            j = (i + step * 7) % n if n % 7 else (i + step) % n
            if words[j] != words[i]:
                found[i] = j
                break
    return found
