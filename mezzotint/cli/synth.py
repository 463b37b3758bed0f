"""`mezzotint synth`: a synthetic defect set from a model and images without defects."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mezzotint import images
from mezzotint.cli import console
from mezzotint.cli.options import clustered
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from mezzotint.cluster import Cluster
    from mezzotint.synthesis.recipe import Recipe

Count = Callable[[int, int], None]  # done, all
LINES = 10.0  # seconds between lines of progress where there is no terminal for bars


@dataclass(frozen=True)
class Options:
    """Paint defects on good images: pictures, exact masks, COCO and YOLO labels, a manifest, contact sheets, a report.

    Say what to make with a recipe or with options (an option wins over the recipe). Outside its mask an image stays the
    good image, resized to the model's size. A stopped run goes on when it is started again, and a larger --count adds
    to a set.

    For example:

        mezzotint synth --model models/solar-cells --good cells/good --count 100 --out out/cells
        mezzotint synth --model models/solar-cells --good cells/good --defects cells/bad --kinds crack --out out/cracks
        mezzotint synth out/cells/recipe.toml --count 200
        mezzotint synth out/cells/recipe.toml --count 5000 --engine ray --workers 16 --cluster auto
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """A TOML recipe; its keys are the options below."""
    model: Path | None = None
    """The model folder."""
    good: Path | None = None
    """The folder of images without defects."""
    out: Path | None = None
    """The folder for the set, new or to be continued."""
    count: int | None = None
    """How many images; 32 where nothing says it."""
    seed: int | None = None
    """Where all chance comes from; 0 where nothing says it."""
    kinds: tuple[str, ...] = ()
    """Kinds of defect, painted in turn; all the model knows where left out."""
    type: str | None = None
    """What the good images show, for a model that knows several types, such as mono or poly solar cells."""
    defects: Path | None = None
    """A folder of real defects, to measure the distance to."""
    masks: Path | None = None
    """A folder of masks to paint under, MASKS/KIND/*.png or MASKS/*.png; white is the defect."""
    training: Path | None = None
    """The folder of the model's training images, to look for copies."""
    sampler: str | None = None
    """How to walk from noise to image; the model's own choice where left out."""
    steps: int | None = None
    """How many steps; the model's own choice where left out."""
    guidance: float | None = None
    """How strongly to follow the class; the model's own choice where left out."""
    policy: str | None = None
    """A TOML file of rules: filters, signature, licences, log; "off" for none, which the records will say."""
    engine: Literal["process", "ray"] = "process"
    """Paint in this process, or by workers on Ray: the same pictures, up to float rounding."""
    workers: int | None = None
    """With ray: how many processes paint; 2 where left out."""
    cluster: str | None = None
    """With ray: HOST:PORT of a running cluster, or auto for this machine's; one is started here where left out."""
    json: bool = False
    """Print the summary as JSON."""


def run(options: Options) -> int:
    """Make the set and say where to look."""
    cluster = clustered(options.engine, options.workers, options.cluster)
    summary = make(recipe_of(options), quiet=options.json, cluster=cluster)
    if options.json:
        console.print_json(summary)
    else:
        print(console.facts(summary))
    return 0


def recipe_of(options: Options) -> Recipe:
    """The recipe, read from its file where one is given, with the options laid over it."""
    from mezzotint.synthesis import recipe

    asked = {name: getattr(options, name) for name in recipe.Recipe.model_fields}
    asked = {name: value for name, value in asked.items() if value not in (None, ())}
    if options.recipe is not None:
        return recipe.check(recipe.read(options.recipe).model_dump() | asked, str(options.recipe))
    missing = [f"--{name}" for name in ("model", "good", "out") if name not in asked]
    if missing:
        raise InputError(f"synth: missing {', '.join(missing)}, or a recipe. `mezzotint synth --help` says more.")
    return recipe.check(asked, "synth")


def make(plan: Recipe, *, quiet: bool, cluster: Cluster | None = None) -> dict[str, Any]:
    """Paint, measure, export and report one set; returns the summary. The one place where these meet."""
    from mezzotint.backbones.efficientnet import weights_file
    from mezzotint.families import load
    from mezzotint.synthesis import export, report, sheets
    from mezzotint.synthesis.paint import paint

    # What would fail at the end fails before the first image.
    real = images.find(plan.defects) if plan.defects is not None else []
    if plan.training is not None:
        images.find(plan.training)
    if real or plan.training is not None:
        weights_file()
    model = load(plan.model)
    known = stranger_check(plan)
    with console.progress(quiet=quiet) as bars:
        records = paint(plan, model, counter(bars, "painting", quiet), cluster)
        judgement = known | judged(plan, model.contract.size, records, real, lambda what: counter(bars, what, quiet))
    sheets.contact_sheet(plan.out, records)
    sheets.comparison_sheet(plan.out, records, real, plan.seed)
    page = report.write(plan, model.contract, records, judgement)
    manifest = export.export(plan, model.contract, records, judgement)
    return {
        "images": len(records),
        "look at": str(page),
        "contact sheet": str(plan.out / "contact_sheet.png"),
        "real and synthetic": str(plan.out / "real_and_synthetic.png") if real else None,
        "labels": f"{plan.out / 'annotations' / 'coco.json'}, {plan.out / 'data.yaml'}",
        "manifest": str(manifest),
        **findings(judgement),
    }


def stranger_check(plan: Recipe) -> dict[str, Any]:
    """How many good images are unlike what the model was trained on, as far as it carries examples; warns on stderr."""
    from mezzotint.synthesis.sources import TYPES, strangers

    if not (plan.model / TYPES).is_file():
        return {}
    strange, looked = strangers(images.find(plan.good), plan.model / TYPES)
    if strange:
        print(
            f"mezzotint: {strange} of {looked} good images looked at are unlike those the model was trained on: "
            f"it paints the defects it knows.",
            file=sys.stderr,
        )
    return {"unlike": {"strange": strange, "looked_at": looked}}


def judged(
    plan: Recipe,
    size: tuple[int, int],
    records: list[dict[str, Any]],
    real: list[Path],
    counted: Callable[[str], Count],
) -> dict[str, Any]:
    """Distances and the look for copies, as far as there is something to compare with."""
    import numpy as np

    from mezzotint.backbones import thumbprints
    from mezzotint.evaluate import reference
    from mezzotint.evaluate.judge import judge
    from mezzotint.synthesis.export import masks_of

    if not real and plan.training is None:
        return {}
    training = None
    if plan.training is not None:
        shipped, kept = plan.model / thumbprints.FILE, plan.out / f".{thumbprints.FILE}"
        training = reference.reference(plan.training, *size, shipped, kept, counted("reading training images"))
    counts: dict[str, Count] = {}

    def watch(what: str, done: int, total: int) -> None:
        counts.setdefault(what, counted(f"reading {what}"))(done, total)

    return judge(
        [plan.out / record["file"] for record in records],
        [plan.out / record["source"]["resized"] for record in records],
        np.stack(masks_of(plan.out, records)), real, training, *size, watch,
    )  # fmt: skip


def counter(bars: Progress, what: str, quiet: bool) -> Count:
    """A function (done, all) that moves a bar of its own; where no bars are shown, it writes a line now and then."""
    started = said = time.monotonic()
    bar = bars.add_task(what, total=None)

    def count(done: int, total: int) -> None:
        nonlocal said
        bars.update(bar, completed=done, total=total)
        now = time.monotonic()
        if bars.disable and not quiet and (now - said > LINES or done == total):
            said = now
            left = (now - started) * (total - done) / max(done, 1)
            print(f"{what}: {done} of {total}, {f'about {left:.0f} s left' if left else 'done'}", file=sys.stderr)

    return count


def findings(judgement: dict[str, Any]) -> dict[str, Any]:
    """The judgement in a few lines for people."""
    from mezzotint.synthesis.report import number, verdict

    found: dict[str, Any] = {}
    distances = judgement.get("distances") or {}
    if "painted" in distances:
        f = distances["painted"]["frechet"]
        found["distance to real defects"] = (
            f"{number(f['distance'])} ({number(f['low'])} to {number(f['high'])}); real against real "
            f"{number(f['floor'])} ({number(f['floor_low'])} to {number(f['floor_high'])})"
        )
        if "unpainted" in distances:
            found["before painting"] = number(distances["unpainted"]["frechet"]["distance"])
        found["reading"] = verdict(distances)
    if "copies" in judgement:
        copies = judgement["copies"]
        found["copies"] = (
            f"{len(copies['alike'])} of {copies['compared']} painted areas look like a training image; "
            f"{copies['closer_than_real']} of {copies['images']} images are closer to one than 99% of real ones"
        )
    return found
