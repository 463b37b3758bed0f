"""`mezzotint evaluate`: how far synthetic images are from real ones, beside how far real ones are from each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mezzotint import images
from mezzotint.cli import console
from mezzotint.errors import InputError


@dataclass(frozen=True)
class Options:
    """Measure the distance of a set of images from real ones, with its floor and an interval.

    The Frechet distance and a kernel distance (MMD) on patch features of EfficientNet-Lite0, which see local defects.
    The floor is what two groups of the real images show against each other at the same sizes: read the distance
    against it. With a set that `mezzotint synth` made, its untouched source images are measured too, and with
    --training the painted images are searched for copies.

    For example:

        mezzotint evaluate --synthetic out/demo --real cells/defects
    """

    synthetic: Path = tyro.MISSING
    """A folder of images, or a set that `mezzotint synth` made."""
    real: Path = tyro.MISSING
    """A folder of real images of what the synthetic ones show."""
    training: Path | None = None
    """The folder of the model's training images, to look for copies in a set."""
    size: str | None = None
    """WIDTHxHEIGHT to compare at; a set's own size, else 128x128, where left out."""
    json: bool = False
    """Print everything as JSON."""


def run(options: Options) -> int:
    """Measure and print."""
    judgement = measure(options)
    if options.json:
        console.print_json(judgement)
    else:
        print(console.facts(table(judgement)))
    return 0


def measure(options: Options) -> dict[str, Any]:
    """The judgement of a folder or a set, as plain data."""
    import numpy as np

    from mezzotint.backbones import features
    from mezzotint.checkpoints import read_json
    from mezzotint.cli.generate import size_of
    from mezzotint.cli.synth import counter
    from mezzotint.evaluate import judge, reference
    from mezzotint.synthesis.export import MANIFEST, masks_of

    real = images.find(options.real)
    width, height = size_of(options.size)
    at = options.synthetic / MANIFEST
    with console.progress(quiet=options.json) as bars:
        if not at.is_file():
            if options.training is not None:
                raise InputError(f"--training needs masks and sources: {options.synthetic} has no {MANIFEST}")
            size = (width or 128, height or 128)
            painted = images.find(options.synthetic)
            found = {
                what: features.of_images(paths, *size, counter(bars, f"reading {what} images", options.json))[0]
                for what, paths in (("real", real), ("synthetic", painted))
            }
            judgement: dict[str, Any] = {"distances": judge.distances(found["real"], {"painted": found["synthetic"]})}
        else:
            manifest = read_json(at)
            size = (width or manifest["model"]["size"][0], height or manifest["model"]["size"][1])
            if list(size) != manifest["model"]["size"]:
                raise InputError(f"a set is compared at its own size, {manifest['model']['size']}: leave out --size")
            records = manifest["images"]
            training = None
            if options.training is not None:
                count = counter(bars, "reading training images", options.json)
                training = reference.reference(options.training, *size, watch=count)
            judgement = judge.judge(
                [options.synthetic / record["file"] for record in records],
                [options.synthetic / record["source"]["resized"] for record in records],
                np.stack(masks_of(options.synthetic, records)), real, training, *size,
            )  # fmt: skip
    if not judgement["distances"]:
        raise InputError("a distance needs at least 16 real and 8 synthetic images")
    return judgement


def table(judgement: dict[str, Any]) -> dict[str, Any]:
    """The judgement for people: a line for each distance and for the look for copies."""
    from mezzotint.cli.synth import findings
    from mezzotint.synthesis.report import number

    mmd = judgement["distances"]["painted"]["mmd"]
    kernel = (
        f"{number(mmd['distance'])} ({number(mmd['low'])} to {number(mmd['high'])}); real against real "
        f"{number(mmd['floor'])} ({number(mmd['floor_low'])} to {number(mmd['floor_high'])})"
    )
    found = findings(judgement)
    first = found.pop("distance to real defects")
    return {"Frechet distance": first, "kernel distance (MMD²)": kernel, **found}
