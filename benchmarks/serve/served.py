"""Servers as processes of their own: ours, and the reference library's pipeline behind the same route."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

PATIENCE = 120.0  # seconds until a server must answer


def started(model: Path, folder: Path, *more: str, workers: int = 0) -> tuple[subprocess.Popen[str], str]:
    """Our server with its database and home in a folder, drawing itself or by workers on Ray, and its address."""
    more += ("--engine", "ray", "--workers", str(workers)) if workers else ()
    command = [sys.executable, "-m", "mezzotint", "serve", "--model", f"model={model}", "--port", "0", "--json",
               "--db", f"sqlite:///{folder / 'jobs.db'}", *more]  # fmt: skip
    environment = {**os.environ, "MEZZOTINT_HOME": str(folder / "home")}
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the server did not start:\n{(folder / 'server.log').read_text()[-2000:]}")
    return process, json.loads(line)["url"]


def listed(client: httpx.Client, wanted: Collection[str]) -> list[dict[str, Any]]:
    """These jobs as they stand, by pages of the list: asking for each would go beyond the rate of a key."""
    found: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    while page := client.get("/v1/jobs", params={"limit": 200, **before}).json()["jobs"]:
        found += [job for job in page if job["id"] in wanted]
        before = {"before": page[-1]["id"]}
    return found


@contextmanager
def serving(model: Path, folder: Path, *more: str) -> Iterator[str]:
    """The address of our server for the length of the block."""
    process, url = started(model, folder, *more)
    try:
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextmanager
def reference(model: Path, port: int = 8199) -> Iterator[str]:
    """The address of the reference library's server for the length of the block."""
    command = [sys.executable, str(Path(__file__).parent / "reference_server.py"), str(model), str(port)]
    process, url = subprocess.Popen(command), f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and process.poll() is None:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)
