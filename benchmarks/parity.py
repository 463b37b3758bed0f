"""Every published family against the reference library, as one table: `python benchmarks/parity.py [family ...]`.

Tiny checkpoints with random weights are written by the reference libraries, opened by both, and compared: each network,
then the final latents of whole runs from the same noise. The tests hold these numbers below 1e-5 (networks) and 2e-4
(runs); this script prints them as docs/families.md shows them.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
MODULES = ("sd", "sdxl", "sd35", "flux2", "pixels", "latent", "adapters")


def main(chosen: list[str]) -> int:
    """Measure and print the table of the chosen modules, or of all."""
    sys.path.insert(0, str(TESTS))
    from parity_rows import Row

    rows: list[Row] = []
    for name in chosen or MODULES:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows += importlib.import_module(f"reference_{name}").parity(Path(folder))
        print(f"measured: {name}", file=sys.stderr)
    print("| model | layouts | text | backbone | codec | single file against folder | worst run | runs |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        worst = max(row.runs.values(), default=None)
        cells = (
            row.model,
            ", ".join(row.layouts),
            *map(error, (row.text, row.backbone, row.codec, row.original, worst)),
        )
        print(f"| {' | '.join(cells)} | {len(row.runs)} |")
    print("\nEach run: final latents, relative.\n")
    for row in rows:
        print(f"- {row.model}: " + "; ".join(f"{run} {value:.1e}" for run, value in row.runs.items()))
    return int(any(value > 2e-4 for row in rows for value in row.runs.values()))


def error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
