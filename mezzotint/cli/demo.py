"""`mezzotint demo`: the main job on real solar cells, from the packaged images to the report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mezzotint import files
from mezzotint.cli import console
from mezzotint.errors import InputError

STARTER = Path("models") / "solar-cells"


@dataclass(frozen=True)
class Options:
    """Paint cracks, dark areas and finger interruptions on real solar cells that the model has never seen.

    The images come from the package elpv-dataset (CC-BY-NC-SA-4.0), the model is the repository's starter model, which
    was trained on the training part of the same package. The held-out good cells are painted on; the held-out defective
    cells are what the result is compared with. A stopped demo goes on when it is started again.

    For example:

        mezzotint demo --out out/demo
    """

    out: Path = Path("out/demo")
    """The folder for the result."""
    count: int = 48
    """How many images."""
    seed: int = 0
    """Where all chance comes from."""
    model: Path | None = None
    """Another model of solar cells than the starter model."""
    data: Path = Path("runs/solar-cells/cells")
    """Where the images of the package are kept at the model's size; filled where it is empty."""
    json: bool = False
    """Print the summary as JSON."""


def run(options: Options) -> int:
    """Prepare the images, make the set and say where to look."""
    from mezzotint.cli.synth import make
    from mezzotint.contract import read_contract
    from mezzotint.data import solar_cells
    from mezzotint.synthesis import classes, recipe

    started = time.monotonic()
    model = options.model or starter()
    classes.classes(read_contract(model))  # a folder that cannot serve is refused before half a minute of preparation
    good, defects, training = prepare(options.data, quiet=options.json)
    content = {
        "model": model, "good": good, "defects": defects, "training": training,
        "out": options.out, "count": options.count, "seed": options.seed,
    }  # fmt: skip
    summary = make(recipe.check(content, "demo"), quiet=options.json)
    if options.json:
        console.print_json(summary)
        return 0
    print(console.facts(summary))
    print(f"\n{options.count} synthetic defects in {time.monotonic() - started:.0f} s. Open {summary['look at']}")
    print("in a browser: it says what is good, what is not, and how to make it again.")
    print(f"The images are under the licence of the data, {solar_cells.LICENCE}.")
    return 0


def starter() -> Path:
    """The starter model: below the working folder, or in the repository that this package is installed from."""
    places = (STARTER, Path(__file__).resolve().parents[2] / STARTER)
    for place in places:
        if (place / "contract.json").is_file():
            return place
    raise InputError(
        f"the starter model is not at {places[1]}. Run from a checkout of the repository, rebuild it with `make "
        f"starter`, or name a model with --model."
    )


def prepare(data: Path, *, quiet: bool) -> tuple[Path, Path, Path]:
    """The folders of held-out good cells, held-out defective cells, and training cells; made once."""
    from mezzotint.data import metadata, solar_cells

    if not (data / "dataset.json").is_file():
        if not quiet:
            print("preparing the solar cells, once (about half a minute)", file=sys.stderr)
        solar_cells.export(data)
    rows = metadata.rows(data / "test")
    folders = {0.0: data / "demo" / "good", 1.0: data / "demo" / "defects"}
    for probability, folder in folders.items():
        wanted = [row for row in rows if row["probability"] == probability]
        if complete(folder, [row["file_name"] for row in wanted]):
            continue
        for row in wanted:
            source = data / "test" / row["file_name"]
            files.write_with(folder / row["file_name"], lambda path, source=source: shutil.copyfile(source, path))
        metadata.write(folder, wanted)  # last: a folder with it is complete
    return folders[0.0], folders[1.0], data / "train"


def complete(folder: Path, names: list[str]) -> bool:
    """Whether a prepared folder holds these images and no other."""
    from mezzotint.data import metadata

    if not (folder / metadata.METADATA).is_file():
        return False
    listed = [json.loads(line)["file_name"] for line in (folder / metadata.METADATA).read_text().splitlines()]
    return sorted(listed) == sorted(names) == sorted(path.name for path in folder.glob("*.png"))
