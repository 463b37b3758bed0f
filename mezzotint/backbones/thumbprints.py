"""Thumbprints of a model's training images, kept beside the model, and the nearest one to a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mezzotint import files
from mezzotint.backbones import efficientnet, features
from mezzotint.backbones.features import Features
from mezzotint.errors import InputError

FILE = "reference.safetensors"  # beside a model: thumbprints of its training images
KIND = f"EfficientNet-Lite0 block {features.BLOCK}, {features.GRID}x{features.GRID} fields"


@dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest training image of each image, by the distance of thumbprints."""

    distance: NDArray[np.float64]  # (N,)
    index: NDArray[np.int64]  # (N,)


def nearest(prints: Features, training: Features) -> Nearest:
    """Euclidean distance of thumbprints (N, F) to the nearest of (T, F), in deviations of the training set per feature.

    Divided by sqrt(F), so that 1 means one deviation in every feature.
    """
    deviation = np.maximum(training.std(0, dtype=np.float64), 1e-6)
    a, b = prints / deviation, training / deviation
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T  # (N, T)
    index = squared.argmin(1)
    exact = np.sqrt(((a - b[index]) ** 2).mean(1))
    return Nearest(exact.astype(np.float64), index.astype(np.int64))


def write(path: Path, prints: Features, digest: str, width: int, height: int) -> Path:
    """Keep thumbprints as half floats, with what they were computed of."""
    facts = {"digest": digest, "size": f"{width}x{height}", "kind": KIND, "weights": weights()}
    tensors = {"prints": torch.from_numpy(prints).half()}
    return files.write_with(path, lambda temporary: save_file(tensors, temporary, metadata=facts))


def read(path: Path, digest: str, width: int, height: int) -> Features | None:
    """Thumbprints from a file, or None where they are of other images, another size or another network."""
    wanted = {"digest": digest, "size": f"{width}x{height}", "kind": KIND, "weights": weights()}
    try:
        with safe_open(path, framework="pt") as content:
            if (content.metadata() or {}) != wanted:
                return None
            return content.get_tensor("prints").float().numpy()
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}. Delete it, it is computed again.") from error


def weights() -> str:
    """The digest of the feature network's weights."""
    return files.sha256_file(efficientnet.weights_file())
