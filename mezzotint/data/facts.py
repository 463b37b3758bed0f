"""What a training folder is made of, as plain JSON data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mezzotint.data import buckets
from mezzotint.data.buckets import Size
from mezzotint.data.survey import Survey


def of(data: Survey, among: Sequence[Size], classes: Sequence[str] | None, tokens: list[int] | None) -> dict[str, Any]:
    """Counts and histograms of a training folder; `tokens` of each caption, where an encoder reads them."""
    pictures, texts = data.pictures, [p.row.text for p in data.pictures]
    areas = [p.mask.area for p in pictures if p.mask is not None]
    labels = Counter(p.row.label for p in pictures)
    found: dict[str, Any] = {
        "folder": str(data.folder),
        "images": len(pictures),
        "unusable": len(data.problems),
        "sizes": {f"{w}x{h}": n for (w, h), n in Counter(p.size for p in pictures).most_common()},
        "modes": dict(Counter(p.mode for p in pictures).most_common()),
        "grey": sum(p.grey for p in pictures),
        "captions": {"different": len(set(texts)), "empty": sum(not text.strip() for text in texts)},
        "labels": {named(label, classes): labels[label] for label in sorted(labels, key=lambda x: (x is None, x))},
        "masks": {"images": len(areas), "area": float(np.mean(areas)) if areas else None},
    }
    histograms: dict[str, Sequence[float]] = {
        "characters of a caption" if tokens is None else "tokens of a caption": tokens or [len(text) for text in texts],
        "share of an image that its mask covers": areas,
    }
    if among and pictures:
        enlarged, cut, _ = fits(data, among)
        histograms |= {"scale (above 1: enlarged)": enlarged, "share of an image that is cut away": cut}
    found["histograms"] = {name: _histogram(values) for name, values in histograms.items() if len(values)}
    return found


def _histogram(values: Sequence[float]) -> dict[str, list[float]]:
    """Of twenty bins; a few whole numbers get one each."""
    whole = all(isinstance(value, int) for value in values) and max(values) - min(values) < 40
    counts, edges = np.histogram(values, np.arange(min(values), max(values) + 2) - 0.5 if whole else 20)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def fits(data: Survey, among: Sequence[Size]) -> tuple[list[float], list[float], list[int]]:
    """By how much each picture is scaled to cover its size, the share that is then cut away, and which size that is."""
    import torch

    originals = [p.size for p in data.pictures]
    which: list[int] = buckets.assign(torch.tensor(originals), among).tolist()
    enlarged, cut = [], []
    for (width, height), (across, down) in zip(originals, (among[w] for w in which), strict=True):
        enlarged.append(max(across / width, down / height))
        cut.append(1 - min(across / width, down / height) / enlarged[-1])
    return enlarged, cut, which


def named(label: int | None, classes: Sequence[str] | None) -> str:
    """What a label is called."""
    if label is None:
        return "no label"
    return classes[label] if classes is not None and label < len(classes) else f"label {label}"
