"""Workers: processes that begin once, take work in turn, and are replaced where they are lost."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from mezzotint.cluster import joining
from mezzotint.errors import InputError

TRIES = 3  # workers that a piece of work may be lost with before it is taken for the cause
PATIENCE = 120.0  # seconds that workers get to come up where nobody is at work
PAUSE = 5.0  # seconds before a worker that came back and could not begin tries again
LOG = logging.getLogger("mezzotint.cluster")


class Worker:
    """What runs in a process of its own: it builds what it works with once, when that is first needed."""

    def __init__(self, build: Callable[[], Any], folder: str) -> None:
        with suppress(OSError):  # paths mean what they mean to the caller, where this machine has the folder
            os.chdir(folder)
        self.build = build
        self.held: Any = None
        with warnings.catch_warnings(action="ignore"):
            again = joining.library().get_runtime_context().was_current_actor_reconstructed
        while again and self.held is None:
            try:  # nobody tells one that was lost and came back
                self.begin()
            except Exception:
                LOG.exception("a worker that came back could not begin")
                time.sleep(PAUSE)

    def up(self) -> tuple[str, str]:
        """The machine, and the version that it has."""
        return socket.gethostname(), version("mezzotint")

    def begin(self) -> None:
        if self.held is None:
            self.held = self.build()

    def work(self, piece: Any) -> Any:
        self.begin()
        return self.held(piece)

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self.held, method)(*args)


class Crew:
    """So many workers that hold the same."""

    def __init__(self, ray: Any, build: Callable[[], Any], count: int, gpus: int = 0, restarts: int = 0) -> None:
        self.ray, self.build, self.count = ray, build, count
        share = joining.share(ray.nodes(), count, gpus)
        self.kind = ray.remote(Worker).options(num_cpus=share, num_gpus=gpus, max_restarts=restarts)
        self.all: list[Any] = []

    def hire(self) -> Any:
        self.all.append(self.kind.remote(self.build, os.getcwd()))
        return self.all[-1]

    def dismiss(self) -> None:
        for worker in self.all:
            self.ray.kill(worker)

    def spread(self, pieces: Sequence[Any], took: Callable[[Any], None]) -> None:
        """Give out all pieces, one at a time to each worker; that of a lost worker goes to another."""
        waiting, left = deque(range(len(pieces))), len(pieces)
        lost: Counter[int | None] = Counter()  # workers by their piece
        idle: list[Any] = []
        busy: dict[Any, tuple[Any, int | None]] = {}  # None: it comes up

        def hired() -> None:
            worker = self.hire()
            busy[worker.up.remote()] = worker, None

        for _ in range(min(self.count, left)):
            hired()
        while left:
            while waiting and idle:
                worker, piece = idle.pop(), waiting.popleft()
                busy[worker.work.remote(pieces[piece])] = worker, piece
            nobody = all(piece is None for _, piece in busy.values())
            ended, _ = self.ray.wait(list(busy), timeout=PATIENCE if nobody else None)
            if not ended:
                raise InputError(f"no worker came up within {PATIENCE:.0f} s: the cluster has no room for it")
            worker, piece = busy.pop(ended[0])
            try:
                found = self.answer(ended[0])
            except self.ray.exceptions.RayError as error:
                lost[piece] += 1
                told(error, "could not begin" if piece is None else "were lost with the same piece", lost[piece])
                if piece is not None:
                    waiting.appendleft(piece)
                self.ray.kill(worker)  # one that still lives would keep its place
                hired()
                continue
            idle.append(worker)
            if piece is None:
                lost[None] = 0
                check(*found)
            else:
                left -= 1
                took(found)

    def begin(self) -> None:
        """Let all workers come up and build what they hold."""
        up = [self.hire().up.remote() for _ in range(self.count)]
        _, missing = self.ray.wait(up, num_returns=len(up), timeout=PATIENCE)
        if missing:
            raise InputError(f"{len(missing)} of {len(up)} workers did not come up within {PATIENCE:.0f} s")
        try:
            for each in up:
                check(*self.answer(each))
            for each in [worker.begin.remote() for worker in self.all]:
                self.answer(each)
        except self.ray.exceptions.RayError as error:
            raise InputError(f"a worker was lost when it began: {reason(error)}") from error

    def ask(self, patience: float, method: str, *args: Any) -> list[Any]:
        """What a method of that which each holds gives; None where no answer comes within so many seconds."""
        asked = [worker.ask.options(max_task_retries=-1).remote(method, *args) for worker in self.all]
        ended, _ = self.ray.wait(asked, num_returns=len(asked), timeout=patience)
        said: list[Any] = [None] * len(asked)
        for i, each in enumerate(asked):
            with suppress(self.ray.exceptions.RayError):
                said[i] = self.answer(each) if each in ended else None
        return said

    def answer(self, asked: Any) -> Any:
        """What a worker gave, or raised."""
        try:
            return self.ray.get(asked)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error


def check(host: str, theirs: str) -> None:
    if theirs != (ours := version("mezzotint")):
        raise InputError(f"{host} has mezzotint {theirs}, this machine {ours}: install the same on all machines")


def told(error: Exception, what: str, times: int) -> None:
    """Say that a worker was lost, or give up."""
    why = reason(error)
    if times >= TRIES:
        raise InputError(
            f"{times} workers {what}, the last one so: {why}\n"
            f"Where memory is short, ask for fewer --workers; mezzotint must be installed on every machine."
        ) from error
    warnings.warn(f"a worker was lost, and another takes its place: {why}", stacklevel=2)


def reason(error: Exception) -> str:
    """What Ray says of a loss, in a line and without its guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
