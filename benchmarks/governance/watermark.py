"""What the watermarks survive, and how often they are found where they are not.

    python benchmarks/governance/watermark.py models/solar-cells --real FOLDER
    python benchmarks/governance/watermark.py models/solar-cells --table

Pictures are drawn, marked, attacked and read as the pipeline does it, by a key of the benchmark's own. A mark in start
noise is read twice: by the model alone, and by the request that drew the picture. The mark in pixels is put on the same
pictures. For false alarms pictures that carry no mark, drawn and real, are read by 100 nonces each that serve nowhere
else. A row for each picture goes to runs/governance/watermark.jsonl; those that are there are skipped, so a stopped run
goes on. `--table` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from attacks import ATTACKS
from PIL import Image

from mezzotint import files, load
from mezzotint.errors import InputError
from mezzotint.evaluate.sweep.subject import wishes
from mezzotint.families import Model
from mezzotint.families.native import identified
from mezzotint.generate import generate
from mezzotint.governance import shading, spread
from mezzotint.governance.shading import Key, Reading
from mezzotint.pipeline import marking, record
from mezzotint.pipeline.inversion import STEPS, inverted
from mezzotint.request import Request

RESULTS = Path(__file__).parents[2] / "runs" / "governance" / "watermark.jsonl"
KEY = Key.of(bytes(range(32)))
OTHERS = 1_000_000  # seed of the first picture without a mark: none of the marked ones has it
NONCES = 100  # that a picture without a mark is read by
MANY = 1_000_000  # marks of a long log
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True)
class Case:
    """A model under the benchmark, with the digest of all that its rows depend on."""

    model: Model
    wishes: tuple[Request, ...]  # of the pictures with a mark, each with a count of 1
    others: tuple[Request, ...]  # of those without
    digest: str


def case_of(folder: Path, marked: int, unmarked: int, prompts: Sequence[str]) -> Case:
    """The model with its wishes; a picture of a seed asks for the same thing however many there are."""
    model = identified(load(folder))
    classes = model.contract.classes
    labels = range(len(classes.names)) if classes is not None and model.text is None else ()
    drawn = wishes(model, Request(), marked, prompts, labels)
    others = wishes(model, Request(seed=OTHERS), unmarked, prompts, labels)
    plain = record(model, Request(prompt=" | ".join(prompts)))
    settings = {"steps": STEPS, "strength": spread.STRENGTH, "limit": spread.LIMIT, "key": KEY.id, "nonces": NONCES}
    return Case(model, drawn, others, files.sha256_json({"drawn": plain, **settings})[:16])


def marked_row(case: Case, wish: Request) -> dict[str, Any]:
    """One picture with each mark under every attack."""
    how = marking.method(case.model, wish)
    (mark,) = marking.marks(KEY, how, record(case.model, wish), wish)
    noised = marking.noised(case.model, wish, KEY, [mark]) if how == "start noise" else wish
    (picture,) = generate(case.model, noised).images
    found: dict[str, dict[str, Any]] = {}
    if how == "start noise":
        attacked = [attack(picture) for attack in ATTACKS.values()]
        for arm, known in (("start noise, model known", Request()), ("start noise, request known", wish)):
            noise = inverted(case.model, attacked, [known] * len(attacked))
            read = [shading.read(row, KEY, mark.nonce, mark.payload) for row in noise]
            found[arm] = dict(zip(ATTACKS, map(facts, read), strict=True))
    pixels = spread.marked(picture, KEY, mark.nonce, mark.payload)
    found["pixels"] = {
        name: facts(spread.read(attack(pixels), KEY, mark.nonce, mark.payload, picture.size))
        for name, attack in ATTACKS.items()
    }
    error = np.mean((np.asarray(picture, dtype=np.float64) - np.asarray(pixels, dtype=np.float64)) ** 2)
    return {"readings": found, "psnr": 10 * math.log10(255**2 / float(error))}


def unmarked_row(case: Case, picture: Image.Image, name: str) -> dict[str, Any]:
    """One picture without a mark, read by many nonces: the logarithm of each reading's chance, or its bound."""
    nonces = [shading.nonce_of(KEY, {"picture": name}, i) for i in range(NONCES)]
    payload = shading.payload_of(KEY, b"none")
    noise = inverted(case.model, [picture], [Request()])[0]
    return {
        "chances": {
            "start noise": [round(shading.read(noise, KEY, nonce, payload).log_chance, 4) for nonce in nonces],
            "pixels": [round(spread.read(picture, KEY, nonce, payload).log_chance, 4) for nonce in nonces],
        }
    }


def facts(reading: Reading) -> dict[str, float]:
    return {"accuracy": reading.accuracy, "share": reading.share, "log_chance": reading.log_chance}


def measured(case: Case, real: Sequence[Path]) -> None:
    """Take what is missing, a picture at a time."""
    mend()
    done = {(row["kind"], row["picture"]) for row in rows(case.digest)}

    def missing(kind: str, name: str, take: Callable[[], dict[str, Any]]) -> None:
        if (kind, name) not in done:
            add({"case": case.digest, "kind": kind, "picture": name, **take()})
            print(f"{kind} {name}", file=sys.stderr, flush=True)

    for wish in case.wishes:
        missing("marked", str(wish.seed), lambda wish=wish: marked_row(case, wish))
    for wish in case.others:
        missing("drawn", str(wish.seed), lambda wish=wish: unmarked_row(
            case, generate(case.model, wish).images[0], str(wish.seed)
        ))  # fmt: skip
    for path in real:
        name = files.sha256_file(path)[:16]
        missing("real", name, lambda path=path, name=name: unmarked_row(case, fitted(case.model, path), name))


def fitted(model: Model, path: Path) -> Image.Image:
    """A picture from elsewhere in the model's size and colours."""
    picture = Image.open(path).convert("L" if model.codec.pixel_channels == 1 else "RGB")
    return picture.resize((model.contract.size[0], model.contract.size[1]), Image.Resampling.LANCZOS)


def table(case: Case, name: str) -> str:
    """What stands in the rows, as Markdown."""
    every = rows(case.digest)
    marked = [row for row in every if row["kind"] == "marked"]
    lines = [f"### {name}, {len(marked)} pictures with a mark", ""]
    if marked:
        lines += [f"The mark in pixels leaves {mean(row['psnr'] for row in marked):.1f} dB.", ""]
        lines += [
            "| mark | attack | bits right | signs right | found | found among 10^6 |",
            "|---|---|---|---|---|---|",
        ]
    for arm in marked[0]["readings"] if marked else ():
        for attack in ATTACKS:
            read = [row["readings"][arm][attack] for row in marked]
            bits, signs = mean(each["accuracy"] for each in read), mean(each["share"] for each in read)
            one, many = (found([each["log_chance"] for each in read], tried) for tried in (1, MANY))
            cells = (arm, attack, f"{bits:.1%}", f"{signs:.1%}", share(one, len(read)), share(many, len(read)))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| without a mark | read as | pictures | readings | false alarms | by chance 1 % or less |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for kind in ("drawn", "real"):
        plain = [row["chances"] for row in every if row["kind"] == kind]
        for arm in plain[0] if plain else ():
            chances = [chance for row in plain for chance in row[arm]]
            rare = share(sum(chance <= math.log(0.01) for chance in chances), len(chances))
            cells = (kind, arm, str(len(plain)), f"{len(chances):,}", share(found(chances, 1), len(chances)), rare)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def found(chances: Iterable[float], tried: int) -> int:
    """How many readings say that the mark is there."""
    return sum(Reading(b"", 0, 1, 0.5, chance).found(tried) for chance in chances)


def share(hits: int, total: int, z: float = 1.959964) -> str:
    """A share with its 95 % interval (Wilson 1927)."""
    p, square = hits / total, z * z / total
    half = z * math.sqrt(p * (1 - p) / total + square / (4 * total))
    low, high = ((p + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
    digits = 1 if total < 10_000 else 3
    return f"{hits:,} = {p:.{digits}%} ({max(0.0, low):.{digits}%} to {min(1.0, high):.{digits}%})"


def rows(digest: str) -> list[dict[str, Any]]:
    """What was measured of a case."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [row for row in map(json.loads, lines) if row["case"] == digest]


def mend() -> None:
    """Drop the half of a row that a stopped run left at the end."""
    before = RESULTS.read_bytes() if RESULTS.is_file() else b"\n"
    if not before.endswith(b"\n"):
        files.write_bytes(RESULTS, before[: before.rfind(b"\n") + 1])


def add(row: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, default=[Path("models/solar-cells")])
    parser.add_argument("--marked", type=int, default=100, help="pictures with a mark")
    parser.add_argument("--unmarked", type=int, default=500, help="pictures drawn without one")
    parser.add_argument("--real", type=Path, default=None, help="a folder of real pictures, at most --unmarked of them")
    parser.add_argument("--prompt", action="append", default=[], help="for models that read text; may be repeated")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    inside = sorted(given.real.rglob("*")) if given.real else []
    real = [path for path in inside if path.suffix.lower() in SUFFIXES][: given.unmarked]
    try:
        for folder in given.models:
            case = case_of(folder, given.marked, given.unmarked, given.prompt)
            if not given.table:
                measured(case, real)
            print(table(case, folder.name) + "\n", flush=True)
    except InputError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
