"""Those who draw: threads that take jobs out of the store, and share one network a model step by step."""

from __future__ import annotations

import io
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mezzotint.batching import Batcher
from mezzotint.errors import InputError, Refused
from mezzotint.families.adapt import ruled
from mezzotint.families.model import working
from mezzotint.families.settings import settle
from mezzotint.families.steering import answerable
from mezzotint.images import to_images
from mezzotint.pipeline.admission import admitted
from mezzotint.pipeline.release import looked_at
from mezzotint.pipeline.run import Pipeline
from mezzotint.serve.asked import Asked, opened
from mezzotint.serve.store import Given, Store
from mezzotint.serve.tables import DONE, FAILED, REFUSED, Job

IDLE = 0.5  # seconds between looks into an empty queue, where nobody rings
NOTED = 0.25  # seconds between notes of how far the jobs are, which are signs of life as well
RECOVERED = 5.0  # seconds between looks for the jobs of the dead
FORGOTTEN = 3600.0  # seconds between looks for old jobs to delete
TROUBLE = 2.0  # seconds after which a database that did not answer is asked again
LOG = logging.getLogger("mezzotint.serve")


Found = TypeVar("Found")


class Lost(Exception):
    """The job is not this worker's any more: it was cancelled, or the worker was taken for dead."""


@dataclass(frozen=True)
class Desk:
    """A model that is served: its pipeline, its batcher, and what may be added to it, by name."""

    pipeline: Pipeline
    batcher: Batcher
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    cost: Callable[[Asked], float | None] = lambda asked: None
    side: int = 128  # pixels of a preview's longer side; 0: there are none

    def check(self, asked: Asked, pictures: Mapping[str, list[bytes]]) -> int:
        """The steps that a request takes; InputError or Refused where it cannot be drawn, before it is accepted."""
        model, request = self.pipeline.model, asked.request(self.files, *opened_all(pictures))
        under = ruled(model, request.lora)
        settings = settle(under, request)
        answerable(under, [request], settings.guidance.scale)
        admitted(self.pipeline.house, model, request)
        return len(settings.path.steps)

    @torch.inference_mode()
    def preview(self, clean: Tensor) -> bytes | None:
        """A small JPEG of what a run is heading for, (B, C, h, w) its estimate; None where the policy withholds it.

        It carries neither mark nor signature, which is why it is small.
        """
        model = self.pipeline.model
        with working(model, "codec"):
            picture = to_images(model.codec.decode(clean[:1]))[0]
        ((verdict, _),) = looked_at(self.pipeline.house, [picture], None)
        if not verdict.allowed:
            return None
        stream = io.BytesIO()
        picture.thumbnail((self.side, self.side))
        picture.convert("RGB").save(stream, "JPEG", quality=75)
        return stream.getvalue()


class Previews:
    """When a run shows itself: as often as it costs a tenth of the time that it takes."""

    SHARE = 0.1

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Make one in this block."""
        began = time.monotonic()
        yield
        now = time.monotonic()
        self._next = now + (now - began) * (1 / self.SHARE - 1)


@dataclass(frozen=True)
class Counts:
    """What a crew does and has done."""

    at_work: int  # jobs in hand
    calls: Mapping[str, tuple[int, int]]  # calls of each model's network so far, and their rows


class Crew:
    """Threads of one process that draw for a store, `hands` jobs at a time."""

    def __init__(
        self, store: Store, desks: Mapping[str, Desk], hands: int = 8, tell: Callable[[str], None] = lambda job: None,
        keep: float = math.inf,
    ) -> None:  # fmt: skip
        """`tell` hears of every job to which something happens; ended jobs are deleted after `keep` seconds."""
        self.store, self.desks, self.tell, self.keep = store, desks, tell, keep
        self.pace = 1.0  # seconds a job, lately
        self.name = f"{socket.gethostname()[:40]}-{os.getpid()}-{hex(time.time_ns())[-6:]}"
        self._steps: dict[str, int] = {}  # of the jobs in hand
        self._previews: dict[str, tuple[int, bytes]] = {}  # how they look, where it is not written down yet
        self._lost: set[str] = set()  # of these, those that are somebody else's by now
        self._bell = threading.Condition()
        self._open = True
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work, name=f"hand {i}", daemon=True) for i in range(hands)]
        self._threads.append(threading.Thread(target=self._note, name="notes", daemon=True))
        for thread in self._threads:
            thread.start()

    def counts(self) -> Counts:
        return Counts(len(self._steps), {name: (d.batcher.calls, d.batcher.rows) for name, d in self.desks.items()})

    def ring(self) -> None:
        """There is a new job."""
        with self._bell:
            self._bell.notify()

    def close(self, patience: float = 30.0) -> bool:
        """Take no more, and end what is begun; whether it ended in time. What did not goes back into the queue."""
        with self._bell:
            self._open = False
            self._bell.notify_all()
        until = time.monotonic() + patience
        for thread in self._threads[:-1]:
            thread.join(max(0.0, until - time.monotonic()))
        self._ended.set()
        return not any(thread.is_alive() for thread in self._threads[:-1])

    def _work(self) -> None:
        while self._open:
            job = self._asked(lambda: self.store.claim(self.name, list(self.desks)))
            if job is None:
                with self._bell:
                    if self._open:
                        self._bell.wait(IDLE)
                continue
            began = time.monotonic()
            self._steps[job.id] = 0
            self.tell(job.id)
            try:
                self._asked(lambda job=job: self._draw(job))
            finally:
                del self._steps[job.id]
                self._previews.pop(job.id, None)
                self._lost.discard(job.id)
                self.pace += (time.monotonic() - began - self.pace) / 10
                self.tell(job.id)

    def _note(self) -> None:
        """Write down how far the jobs in hand are: on a thread of its own, so that no batch waits for the disk."""
        looked = time.monotonic()
        forgot = -math.inf
        while not self._ended.wait(NOTED):
            steps = dict(self._steps)
            if steps:
                looks = {id: self._previews.pop(id, None) for id in steps}  # a job that ends takes its own away
                seen = {id: look for id, look in looks.items() if look is not None}
                mine = self._asked(lambda steps=steps, seen=seen: self.store.progress(self.name, steps, seen))
                self._lost |= set() if mine is None else (steps.keys() - mine) & self._steps.keys()
                for id in steps:
                    self.tell(id)
            if time.monotonic() - looked > RECOVERED:
                looked = time.monotonic()
                if self._asked(self.store.recover):
                    self.ring()
            if time.monotonic() - forgot > FORGOTTEN and math.isfinite(self.keep):
                forgot = time.monotonic()
                self._asked(lambda: self.store.forget(time.time() - self.keep))

    def _asked(self, ask: Callable[[], Found]) -> Found | None:
        """What the database says; None, after a while and with a word in the log, where it does not answer."""
        try:
            return ask()
        except Exception:
            LOG.exception("the database did not answer")
            self._ended.wait(TROUBLE)
            return None

    def _draw(self, job: Job) -> None:
        """Draw a job and write down what came of it; whatever goes wrong is the job's end and not the worker's."""
        desk, asked, previews = self.desks[job.model], Asked.model_validate(job.request), Previews()

        def watch(index: int, step: Any, x: Any, history: Any) -> None:
            self._steps[job.id] = index + 1
            if job.id in self._lost:
                raise Lost(job.id)
            if asked.previews and desk.side and index + 1 < job.steps and previews.due():
                with previews.counted():
                    seen = desk.preview(history[-1].clean)
                if seen is not None:
                    self._previews[job.id] = index + 1, seen

        try:
            pictures: dict[str, list[bytes]] = {}
            for row in self.store.pictures(job.id):
                pictures.setdefault(row.role, []).append(row.data)
            request = asked.request(desk.files, *opened_all(pictures))
            artifacts = desk.pipeline.run(request, watch, asked.media, desk.batcher)
        except Lost:
            return
        except Refused as refusal:
            self.store.finish(job.id, self.name, REFUSED, error=str(refusal))
            return
        except InputError as error:
            self.store.finish(job.id, self.name, FAILED, error=str(error))
            return
        except Exception as error:
            LOG.exception("a job failed", extra={"facts": {"job": job.id}})
            self.store.finish(job.id, self.name, FAILED, error=f"{type(error).__name__}: the server's log says more")
            return
        results = [Given("result", each.data, each.media, each.record) for each in artifacts]
        self.store.finish(job.id, self.name, DONE, results, cost=desk.cost(asked))


def opened_all(pictures: Mapping[str, list[bytes]]) -> tuple[Any, Any, list[Any]]:
    """The image, the mask and the control pictures of a request."""
    single = [opened(pictures[role][0], f"the {role}") if pictures.get(role) else None for role in ("image", "mask")]
    control = [opened(data, f"control picture {i + 1}") for i, data in enumerate(pictures.get("control", ()))]
    return single[0], single[1], control
