"""What pictures cost, by the plan: seconds on this machine, times its price."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from mezzotint.errors import InputError
from mezzotint.serve.asked import Asked


class Prices:
    """The cost of requests to one model; each kind of request is planned once.

    Plans run in a process of their own: what they imagine must not meet what other threads compute.
    """

    def __init__(self, path: Path, dtype: str, device: str, per_hour: float) -> None:
        self.asks = path, dtype, device, per_hour
        self._known: dict[tuple[Any, ...], float | None] = {}
        self._lock = Lock()
        self._planner = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def of(self, asked: Asked) -> float | None:
        """Of all pictures of a request, in the currency of the price; None where the machine was not measured."""
        size = None if asked.width is None or asked.height is None else (asked.width, asked.height)
        kind = size, asked.steps, asked.sampler, asked.guidance, asked.count
        with self._lock:
            if kind not in self._known:
                self._known[kind] = self._planner.submit(cost, *self.asks, *kind).result()
            return self._known[kind]

    def close(self) -> None:
        self._planner.shutdown()


def cost(
    path: Path, dtype: str, device: str, per_hour: float, size: tuple[int, int] | None, steps: int | None,
    sampler: str | None, guidance: float | None, count: int,
) -> float | None:  # fmt: skip
    """What a plan says that so many pictures cost, drawn alone; None where it cannot say."""
    from mezzotint.plan import calibrate, subject
    from mezzotint.plan.generating import Job, generating

    machine = calibrate.kept(device)
    if machine is None:
        return None
    job = Job(size=size, steps=steps, sampler=sampler, guidance=guidance, images=count, batch=count, dtype=dtype)
    try:
        return generating(subject.find(str(path)), job, machine).cost(per_hour)
    except InputError:  # what the plan cannot foresee is drawn all the same
        return None
