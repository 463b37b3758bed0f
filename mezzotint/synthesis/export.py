"""The finished set in the formats others read: COCO, YOLO segmentation, and a manifest that says how all was made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint import files, images
from mezzotint.contract import Contract
from mezzotint.data.masks import Mask
from mezzotint.synthesis import outlines, recipe
from mezzotint.synthesis.recipe import Recipe

MANIFEST = "manifest.json"
NOTE = (
    "Synthetic images: the background is a real image, the defect under the mask was painted by a model. "
    "Masks of origin 'derived' were found by a procedure in images that carry no masks; nobody annotated them."
)


def masks_of(out: Path, records: Sequence[dict[str, Any]]) -> list[Mask]:
    """The masks of all records (H, W)."""
    return [np.asarray(images.read(out / record["mask"]["file"]).convert("L")) >= 128 for record in records]


def kinds_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of defect in a set, sorted: their places are the category numbers of YOLO, plus one of COCO."""
    return sorted({record["class"]["kind"] for record in records})


def coco(out: Path, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The annotations in COCO's object format: one per connected part of a mask, as exact run lengths."""
    kinds = kinds_of(records)
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (record, mask) in enumerate(zip(records, masks_of(out, records), strict=True), start=1):
        height, width = mask.shape
        pictures.append({"id": number, "file_name": Path(record["file"]).name, "width": width, "height": height})
        for part in outlines.parts(mask):
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": kinds.index(record["class"]["kind"]) + 1,
                "segmentation": {"size": [height, width], "counts": outlines.run_lengths(part)},
                "area": int(part.sum()),
                "bbox": list(outlines.box(part)),
                "iscrowd": 0,
            })  # fmt: skip
    categories = [{"id": i, "name": kind, "supercategory": "defect"} for i, kind in enumerate(kinds, start=1)]
    return {"info": {"description": NOTE}, "images": pictures, "annotations": annotations, "categories": categories}


def yolo(mask: Mask, category: int) -> str:
    """One line a connected part: the category and its outer outline in fractions of the sides; holes are filled."""
    height, width = mask.shape
    lines = []
    for part in outlines.parts(mask):
        points = [f"{x / width:.6f} {y / height:.6f}" for x, y in outlines.polygon(part)]
        lines.append(f"{category} {' '.join(points)}\n")
    return "".join(lines)


def export(plan: Recipe, contract: Contract, records: Sequence[dict[str, Any]], judgement: dict[str, Any]) -> Path:
    """Write annotations, labels and, last of all, the manifest; returns the manifest's path."""
    out, kinds = plan.out, kinds_of(records)
    files.write_json(out / "annotations" / "coco.json", coco(out, records))
    for record, mask in zip(records, masks_of(out, records), strict=True):
        stem = Path(record["file"]).stem
        files.write_text(out / "labels" / f"{stem}.txt", yolo(mask, kinds.index(record["class"]["kind"])))
    names = "".join(f"  {i}: {kind}\n" for i, kind in enumerate(kinds))
    files.write_text(out / "data.yaml", f"path: .\ntrain: images\nval: images\nnames:\n{names}")
    return files.write_json(out / MANIFEST, manifest(plan, contract, records, judgement))


def manifest(
    plan: Recipe, contract: Contract, records: Sequence[dict[str, Any]], judgement: dict[str, Any]
) -> dict[str, Any]:
    """Everything about a set as plain data."""
    return {
        "format": "mezzotint synthetic defects",
        "version": 1,
        "note": NOTE,
        "mezzotint": version("mezzotint"),
        "recipe": plan.model_dump(mode="json"),
        "recipe_file": recipe.FILE,
        "model": {
            "path": str(plan.model),
            "weights": contract.weights,
            "codec": contract.latent.codec,
            "size": list(contract.size),
            "licence": contract.licence.model_dump(),
            "lineage": contract.lineage.model_dump(),
        },
        "annotations": "annotations/coco.json",
        "count": len(records),
        "withheld": plan.count - len(records),  # by the policy; the log says why
        "judgement": judgement,
        "images": list(records),
    }
