"""Several pictures on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image as pil
from PIL.Image import Image


def grid(pictures: Sequence[Image], columns: int | None = None, gap: int = 2) -> Image:
    """All pictures in rows, as square as possible unless `columns` is given; every cell as large as the largest."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = (max(p.size[axis] for p in pictures) + gap for axis in (0, 1))
    rows = math.ceil(len(pictures) / columns)
    sheet = pil.new(pictures[0].mode, (columns * width - gap, rows * height - gap))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
