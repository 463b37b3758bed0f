"""The data of docs/fine-tuning.md: solar cells with captions, and one kind of defect that the base never sees.

Run from the repository's root: `python recipes/fine-tuning/data.py`. Needs the solar-cell package; masks are derived.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezzotint import files, images
from mezzotint.data import derived_masks, metadata, solar_cells

CELLS, DERIVED = Path("runs/solar-cells/cells"), Path("runs/solar-cells/derived-train")
OUT = Path("runs/fine-tuning/data")
TYPES = {"mono": "monocrystalline", "poly": "polycrystalline"}
WORDS = {"healthy": "", "crack": " with a crack", "finger": " with a finger interruption",
         "inactive": " with an inactive area"}  # fmt: skip
SUBJECT = 12  # images of the inactive area, for the methods that learn from a few


def kind(row: dict[str, Any]) -> str:
    return solar_cells.KINDS[int(row["label"]) % len(solar_cells.KINDS)]


def held(row: dict[str, Any]) -> bool:
    """One cell in twelve is for validation, the same in every data set."""
    return int(hashlib.sha256(row["source"].encode()).hexdigest(), 16) % 12 == 0


def area(row: dict[str, Any]) -> float:
    """The share of the picture that the derived mask covers."""
    return float(images.mask_to_tensor(images.read(DERIVED / row["mask"]), 128, 128).mean())


def write(name: str, rows: Sequence[dict[str, Any]], text: str | None = None) -> None:
    folder, result = OUT / name, []
    for row in rows:
        entry = {"file_name": row["file_name"], "text": text or f"a {TYPES[row['type']]} solar cell{WORDS[kind(row)]}"}
        entry |= {"mask": row["mask"]} if "mask" in row else {}
        for file in (entry["file_name"], *([row["mask"]] if "mask" in row else [])):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / file).exists():
                os.link(DERIVED / file, folder / file)
        result.append(entry)
    metadata.write(folder, result)
    print(f"{name}: {len(result)} images", file=sys.stderr)


if __name__ == "__main__":
    if not (CELLS / "dataset.json").is_file():
        solar_cells.export(CELLS)
    if not (DERIVED / "metadata.jsonl").is_file():
        files.write_json(DERIVED / "counts.json", derived_masks.derive(CELLS / "train", DERIVED))
    rows = metadata.rows(DERIVED)
    inactive = {row["source"] for row in rows if kind(row) == "inactive"}
    known = [row for row in rows if row["source"] not in inactive]
    new = [row for row in rows if kind(row) == "inactive"]
    cracked = [row for row in known if kind(row) == "crack"]
    for name, chosen in (("base", known), ("inactive", new), ("crack", cracked)):
        write(f"{name}-train", [row for row in chosen if not held(row)])
        write(f"{name}-validation", [row for row in chosen if held(row)])
    surely = [row for row in new if not held(row) and row["type"] == "mono" and row["probability"] == 1]
    write("subject", sorted(surely, key=area, reverse=True)[:SUBJECT])
