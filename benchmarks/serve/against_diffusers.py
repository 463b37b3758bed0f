"""Our server against the reference library's pipeline behind the same route, and against itself with one job at a time.

    python benchmarks/serve/against_diffusers.py MODEL --clients 8 --requests 4 --rounds 3

MODEL is a checkpoint that both load. Clients ask over HTTP, each its next picture when it has the last one: DDIM with
the same prompts, seeds, steps and guidance everywhere. The pictures are compared first. A round is all clients with all
their requests at one server; servers take turns, and only the one whose turn it is computes.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image
from served import reference, serving

sys.path.insert(0, str(Path(__file__).parents[1]))
from paired import in_turns

STEPS = (10, 14, 18, 22)
PROMPTS = ("a crack", "a scratch on the left", "a bright spot", "no defect")


def wanted(number: int, guidance: float) -> dict[str, Any]:
    return {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": STEPS[number % len(STEPS)],
            "guidance": guidance}  # fmt: skip


def ask(client: httpx.Client, url: str, body: dict[str, Any], ours: bool) -> bytes:
    more = {"sampler": "ddim"} if ours else {}
    answer = client.post(f"{url}/v1/images/generations", json={**body, **more}, timeout=600)
    answer.raise_for_status()
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def load(url: str, clients: int, requests: int, guidance: float, ours: bool) -> list[float]:
    """Seconds that every picture took its client."""

    def work(who: int) -> list[float]:
        spent: list[float] = []
        with httpx.Client() as client:
            for i in range(requests):
                began = time.perf_counter()
                ask(client, url, wanted(who * requests + i, guidance), ours)
                spent.append(time.perf_counter() - began)
        return spent

    with ThreadPoolExecutor(clients) as pool:
        return [seconds for spent in pool.map(work, range(clients)) for seconds in spent]


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=7.5)
    given = parser.parse_args()
    with ExitStack() as stack:
        urls: dict[str, str] = {"reference": stack.enter_context(reference(given.model))}
        for name, more in {
            "ours, one at a time": ["--policy", "off", "--hands", "1"],
            "ours": ["--policy", "off", "--hands", str(given.clients)],
            "ours, default policy": ["--hands", str(given.clients)],
        }.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            urls[name] = stack.enter_context(serving(given.model, folder, *more))
        client = stack.enter_context(httpx.Client())
        worst = 0
        for number in range(4):
            body = wanted(number, given.guidance)
            files = [ask(client, urls[name], body, name == "ours") for name in ("reference", "ours")]
            pair = [np.asarray(Image.open(io.BytesIO(file)), dtype=int) for file in files]
            worst = max(worst, int(np.abs(pair[0] - pair[1]).max()))
        print(f"largest difference of a pixel between the two: {worst} of 255\n")
        times: dict[str, list[float]] = {name: [] for name in urls}
        waits: dict[str, list[float]] = {name: [] for name in urls}
        arms = {
            name: lambda url=url, name=name: load(
                url, given.clients, given.requests, given.guidance, name != "reference"
            )
            for name, url in urls.items()
        }
        for counts, found in in_turns(arms, given.rounds):
            for name, (spent, latencies) in found.items() if counts else ():
                times[name].append(spent)
                waits[name] += latencies
    pictures = given.clients * given.requests
    print("| server | pictures a second | against the reference (range) | median | 90 % | 99 % |")
    print("|---|---|---|---|---|---|")
    for name in urls:
        ratios = [a / b for a, b in zip(times["reference"], times[name], strict=True)]
        late = [f"{percentile(waits[name], share):.2f} s" for share in (0.5, 0.9, 0.99)]
        print(f"| {name} | {pictures / median(times[name]):.2f} | {median(ratios):.2f} ({min(ratios):.2f} to"
              f" {max(ratios):.2f}) | {' | '.join(late)} |")  # fmt: skip


if __name__ == "__main__":
    main()
