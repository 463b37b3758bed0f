"""One self-contained page about a set: pictures, distances, the look for copies, limits, how to make it again."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2

from mezzotint import files
from mezzotint.contract import Contract
from mezzotint.synthesis import recipe, sheets
from mezzotint.synthesis.recipe import Recipe

FILE = "report.html"


def write(plan: Recipe, contract: Contract, records: Sequence[dict[str, Any]], judgement: dict[str, Any]) -> Path:
    """Write report.html into the folder of the set; the contact sheets must be there. It loads nothing."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(resources.files(__package__ or "").joinpath("report.html.j2").read_text("utf-8"))
    distances = judgement.get("distances") or {}
    page = template.render(
        records=records,
        sources=len({record["source"]["file"] for record in records}),
        classes=sorted(Counter(record["class"]["name"] for record in records).items()),
        origins=sorted(Counter(record["mask"]["origin"] for record in records).items()),
        sampler=records[0]["sampler"],
        steps=records[0]["steps"],
        guidance=records[0]["guidance"],
        size=contract.size,
        model=plan.model,
        weights=contract.weights,
        licence=contract.licence,
        comparison=inlined(plan.out / "real_and_synthetic.png"),
        contact=inlined(plan.out / "contact_sheet.png"),
        shown=min(len(records), 2 * sheets.ROWS),
        feature=judgement.get("feature", ""),
        distances=distances,
        painted=distances.get("painted"),
        unpainted=distances.get("unpainted"),
        verdict=verdict(distances),
        copies=judgement.get("copies"),
        limits=limits(contract, records, judgement),
        recipe_file=plan.out / recipe.FILE,
        number=number,
        version=metadata.version("mezzotint"),
    )
    return files.write_text(plan.out / FILE, page)


def inlined(path: Path) -> str:
    """A PNG as a data address, or "" where it is not there."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else ""


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def verdict(distances: dict[str, Any]) -> str:
    """One sentence that says what the Frechet distances show, or "" where they were not measured."""
    if "painted" not in distances or "unpainted" not in distances:
        return ""
    painted, unpainted = distances["painted"]["frechet"], distances["unpainted"]["frechet"]
    if painted["distance"] <= painted["floor_high"]:
        return "The painted images are as close to real defects as real defects are to each other."
    gap = unpainted["distance"] - unpainted["floor"]
    share = (unpainted["distance"] - painted["distance"]) / gap if gap > 0 else 0.0
    if share <= 0:
        return (
            "Painting did not bring the images nearer to the real defects: by this measure they are no better than the "
            "good images they were painted on."
        )
    apart = painted["high"] < unpainted["low"]
    return (
        f"Painting closed {100 * share:.0f} percent of the way from the good images to the floor"
        f"{'' if apart else ', which the intervals do not tell from chance'}; the rest is still missing."
    )


def limits(contract: Contract, records: Sequence[dict[str, Any]], judgement: dict[str, Any]) -> list[str]:
    """What a reader must know before using the set."""
    derived = sum(record["mask"]["origin"] == "derived" for record in records)
    measured = sum(record["class"]["type_known_by"] == "measured" for record in records)
    width, height = contract.size
    found = [
        "A mask says where the model was asked to paint. What it painted may be fainter or smaller than its mask; "
        "nobody annotated the result.",
        f"All images are {width}x{height} pixels, the size the model was trained at: those of another size were "
        f"resized, and finer defects are lost.",
        "A distance near the floor says that the statistics of small patches agree. It does not say that an expert is "
        "fooled, nor that a detector trained on these images finds real defects: try that on real data before relying "
        "on it, and keep a test set of real images only.",
    ]
    if judgement.get("distances"):
        found.append(
            "The distance also sees what painting cannot change: real defective images differ from the good ones in "
            "brightness and background too, so the painted images cannot reach the floor by painting alone."
        )
    if (unlike := judgement.get("unlike")) and unlike["strange"]:
        found.insert(
            0,
            f"{unlike['strange']} of {unlike['looked_at']} good images that were looked at are unlike those the model "
            f"was trained on. Do not expect it to paint what a defect looks like on them.",
        )
    if derived:
        found.append(
            f"{derived} masks are derived: a procedure found their shapes in training images without masks. They were "
            f"never annotated, and may show parts of defects."
        )
    if measured:
        found.append(
            f"The type of {measured} images was not given but guessed from their nearest neighbours; a wrong one is "
            f"painted with the wrong texture."
        )
    if contract.classes is not None:
        found.append(
            f"The model knows these classes and nothing else: {', '.join(contract.classes.names)}. On images of other "
            f"things it paints what it knows."
        )
    if contract.licence.data:
        found.append(f"The model was trained on data under {contract.licence.data}; see what that asks of its output.")
    return found
