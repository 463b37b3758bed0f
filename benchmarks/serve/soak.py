"""Twice as many jobs as the server can draw, for minutes: what it takes, what it refuses, and how it is afterwards.

    python benchmarks/serve/soak.py models/solar-cells --seconds 300

The capacity is measured first, by clients that wait for each picture. Then jobs come at twice that rate, whatever the
server says; every refusal must say when to come again, every accepted job must end once, with its pictures, and the
server must go on answering and hold on to no memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from served import listed, started


def wish(number: int, steps: int) -> dict[str, Any]:
    return {"model": "model", "seed": number, "steps": steps}


def capacity(url: str, seconds: float, clients: int, steps: int) -> float:
    """Jobs a second, of clients that wait."""
    until = time.monotonic() + seconds

    def work(who: int) -> int:
        done = 0
        with httpx.Client(base_url=url, timeout=600) as client:
            while time.monotonic() < until:
                body = {"prompt": "", "seed": 1000 * who + done, "steps": steps}
                client.post("/v1/images/generations", json=body).raise_for_status()
                done += 1
        return done

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        done = sum(pool.map(work, range(clients)))
    return done / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--room", type=int, default=40, help="jobs that may wait")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="on Ray; 0: the server draws itself")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = started(given.model, Path(folder), "--room", str(given.room), workers=given.workers)
        try:
            soak(given, url, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(90)


def soak(given: argparse.Namespace, url: str, process: psutil.Process) -> None:
    able = capacity(url, 30, 8, given.steps)
    rate, began = 2 * able, time.monotonic()
    says, waits, health, memory = Counter[int](), list[float](), list[float](), list[float]()
    accepted: list[str] = []
    jobs: list[dict[str, Any]] = []
    family = process.children(recursive=True)
    with httpx.Client(base_url=url, timeout=60) as client:
        sent = 0
        while (now := time.monotonic() - began) < given.seconds:
            if sent < now * rate:
                answer = client.post("/v1/jobs", json=wish(sent, given.steps))
                says[answer.status_code] += 1
                sent += 1
                if answer.status_code == 202:
                    accepted.append(answer.json()["id"])
                elif answer.status_code == 429:
                    waits.append(float(answer.headers["retry-after"]))
            else:
                time.sleep(0.005)
            if sent % 20 == 0:
                asked = time.monotonic()
                client.get("/health").raise_for_status()
                health.append(time.monotonic() - asked)
                memory.append(sum(each.memory_info().rss for each in (process, *family)) / 2**20)
        until = time.monotonic() + 300
        while time.monotonic() < until:
            jobs = listed(client, set(accepted))
            if not any(job["state"] in ("queued", "running") for job in jobs):
                break
            time.sleep(1)
        drained = time.monotonic() - began - given.seconds
        states = Counter[str](job["state"] for job in jobs)
        wrong = [job["id"] for job in jobs if job["state"] == "done" and len(job["pictures"]) != 1]
        if wrong or len(jobs) != len(accepted):
            sys.exit(f"{len(jobs)} of {len(accepted)} jobs are there; {len(wrong)} have not one picture")
    half = len(memory) // 2
    print("| measured | value |\n|---|---|")
    for name, value in {
        "capacity, of 8 clients that wait": f"{able:.2f} jobs a second",
        "asked": f"{sent} jobs in {given.seconds:.0f} s, {sent / given.seconds / able:.2f} times the capacity",
        "answers": ", ".join(f"{count} of {status}" for status, count in sorted(says.items())),
        "Retry-After, median": f"{median(waits):.0f} s" if waits else "none",
        "drawn while asked": f"{(len(accepted) - given.room) / given.seconds / able:.2f} of the capacity, or more",
        "accepted jobs afterwards": ", ".join(f"{count} {state}" for state, count in states.items()),
        "the queue was empty after": f"{drained:.0f} s",
        "health answered in": f"{1000 * median(health):.0f} ms, at most {1000 * max(health):.0f} ms",
        "memory": f"{median(memory[:half]):.0f} MB in the first half, {median(memory[half:]):.0f} MB in the second",
    }.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
