"""From the start of a server to its first picture, against importing torch and loading the weights, in turns.

python benchmarks/serve/startup.py models/solar-cells --steps 4
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
from served import serving

LOADED = "import sys, torch\nfrom mezzotint.families import load\nload(sys.argv[1])\n"


def loaded(model: Path) -> float:
    """Seconds of a process that imports torch and loads the weights."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOADED, str(model)], check=True)
    return time.perf_counter() - began


def first(model: Path, steps: int, more: list[str]) -> tuple[float, float]:
    """Seconds until a server's first picture, and of these the picture itself."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serving(model, Path(folder), *more) as url:
        ready = time.perf_counter()
        body = {"prompt": "", "seed": 1, "steps": steps}
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=600).raise_for_status()
        return time.perf_counter() - began, time.perf_counter() - ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=4, help="of the first picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policy", default="", help="off: without governance")
    given = parser.parse_args()
    more = ["--policy", given.policy] if given.policy else []
    _ = loaded(given.model), first(given.model, given.steps, more)  # what is read lies in memory from here on
    rows = [(loaded(given.model), *first(given.model, given.steps, more)) for _ in range(given.rounds)]
    ratios = [total / base for base, total, _ in rows]
    print("| torch and weights | first picture | of it drawn | ratio (range) |\n|---|---|---|---|")
    base, total, drawn = (median(column) for column in zip(*rows, strict=True))
    told = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {base:.2f} s | {total:.2f} s | {drawn:.2f} s | {told} |")


if __name__ == "__main__":
    main()
