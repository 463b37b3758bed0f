"""Plans against what really happened: `python benchmarks/plan/run.py` measures what is missing, then prints and draws.

Every case runs in processes of its own. Memory is taken twice: with an allocator that gives back what is freed
(MALLOC_MMAP_THRESHOLD_=65536), which is what plans predict, and with the C library's defaults, which hold more. The
machine is measured first, in its own process, and again after every fifth case, since it may have other jobs: each time
is set against the measurement nearest to it. What was measured is kept in runs/plan/results.jsonl, so that a stopped
run goes on; `--only N` takes the first N cases, `--table` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "runs" / "plan" / "results.jsonl"
MACHINES = RESULTS.parent / "machines"
WHATS = ("flops", "memory", "held", "time")
EVERY = 5  # cases between two measurements of the machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, default=None, help="take the first N cases")
    parser.add_argument("--names", nargs="*", default=None, help="or the cases of these names")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=None, help="of torch; as it decides where left out")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "plan.png")
    given = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": str(given.threads)} if given.threads else {})
    from cases import CASES

    chosen = [c for c in CASES if c.name in given.names] if given.names else CASES[: given.only]
    if not given.table:
        measured(list(chosen))
    import table

    print(table.written(table.rows(read(), [case.name for case in chosen], MACHINES)))
    table.draw(table.rows(read(), [case.name for case in chosen], MACHINES), given.output)
    print(f"\n{given.output}")
    return 0


def measured(chosen: list[Any]) -> None:
    """Take what is missing, one process at a time."""
    for place, case in enumerate(chosen):
        done = read().get(case.name, {})
        missing = [what for what in WHATS if what not in done]
        if "time" in missing:
            machine(place // EVERY)
        for what in missing:
            print(f"{place + 1}/{len(chosen)} {case.name}: {what}", file=sys.stderr, flush=True)
            found = once(case.name, what)
            add({"case": case.name, what: found, "machine": place // EVERY})


def once(name: str, what: str) -> float | None:
    """One figure from a fresh process; None, with what it said, where it failed."""
    environment = dict(os.environ)
    if what == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    asked = "memory" if what == "held" else what
    args = [sys.executable, str(HERE / "measure.py"), name, asked]
    done = subprocess.run(args, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(f"{name}, {what}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return float(json.loads(done.stdout.splitlines()[-1])[asked])


def machine(number: int) -> None:
    """Measure the machine in a process of its own, once for a number."""
    place = MACHINES / str(number)
    if not (place / "mezzotint" / "machine-cpu.json").is_file():
        print(f"measuring the machine ({number})", file=sys.stderr, flush=True)
        environment = {**os.environ, "XDG_CACHE_HOME": str(place)}
        args = [sys.executable, "-m", "mezzotint", "plan", "--calibrate"]
        subprocess.run(args, env=environment, stdout=subprocess.DEVNULL, check=True)


def read() -> dict[str, dict[str, Any]]:
    """What was measured, by case."""
    found: dict[str, dict[str, Any]] = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.is_file() else ():
        row = json.loads(line)
        found.setdefault(row.pop("case"), {}).update(row)
    return found


def add(row: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
