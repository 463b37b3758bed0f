"""A server's parts, made once: store, desks, crew, who is told of progress, what is counted."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from mezzotint.serve.crew import Counts, Crew, Desk
from mezzotint.serve.examinations import Examinations
from mezzotint.serve.store import Store

LOOK = 1.0  # seconds between looks at a job that another process draws
DAY = 86_400.0


@dataclass(frozen=True)
class Limits:
    """What one caller may take of the server."""

    body: int = 32_000_000  # bytes of a request
    per_minute: int = 600  # requests of a key that says nothing else
    wait: float = 600.0  # seconds that a request for pictures is held open
    keep: float = 7 * DAY  # seconds that ended jobs and their pictures are kept


class News:
    """Who waits for a job hears of it at once where this process draws it, and looks now and then otherwise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    def tell(self, job: str) -> None:
        """Something happened to a job; from any thread."""
        with self._lock:
            for loop, event in self._waiting.get(job, ()):
                loop.call_soon_threadsafe(event.set)

    async def of(self, jobs: Sequence[str], patience: float = LOOK) -> None:
        """Wait until something happened to one of these jobs, or for so many seconds."""
        mine = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            for job in jobs:
                self._waiting.setdefault(job, set()).add(mine)
        try:
            async with asyncio.timeout(patience):
                await mine[1].wait()
        except TimeoutError:
            pass
        finally:
            with self._lock:
                for job in jobs:
                    rest = self._waiting[job]
                    rest.discard(mine)
                    if not rest:
                        del self._waiting[job]


@dataclass
class Server:
    """Everything that a request may need."""

    store: Store
    desks: Mapping[str, Desk]
    open_to_all: bool  # no keys are configured, and only this machine is answered
    log: Path | None = None  # the audit log
    limits: Limits = field(default_factory=Limits)
    hands: int = 8  # that draw here
    data: Mapping[str, Path] = field(default_factory=dict[str, Path])  # images for the doctor, by model
    elsewhere: int = 0  # hands that draw in other processes
    others: Callable[[], Sequence[Counts | None]] = list  # what those have done; None: a process that does not answer
    news: News = field(default_factory=News)
    draining: bool = False

    def __post_init__(self) -> None:
        self.crew = Crew(self.store, self.desks, self.hands, self.news.tell, self.limits.keep)
        places = {name: desk.pipeline.model.path for name, desk in self.desks.items()}
        self.examinations = Examinations({name: path for name, path in places.items() if path}, self.data)
        self.rates = MovingWindowRateLimiter(MemoryStorage())

    def pace(self) -> float:
        """Seconds that a waiting job takes, roughly: of the last ones that ended, by the hands that draw."""
        lately = self.crew.pace if self.hands else self.store.pace()
        return max(0.5, lately / max(1, self.hands + self.elsewhere))

    def counts(self) -> list[Counts]:
        """What each process that draws does and has done, as far as it answers."""
        crews = ([self.crew.counts()] if self.hands else []) + list(self.others())
        return [each for each in crews if each is not None]

    def within_rate(self, caller: str, per_minute: int | None) -> float:
        """0 where a caller may ask now, else the seconds until it may."""
        item = RateLimitItemPerMinute(per_minute or self.limits.per_minute)
        if self.rates.hit(item, caller):
            return 0.0
        return max(1.0, self.rates.get_window_stats(item, caller).reset_time - time.time())

    def close(self, patience: float = 30.0) -> bool:
        """Answer no new requests, end what is begun, and let go."""
        self.draining = True
        self.examinations.close()
        ended = self.crew.close(patience)
        if ended:
            for desk in self.desks.values():
                desk.batcher.close()
        return ended


def is_here(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
