"""The whole judgement of a set of painted images, as plain data for a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mezzotint.backbones import features
from mezzotint.backbones.features import Features
from mezzotint.evaluate.comparison import FEWEST, compare
from mezzotint.evaluate.copies import check
from mezzotint.evaluate.distances import Statistic, frechet, mmd, standardised
from mezzotint.evaluate.reference import Reference, grey

Watch = Callable[[str, int, int], None]  # what is being read, done, all


def distances(real: Features, others: dict[str, Features], seed: int = 0) -> dict[str, Any]:
    """Frechet distance and kernel MMD of every set of patch features from the real ones; {} for too few images."""
    usable = {name: other for name, other in others.items() if len(other) >= FEWEST}
    if len(real) < 2 * FEWEST or not usable:
        return {}
    result: dict[str, Any] = {"real": len(real)}
    for name, other in usable.items():
        pool = standardised(np.concatenate((real, other)), np.arange(len(real)))
        statistics: dict[str, Statistic] = {"frechet": frechet(pool), "mmd": mmd(pool)}
        result[name] = {
            measure: compare(statistic, len(real), len(other), seed).to_dict()
            for measure, statistic in statistics.items()
        }
    return result


def judge(
    painted: Sequence[Path],
    sources: Sequence[Path],
    masks: NDArray[np.bool_],
    real: Sequence[Path],
    training: Reference | None,
    width: int,
    height: int,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Compare painted images with real defects and with the training images.

    Beside the painted images their untouched sources are measured too: what painting moved is the difference. Sections
    that cannot be had (too few images, no training images at hand) are left out.
    """

    def look(what: str, paths: Sequence[Path]) -> tuple[Features, Features]:
        return features.of_images(paths, width, height, lambda done, all: watch(what, done, all) if watch else None)

    found: dict[str, Any] = {"feature": f"EfficientNet-Lite0 block {features.BLOCK}, patches of {features.CELL} pixels"}
    patches, prints = look("painted images", painted)
    before = sorted(set(sources))
    before_patches, before_prints = look("their sources", before)
    if real:
        real_patches, real_prints = look("real defects", real)
        found["distances"] = distances(real_patches, {"painted": patches, "unpainted": before_patches})
        held_out = np.concatenate((before_prints, real_prints))
    else:
        held_out = before_prints
    if training is not None and len(training.names) >= FEWEST:
        found["copies"] = asdict(
            check(
                [path.name for path in painted],
                grey(painted, width, height),
                grey(sources, width, height),
                masks,
                training.pixels,
                prints,
                held_out,
                training.prints,
            )
        )
    return found
