"""Contact sheets: what was painted on what, and synthetic beside real, at one look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as pil
from PIL import ImageDraw

from mezzotint import files, images

TILE = 160  # pixels of a picture on a sheet
GAP = 6
HEAD = 26
PAPER, INK, RED = (250, 250, 248), (40, 40, 40), (214, 48, 32)
ROWS = 24  # of triples on the contact sheet; larger sets show evenly chosen ones


def tile(picture: pil.Image) -> pil.Image:
    """A picture in the size of a tile."""
    picture = picture.convert("RGB")
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, pil.Resampling.BICUBIC)


def marked(source: pil.Image, mask: pil.Image) -> pil.Image:
    """The source with the mask laid over it in red."""
    white = np.asarray(mask.convert("L"))[..., None] >= 128
    base = np.asarray(source.convert("RGB")).astype(np.float32)
    return pil.fromarray(np.where(white, 0.35 * base + 0.65 * np.array(RED), base).astype(np.uint8))


def grid(rows: Sequence[Sequence[pil.Image]], heads: Sequence[str], every: int) -> pil.Image:
    """Tiles in rows; the heads stand above each column, and columns come in groups of `every` with a wider gap."""
    columns = max(len(row) for row in rows)
    left = [GAP + c * (TILE + GAP) + (c // every) * 3 * GAP for c in range(columns)]
    sheet = pil.new("RGB", (left[-1] + TILE + GAP, HEAD + len(rows) * (TILE + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for c, x in enumerate(left):
        pen.text((x + 2, 6), heads[c % len(heads)], fill=INK, font_size=13)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(tile(picture), (left[c], HEAD + r * (TILE + GAP)))
    return sheet


def evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` places spread evenly over `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist() if count else []


def contact_sheet(out: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write contact_sheet.png: source, where it was painted, and the synthetic image, two triples a row."""
    triples = []
    for i in evenly(len(records), 2 * ROWS):
        record = records[i]
        source, mask, painted = (
            images.read(out / file) for file in (record["source"]["resized"], record["mask"]["file"], record["file"])
        )
        triples.append([source, marked(source, mask), painted])
    rows = [[picture for triple in triples[i : i + 2] for picture in triple] for i in range(0, len(triples), 2)]
    sheet = grid(rows, ("good image", "where", "synthetic"), every=3)
    return files.write_with(out / "contact_sheet.png", lambda path: sheet.save(path, "PNG"))


def comparison_sheet(out: Path, records: Sequence[dict[str, Any]], real: Sequence[Path], seed: int) -> Path | None:
    """Write real_and_synthetic.png: real left, synthetic right, both drawn at random; None without real."""
    if not real:
        return None
    count = min(24, len(real) // 4 * 4 or len(real), len(records) // 4 * 4 or len(records))
    rng = np.random.default_rng(seed)
    left = [images.read(real[i]) for i in rng.permutation(len(real))[:count]]
    right = [images.read(out / records[i]["file"]) for i in rng.permutation(len(records))[:count]]
    rows = [[*left[i : i + 4], *right[i : i + 4]] for i in range(0, count, 4)]
    heads = ["real"] * min(4, count) + ["synthetic"] * min(4, count)
    sheet = grid(rows, heads, every=min(4, count))
    return files.write_with(out / "real_and_synthetic.png", lambda path: sheet.save(path, "PNG"))
