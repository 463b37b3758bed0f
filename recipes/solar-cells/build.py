"""Rebuild the starter model from the solar-cell package: data, masks, codec, painter, and what synthesis needs.

Run from the repository's root with `make starter`; every stage is skipped where its result is there, and a stopped
training goes on from its last checkpoint. `--data` stops when the training images are there, to which
`mezzotint trace` leads; `--sign` signs the packed model again, as after a change of its card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from mezzotint import families, files
from mezzotint.cli.main import main
from mezzotint.data import derived_masks, solar_cells
from mezzotint.evaluate import reference
from mezzotint.governance import certificates, lineage
from mezzotint.synthesis.equip import equip

RUNS = Path("runs/solar-cells")
CELLS, DERIVED, PAINTER = RUNS / "cells", RUNS / "derived-train", RUNS / "refine"
MODEL = Path("models/solar-cells")
RECIPES = Path("recipes/solar-cells")
SIGNER = RUNS / "certificates"  # a root of this build's own: what is signed is whole, and no person vouches for it


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train(recipe: Path, run: Path) -> None:
    """Train, or go on with, one recipe; a failed stage ends the build with its exit code."""
    if (run / "model").is_dir():
        return
    resume = ["--resume"] if (run / "recipe.toml").is_file() else []
    if code := main(["train", str(recipe), *resume]):
        sys.exit(code)


def pack(trained: Path, out: Path) -> None:
    """Write the model in half precision, beside its card and licence, with mask bank and examples of each type."""
    families.save(families.load(trained), out, dtype=torch.float16)
    equip(out, DERIVED)
    reference.ship(out, CELLS / "train")
    for name in ("README.md", "LICENSE.md"):
        shutil.copyfile(RECIPES / "card" / name, out / name)
    sign(out, trained)


def sign(model: Path, told: Path) -> None:
    """Write the lineage of the packed model: what its training said of itself, of the files as they are packed."""
    facts, data = (json.loads((told / lineage.FOLDER / name).read_bytes()) for name in ("facts.json", "dataset.json"))
    contract = json.loads((model / "contract.json").read_bytes())
    known = {**facts, "name": model.name, "contract": contract, "data": {**data, "folder": DERIVED.as_posix()}}
    if not (SIGNER / "root.pem").is_file():
        certificates.init(SIGNER, "Mezzotint starter model", days=certificates.ROOT)
    lineage.written(model, lineage.Trained(**known), SIGNER)


def images() -> None:
    """The images of the package, and those that the painter is trained on: with a derived mask for each defect."""
    if not (CELLS / "dataset.json").is_file():
        say("1/4 exporting the images of the package")
        solar_cells.export(CELLS)
    if not (DERIVED / "metadata.jsonl").is_file():
        say("2/4 deriving masks (some minutes)")
        counts = derived_masks.derive(CELLS / "train", DERIVED, lambda done, total: say(f"    {done}/{total}"))
        files.write_json(DERIVED / "counts.json", counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="only the training images")
    parser.add_argument("--sign", action="store_true", help="only the signature of the packed model")
    asked = parser.parse_args()
    if asked.sign:
        sign(MODEL, MODEL)
        sys.exit()
    images()
    if asked.data:
        sys.exit()
    say("3/4 training the codec, the painter, and its last lessons (somewhat over an hour on two cores)")
    train(RECIPES / "codec.toml", RUNS / "codec")
    train(RECIPES / "painter.toml", RUNS / "painter")
    train(RECIPES / "refine.toml", PAINTER)
    say(f"4/4 packing {MODEL}")
    pack(PAINTER / "model", MODEL)
