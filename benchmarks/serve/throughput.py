"""Jobs that share one batch against jobs that are drawn one at a time, on the same model, in turns.

    python benchmarks/serve/throughput.py models/solar-cells --jobs 24 --rounds 3

Every arm has a store, a crew and a batcher of its own on the same weights; the jobs differ in class, seed and number of
steps. A round submits all of them at once to one arm and waits until the last is done. What is told is the ratio of
times within a round, and of each arm the seconds from a job's acceptance to its end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from paired import in_turns

import mezzotint as mz
from mezzotint.batching import Batcher
from mezzotint.serve.asked import Asked
from mezzotint.serve.crew import Crew, Desk
from mezzotint.serve.store import Store

STEPS = (8, 12, 16, 20)


@dataclass(frozen=True)
class Arm:
    """A server without its HTTP."""

    store: Store
    desk: Desk
    crew: Crew

    def draw(self, wishes: list[dict[str, Any]]) -> list[float]:
        """Seconds from acceptance to end of every job."""
        ids: list[str] = []
        for wish in wishes:
            asked = Asked.model_validate(wish)
            ids.append(self.store.submit("bench", "model", asked.model_dump(mode="json"), 1))
            self.crew.ring()
        while set(self.store.counts()) & {"queued", "running"}:
            time.sleep(0.02)
        jobs = [self.store.get(id) for id in ids]
        wrong = [job.error if job else "it is gone" for job in jobs if job is None or job.state != "done"]
        if wrong:
            sys.exit(f"a job failed: {wrong[0]}")
        return [job.finished - job.created for job in jobs if job is not None and job.finished is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--hands", type=int, nargs="+", default=[1, 4, 8], help="jobs at a time; the first is compared to"
    )
    parser.add_argument("--policy", default=None, help="off: without governance")
    given = parser.parse_args()
    pipeline = mz.pipeline(mz.load(given.model), given.policy)
    names = pipeline.model.contract.classes.names if pipeline.model.contract.classes else ("",)
    wishes = [
        {"model": "model", "seed": i, "steps": STEPS[i % len(STEPS)], "label": names[i % len(names)] or None}
        for i in range(given.jobs)
    ]
    root, arms = Path(tempfile.mkdtemp()), dict[str, Arm]()
    for hands in given.hands:
        store = Store(f"sqlite:///{root / f'{hands}.db'}", room=given.jobs + 1)
        desk = Desk(pipeline, Batcher(pipeline.model.backbone))
        arms[f"{hands}"] = Arm(store, desk, Crew(store, {"model": desk}, hands))
    first = str(given.hands[0])
    times: dict[str, list[float]] = {name: [] for name in arms}
    waits: dict[str, list[float]] = {name: [] for name in arms}
    for counts, found in in_turns({name: lambda arm=arm: arm.draw(wishes) for name, arm in arms.items()}, given.rounds):
        for name, (spent, latencies) in found.items() if counts else ():
            times[name].append(spent)
            waits[name] += latencies
    print(f"| jobs at a time | pictures a second | against {first} (range) | rows a call | wait, median | 90th |")
    print("|---|---|---|---|---|---|")
    for name, arm in arms.items():
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        late = sorted(waits[name])
        print(
            f"| {name} | {given.jobs / median(times[name]):.2f} | {median(ratios):.2f} ({min(ratios):.2f} to"
            f" {max(ratios):.2f}) | {arm.desk.batcher.rows / arm.desk.batcher.calls:.1f} | {median(late):.1f} s |"
            f" {late[int(0.9 * (len(late) - 1))]:.1f} s |"
        )
        arm.crew.close()


if __name__ == "__main__":
    main()
