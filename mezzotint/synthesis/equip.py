"""What a finished model carries for synthesis: derived masks and examples of each type, from its training folder.

python -m mezzotint.synthesis.equip MODEL TRAINING_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image as pil

from mezzotint import images
from mezzotint.contract import read_contract
from mezzotint.data import metadata
from mezzotint.data.masks import Mask, components
from mezzotint.errors import InputError
from mezzotint.synthesis import classes
from mezzotint.synthesis.shapes import BANK, write_bank
from mezzotint.synthesis.sources import TYPES, write_types

MASKS = 150  # of each kind at most, drawn at random
EXAMPLES = 120  # of each type at most
SPECK, LEAST = 16 / 128**2, 28 / 128**2  # shares of the image: of a part, of a mask


def equip(model: Path, folder: Path, seed: int = 0) -> dict[str, int]:
    """Write masks.npz and types.safetensors into a model folder; returns how many masks and examples it got.

    The folder is a training folder whose rows have a class "label", defective ones a "mask". Specks are taken
    out of the masks, and masks of little else left out.
    """
    contract = read_contract(model)
    known = {c.index: c for c in classes.classes(contract)}
    width, height = contract.size
    rng = np.random.default_rng(seed)
    bank: dict[str, list[Mask]] = {}
    examples: dict[str, list[Path]] = {}
    rows = metadata.read(folder)
    for i in rng.permutation(len(rows)):
        row = rows[i]
        c = known.get(row.label) if row.label is not None else None
        if c is None:
            continue
        if row.mask is None:
            if c.kind.lower() in classes.HEALTHY and len(found := examples.setdefault(c.type, [])) < EXAMPLES:
                found.append(folder / row.file_name)
        elif len(masks := bank.setdefault(c.kind, [])) < MASKS:
            picture = images.read(folder / row.mask).convert("L")
            mask = np.asarray(picture.resize((width, height), pil.Resampling.NEAREST)) >= 128
            if (mask := without_specks(mask)).mean() >= LEAST:
                masks.append(mask)
    if bank:
        write_bank(model / BANK, bank, width, height)
    if len(classes.types(list(known.values()))) > 1 and examples:
        write_types(model / TYPES, dict(sorted(examples.items())), width, height)
    return {f"{kind} masks": len(found) for kind, found in bank.items()} | {
        f"{name} examples": len(found) for name, found in examples.items()
    }


def without_specks(mask: Mask) -> Mask:
    """The mask without parts too small to be a defect of their own: painted on a good image they would be dots."""
    labels, count = components(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes >= SPECK * mask.size)[labels]


if __name__ == "__main__":
    try:
        print(equip(Path(sys.argv[1]), Path(sys.argv[2])))
    except IndexError:
        sys.exit("usage: python -m mezzotint.synthesis.equip MODEL TRAINING_FOLDER")
    except InputError as error:
        sys.exit(f"mezzotint: {error}")
