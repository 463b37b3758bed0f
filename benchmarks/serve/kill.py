"""kill -9 under load, again and again: every accepted job ends once, with the pictures of its seed.

    python benchmarks/serve/kill.py models/solar-cells --jobs 60 --kills 5
    python benchmarks/serve/kill.py models/solar-cells --jobs 60 --kills 5 --workers 2

The first kills the server, the second the workers on Ray that draw for it, in turns.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from served import listed, started


def wish(seed: int, steps: int) -> dict[str, Any]:
    return {"model": "model", "seed": seed, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=0, help="on Ray; 0: the server draws itself")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report(given, Path(folder))
        finally:
            for left in psutil.Process().children():  # a server that nobody told to end
                left.kill()


def report(given: argparse.Namespace, folder: Path) -> None:
    chance, accepted, lost = random.Random(0), dict[str, int](), 0
    process, url = started(given.model, folder, workers=given.workers)
    for kill in range(given.kills):
        for seed in range(kill * given.jobs // given.kills, (kill + 1) * given.jobs // given.kills):
            try:
                answer = httpx.post(f"{url}/v1/jobs", json=wish(seed, given.steps), timeout=60)
                accepted[answer.json()["id"]] = seed
            except httpx.HTTPError:
                lost += 1  # nobody was told that it was accepted
        time.sleep(chance.uniform(0.5, 3.0))
        if given.workers:
            os.kill(drawing(process.pid, given.workers)[kill % given.workers], signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, url = started(given.model, folder)
    until, states, jobs = time.monotonic() + 600, Counter[str](), dict[str, dict[str, Any]]()
    while time.monotonic() < until:
        with httpx.Client(base_url=url, timeout=60) as client:
            jobs = {job["id"]: job for job in listed(client, accepted)}
        states = Counter(job["state"] for job in jobs.values())
        if not states["queued"] and not states["running"]:
            break
        time.sleep(1)
    alike = sum(same(url, jobs[id], given.steps) for id in list(accepted)[:: max(1, len(accepted) // 12)])
    looked = len(list(accepted)[:: max(1, len(accepted) // 12)])
    process.terminate()
    process.wait(90)
    with sqlite3.connect(folder / "jobs.db") as database:
        pictures = Counter(
            dict(database.execute("select job, count(*) from pictures where role = 'result' group by job"))
        )
        again = database.execute("select count(*) from jobs where attempts > 1").fetchone()[0]
    print("| measured | value |\n|---|---|")
    for name, value in {
        "jobs accepted, kills": f"{len(accepted)}, {given.kills}",
        "ended as": ", ".join(f"{count} {state}" for state, count in states.items()),
        "begun more than once": str(again),
        "with exactly one picture": str(sum(pictures[id] == 1 for id in accepted)),
        "same picture as drawn again": f"{alike} of {looked} looked at",
    }.items():
        print(f"| {name} | {value} |")


def drawing(server: int, count: int) -> list[int]:
    """The workers of a server, once all are there: who was killed before comes back first."""
    while True:
        family = psutil.Process(server).children(recursive=True)
        found = sorted(each.pid for each in family if "".join(each.cmdline()).startswith("ray::Worker"))
        if len(found) == count:
            return found
        time.sleep(0.5)


def same(url: str, job: dict[str, Any], steps: int) -> bool:
    """Whether the picture is that of its seed, to the rounding of a batch."""
    again = httpx.post(f"{url}/v1/jobs", json=wish(job["request"]["seed"], steps), timeout=60).json()
    while (now := httpx.get(f"{url}/v1/jobs/{again['id']}", timeout=60).json())["state"] in ("queued", "running"):
        time.sleep(0.1)
    pair = [
        np.asarray(Image.open(io.BytesIO(httpx.get(f"{url}{each['pictures'][0]['url']}").content)), dtype=int)
        for each in (job, now)
    ]
    return bool(np.abs(pair[0] - pair[1]).max() <= 1)


if __name__ == "__main__":
    main()
