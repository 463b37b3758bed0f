"""The common claims on samplers, schedules and predictions, measured on the starter model and on small trained ones.

    python benchmarks/sweep/claims.py

sweeps every model into runs/sweep/claims/NAME (each with its page and contact sheet), and writes the table of claims to
runs/sweep/claims/claims.md and .json. What is measured is kept: a stopped run goes on. It needs the starter model,
`python benchmarks/doctor/nursery.py --seed 6`, and a machine that does nothing else: two to three hours on two cores,
an hour of them for training the pairs of `pairs.py`. `--only NAME` runs a part; `--tiny` shows that it works, on 2
images and few steps, and its numbers mean nothing. `--publish` puts table and plots into docs/sweep.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pairs
from verdicts import Swept, Verdict, closer, nearer, table, within

from mezzotint import files
from mezzotint.cli.sweep import captions
from mezzotint.evaluate.sweep import drawing, looks, report
from mezzotint.evaluate.sweep.measure import Sweep, measure
from mezzotint.evaluate.sweep.results import gather
from mezzotint.evaluate.sweep.setting import grid
from mezzotint.evaluate.sweep.store import Store
from mezzotint.evaluate.sweep.subject import Subject, machine, wishes
from mezzotint.families import load
from mezzotint.families.native import identified
from mezzotint.request import Request

OUT = Path("runs/sweep/claims")
DOCUMENT, BEGIN, END = Path("docs/sweep.md"), "<!-- claims: begin -->", "<!-- claims: end -->"
TOLERANCE = 4.0
SEEDS = (0, 1)
TABLES = ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "unipc_karras")
FLOWS = ("flow_euler", "heun", "dpmpp_2m", "unipc")


@dataclass(frozen=True)
class Case:
    """One model's sweep."""

    model: Callable[[], Path]
    samplers: Sequence[str]
    steps: Sequence[int]
    guidance: Sequence[float]
    count: int
    real: bool = False


def nursed(name: str) -> Callable[[], Path]:
    return lambda: pairs.NURSERY / name


def paired(name: str, seed: int, tiny: bool) -> Callable[[], Path]:
    return lambda: pairs.trained(name, seed, 4 if tiny else pairs.STEPS)


def cases(tiny: bool) -> dict[str, Case]:
    """Every case by name."""
    found = {
        "flow": Case(lambda: Path("models/solar-cells"), FLOWS, (4, 8, 10, 15, 20, 30, 50), (1.0, 3.5), 32),
        "epsilon": Case(nursed("sd1-epsilon"), TABLES, (5, 8, 10, 15, 20, 50), (1.0, 3.0, 7.5), 32),
        "velocity": Case(nursed("sd2-velocity"), TABLES, (5, 8, 10, 15, 20, 50), (1.0, 3.0, 7.5), 32),
        "lcm": Case(nursed("sd1-lcm"), ("lcm",), (1, 2, 3, 4, 8), (1.0,), 96, real=True),
        "teacher": Case(nursed("sd1-epsilon"), ("ddim", "unipc_karras"), (4, 20, 50), (3.0,), 96, real=True),
    }
    for name in pairs.PROCESSES:
        for seed in SEEDS:
            found[f"{name}-{seed}"] = Case(
                paired(name, seed, tiny), ("ddim", "unipc_karras"), (10, 20), (1.0, 2.0, 4.0, 8.0), 48, real=True
            )
    return found


def swept(name: str, case: Case, out: Path, tiny: bool) -> Swept:
    """Measure a case, or read what was measured, and write its page."""
    model = identified(load(case.model()))
    count = 8 if tiny and case.real else 2 if tiny else case.count
    prompts = captions(pairs.REAL) if model.text is not None else ()
    asked = wishes(model, Request(), count, prompts)
    settings = grid(model, asked[0], case.samplers, case.steps, case.guidance)
    subject = Subject({"float32": model}, asked, min(8, max(1, count // 2)))
    sweep = Sweep(subject, settings, Store(out / name / "store"), case.real)
    real = looks.of_folder(pairs.REAL, model.contract.size, count) if case.real else None
    results = gather(sweep, measure(sweep, teller(name)), TOLERANCE, real=real)
    report.write(sweep, results, TOLERANCE, out / name)
    return Swept(name, sweep, results)


def teller(name: str) -> Callable[[str, float, float], None]:
    """A line every half a minute, with how long the case may still take."""
    began, said = time.monotonic(), 0.0
    start: list[float] = []

    def say(what: str, done: float, all: float) -> None:
        nonlocal said
        start[:] = start or [done]
        now = time.monotonic()
        if now - said < 30.0:
            return
        said, fresh = now, done - start[0]
        left = f", about {(now - began) / fresh * (all - done) / 60:.0f} min more" if fresh > 0 else ""
        print(f"{name}: {what}, {done / max(all, 1):.0%}{left}", file=sys.stderr, flush=True)

    return say


def judged(found: dict[str, Swept]) -> list[Verdict]:
    """The claims that the cases at hand can answer."""
    told: list[Verdict] = []
    for name in ("epsilon", "velocity"):
        if name in found:
            each = found[name]
            for guidance in each.guidances:
                for sampler in ("dpmpp_2m_karras", "dpmpp_2m"):
                    told.append(nearer(f"{sampler} at 20 is as good as DDIM at 50", each, (sampler, 20), ("ddim", 50),
                                       guidance))  # fmt: skip
                for sampler in ("unipc_karras", "unipc"):
                    for steps in (8, 10, 15):
                        told.append(nearer(f"{sampler} needs 8 to 15 steps", each, (sampler, steps), ("ddim", 50),
                                           guidance))  # fmt: skip
                told.append(nearer("UniPC converges fastest", each, ("unipc_karras", 10), ("dpmpp_2m_karras", 10),
                                   guidance))  # fmt: skip
    if "flow" in found:
        each = found["flow"]
        for guidance in each.guidances:
            for steps in (20, 30):
                told.append(within("Euler on a flow converges in 20 to 30 steps", each, ("flow_euler", steps), guidance,
                                   TOLERANCE))  # fmt: skip
            for steps in (8, 10, 15):
                told.append(nearer("unipc needs 8 to 15 steps", each, ("unipc", steps), ("flow_euler", 50), guidance))
    if "lcm" in found and "teacher" in found:
        best = found["teacher"].row("ddim", 50, 3.0).real
        few = found["teacher"].row("unipc_karras", 4, 3.0).real
        for steps in (1, 2, 3, 4, 8):
            student = found["lcm"].row("lcm", steps, 1.0).real
            for what, other in (("DDIM 50", best), ("UniPC Karras 4", few)):
                if student is not None and other is not None:
                    told.append(closer(f"LCM at {steps} is nearer to real images than its teacher by {what}", "sd1-lcm",
                                       (f"lcm {steps}", student), (what, other)))  # fmt: skip
    for claim, ours, theirs in (
        ("cosine is better than linear", "cosine-epsilon", "linear-epsilon"),
        ("v is better than epsilon under guidance", "linear-velocity", "linear-epsilon"),
    ):
        for seed in SEEDS:
            pair = [found.get(f"{name}-{seed}") for name in (ours, theirs)]
            if pair[0] is None or pair[1] is None:
                continue
            a, b = pair[0].results.reals, pair[1].results.reals
            for target in a:
                told.append(closer(claim, f"{target.name}, seed {seed}", (ours, a[target]), (theirs, b[target])))
    return told


def publish(found: dict[str, Swept], verdicts: Sequence[Verdict]) -> None:
    """Put the table, the machine and the plots of two models between the marks in the document."""
    lines = [table(verdicts)]
    for name, guidance in (("epsilon", 3.0), ("flow", 3.5)):
        if name not in found:
            continue
        target = next(t for t in found[name].sweep.targets if t.guidance == guidance)
        png = drawing.plot(found[name].results, target, TOLERANCE)
        if png is not None:
            files.write_bytes(DOCUMENT.parent / "images" / f"sweep-{name}.png", png)
            lines.append(f"![error against time, model {name}](images/sweep-{name}.png)")
    each = next(iter(found.values())).sweep.subject
    place = machine(each.models[each.precise])
    lines.append(f"Measured on {place['processor']}, {place['threads']} threads, torch {place['torch']}.")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        sys.exit(f"{DOCUMENT} has no marks {BEGIN} and {END}")
    files.write_text(DOCUMENT, f"{before}{BEGIN}\n" + "\n\n".join(lines) + f"\n{END}{after}")


def main(argv: list[str] | None = None) -> list[Verdict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(cases(True)), help="cases to run (default all)")
    parser.add_argument("--tiny", action="store_true", help="see that it works; the numbers mean nothing")
    parser.add_argument("--publish", action="store_true", help="write table and plots into docs/sweep.md")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args(argv)
    out = chosen.out
    if chosen.tiny:
        out, pairs.ROOT = out / "tiny", pairs.ROOT / "tiny"
    found: dict[str, Swept] = {}
    for name, case in cases(chosen.tiny).items():
        if not chosen.only or name in chosen.only:
            found[name] = swept(name, case, out, chosen.tiny)
    verdicts = judged(found)
    files.write_json(out / "claims.json", [verdict.to_dict() for verdict in verdicts])
    files.write_text(out / "claims.md", table(verdicts) + "\n")
    print(table(verdicts))
    if chosen.publish and not chosen.tiny:
        publish(found, verdicts)
    return verdicts


if __name__ == "__main__":
    main()
