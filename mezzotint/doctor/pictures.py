"""The user's images as the doctor sees them: a few dozen, with whatever is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint import images
from mezzotint.data import folder, metadata
from mezzotint.data.folder import NO_LABEL

if TYPE_CHECKING:
    from torch import Tensor


BLANK = 1.0  # variance of bytes of a picture that shows nothing; the probe of the data counts those


@dataclass(frozen=True, slots=True)
class Pictures:
    """N images of one size."""

    folder: Path
    names: tuple[str, ...]
    pixels: Tensor  # (N, P, H, W) in [-1, 1]
    captions: tuple[str, ...]  # empty where nothing is known
    labels: Tensor  # (N,) int64, NO_LABEL where nothing is known
    total: int  # images of the folder, of which these are some

    def __len__(self) -> int:
        return len(self.names)


def read(path: Path, size: tuple[int, int], channels: int, count: int) -> Pictures:
    """At most `count` images of a folder at (width, height), taken evenly over it; none of one colour.

    A training folder gives captions and labels too, any other folder its pictures alone. InputError where there is no
    image, or a broken one.
    """
    import torch

    path = Path(path)
    if (path / metadata.METADATA).is_file():
        found = folder.read(path, size, channels)
        seen = found.bytes.float().flatten(1).var(1) > BLANK
        able = [i for i in range(len(found)) if seen[i]] or list(range(len(found)))
        chosen = [able[i] for i in spread(len(able), count)]
        index = torch.tensor(chosen)
        return Pictures(
            path, tuple(found.names[i] for i in chosen), found.pixels(index), tuple(found.captions[i] for i in chosen),
            found.labels[index], len(found),
        )  # fmt: skip
    every = images.find(path)
    chosen = [every[i] for i in spread(len(every), count)]
    rows = [images.to_tensor(images.read(file), *size, channels) for file in chosen]
    return Pictures(
        path, tuple(str(file.relative_to(path)) for file in chosen), torch.cat(rows), ("",) * len(chosen),
        torch.full((len(chosen),), NO_LABEL), len(every),
    )  # fmt: skip


def spread(total: int, count: int) -> Sequence[int]:
    """`count` whole numbers from 0 to total - 1, evenly."""
    if total <= count:
        return range(total)
    return [round(i * (total - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]
