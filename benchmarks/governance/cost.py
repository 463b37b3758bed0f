"""What each part of governance costs a picture, in milliseconds, against the same pictures under no rules.

    python benchmarks/governance/cost.py models/solar-cells

One part at a time is switched on beside "off", and all of them together; in turns, in one process, so that every figure
is a difference within a round. The table is printed as Markdown; keys and log lie in a folder of the benchmark's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mezzotint import Request, load
from mezzotint.governance.policy import OFF, Log, Pictures, Policy, Signature, Watermark, read_policy
from mezzotint.pipeline.run import Pipeline, pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paired import in_turns

LABEL = 1  # a defect of the starter's classes


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds a picture: the median difference of the rounds, and their range."""

    part: str
    median: float
    least: float
    most: float


def arms() -> dict[str, Policy]:
    """No rules first, then each part alone, then the default."""
    default = read_policy()

    def alone(name: str, **tables: object) -> Policy:
        return OFF.model_copy(update={"name": name, **tables})

    return {
        "no rules": OFF,
        "rules for words and classes": alone("words", prompts=default.prompts),
        "watermark in the start noise": alone("mark", watermark=Watermark(mode="always")),
        "classifier of pictures": alone("classifier", pictures=Pictures(unsafe=0.8, copies=False)),
        "copy check": alone("copies", pictures=Pictures(unsafe=False, copies=0.5)),
        "credentials, signed": alone("signature", signature=Signature(mode="always")),
        "row in the log": alone("log", audit=Log(file="")),
        "all of the default policy": default,
    }


def measured(pipes: Mapping[str, Pipeline], request: Request, rounds: int) -> list[Row]:
    """What each arm adds to the first, by rounds in turning order."""
    names = list(pipes)
    times: dict[str, list[float]] = {name: [] for name in names}
    for counts, found in in_turns({name: partial(pipe.run, request) for name, pipe in pipes.items()}, rounds):
        for name, (spent, _) in found.items() if counts else ():
            times[name].append(1000 * spent / request.count)
    first = times[names[0]]
    rows = [Row(names[0], statistics.median(first), min(first), max(first))]
    for name in names[1:]:
        more = [spent - bare for spent, bare in zip(times[name], first, strict=True)]
        rows.append(Row(name, statistics.median(more), min(more), max(more)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=8, help="pictures a request")
    parser.add_argument("--steps", type=int, default=4, help="of the sampler; few, so that drawing hides nothing")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = load(asked.model)
    label = LABEL if model.contract.classes else None
    request = Request(label=label, seed=7, count=asked.count, steps=asked.steps, guidance=1.0)
    with tempfile.TemporaryDirectory() as home:
        os.environ["MEZZOTINT_HOME"] = home
        pipes = {name: pipeline(model, policy) for name, policy in arms().items()}
        rows = measured(pipes, request, asked.rounds)
    print(f"| part | ms a picture | range of {asked.rounds} rounds |\n|---|---|---|")
    for row in rows:
        print(f"| {row.part} | {row.median:.1f} | {row.least:.1f} to {row.most:.1f} |")


if __name__ == "__main__":
    main()
