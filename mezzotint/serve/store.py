"""Jobs in a database: accepted once, claimed by one worker at a time, finished once, whatever is killed meanwhile.

SQLite or PostgreSQL by URL. A worker owns a job as long as it is heard of; then the job goes back into the queue.
Results and the state "done" are written in one transaction, and only by the worker that owns the job.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session, aliased, defer

from mezzotint.serve import database
from mezzotint.serve.tables import CANCELLED, DONE, EXPIRED, FAILED, OPEN, QUEUED, RUNNING, Job, Picture

SILENT = 30.0  # seconds without a beat after which a worker is taken for dead
NONE: Mapping[str, Any] = {}
ATTEMPTS = 3  # workers that may die with a job before it is taken for the cause


class Full(Exception):
    """The queue takes no more; `wait` says after how many seconds to ask again."""

    def __init__(self, wait: float) -> None:
        super().__init__(f"the queue is full: try again in {wait:.0f} s")
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Given:
    """A picture that goes into a job, or comes out of it."""

    role: str
    data: bytes
    media: str
    facts: dict[str, Any]


class Store:
    """The jobs of a server; every call is one transaction, and safe from several threads and processes."""

    def __init__(self, url: str, room: int = 200) -> None:
        """Open, and bring up to date, the database; `room` is how many jobs may wait."""
        self.engine, self.room = database.engine(url), room
        database.migrated(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    # From those who ask.

    def submit(
        self, owner: str, model: str, request: dict[str, Any], count: int, given: Iterable[Given] = (),
        deadline: float | None = None, steps: int = 0, pace: float = 1.0,
    ) -> str:  # fmt: skip
        """Accept a job of so many steps and return its id; Full where too many wait, by `pace` seconds a job."""
        job = Job(id=new_id(), owner=owner, state=QUEUED, model=model, request=request, count=count,
                  created=time.time(), deadline=deadline, attempts=0, step=0, steps=steps)  # fmt: skip
        with self.writing() as session:
            waiting = session.scalar(select(func.count()).select_from(Job).where(Job.state == QUEUED)) or 0
            if waiting >= self.room:
                raise Full(max(1.0, pace * (waiting - self.room + 1)))
            session.add(job)
            session.flush()
            session.add_all(_rows(job.id, given))
        return job.id

    def get(self, id: str) -> Job | None:
        with self.reading() as session:
            return session.get(Job, id)

    def listed(
        self, owner: str | None, limit: int = 50, before: str | None = None, model: str | None = None,
        state: str | None = None,
    ) -> Sequence[Job]:  # fmt: skip
        """The newest jobs, of one owner or of all, older than one; of one model, in one state."""
        asked = select(Job).order_by(Job.id.desc()).limit(limit)
        for column, wanted in ((Job.owner, owner), (Job.model, model), (Job.state, state)):
            if wanted is not None:
                asked = asked.where(column == wanted)
        if before is not None:
            asked = asked.where(Job.id < before)
        with self.reading() as session:
            return session.scalars(asked).all()

    def pictures(self, id: str, role: str | None = None, data: bool = True) -> Sequence[Picture]:
        """What went into a job or came out of it, in order; without `data` its bytes stay where they are."""
        asked = select(Picture).where(Picture.job == id).order_by(Picture.role, Picture.place)
        if role is not None:
            asked = asked.where(Picture.role == role)
        if not data:
            asked = asked.options(defer(Picture.data, raiseload=True))
        with self.reading() as session:
            return session.scalars(asked).all()

    def results(self, ids: Sequence[str]) -> dict[str, list[Picture]]:
        """What jobs have made, in order and without the bytes; all of it asked for at once."""
        asked = select(Picture).where(Picture.job.in_(ids), Picture.role == "result").order_by(Picture.place)
        found: dict[str, list[Picture]] = {id: [] for id in ids}
        with self.reading() as session:
            for row in session.scalars(asked.options(defer(Picture.data, raiseload=True))):
                found[row.job].append(row)
        return found

    def preview(self, id: str) -> bytes | None:
        """How a job looks so far."""
        with self.reading() as session:
            return session.scalar(select(Job.preview).where(Job.id == id))

    def picture(self, id: str, place: int) -> Picture | None:
        """A result."""
        asked = select(Picture).where(Picture.job == id, Picture.role == "result", Picture.place == place)
        with self.reading() as session:
            return session.scalar(asked)

    def cancel(self, id: str) -> bool:
        """Whether the job was still open; its worker notices at the next step."""
        still = update(Job).where(Job.id == id, Job.state.in_(OPEN))
        with self.writing() as session:
            return _changed(session, still.values(state=CANCELLED, finished=time.time(), preview=None))

    def drawn_since(self, owner: str, since: float) -> int:
        """Pictures that an owner asked for since then, those of failed jobs aside."""
        asked = select(func.coalesce(func.sum(Job.count), 0)).where(
            Job.owner == owner, Job.created >= since, Job.state.in_((*OPEN, DONE))
        )
        with self.reading() as session:
            return int(session.scalar(asked) or 0)

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        with self.reading() as session:
            return {state: n for state, n in session.execute(select(Job.state, func.count()).group_by(Job.state))}

    def pace(self, of: int = 10) -> float:
        """Seconds that the newest jobs took to be drawn, on average; 1 where there are none."""
        last = select(Job.finished - Job.started).where(Job.state == DONE).order_by(Job.id.desc()).limit(of)
        with self.reading() as session:
            took = session.scalars(last).all()
        return sum(took) / len(took) if took else 1.0

    # From those who work.

    def claim(self, worker: str, models: Sequence[str]) -> Job | None:
        """The next job for a worker, or None: of the owner with the fewest running, the oldest."""
        running = aliased(Job)
        busy = (
            select(func.count()).select_from(running)
            .where(running.owner == Job.owner, running.state == RUNNING).correlate(Job).scalar_subquery()
        )  # fmt: skip
        next_one = (
            select(Job).where(Job.state == QUEUED, Job.model.in_(models)).order_by(busy, Job.id).limit(1)
            .with_for_update(skip_locked=True, of=Job)
        )  # fmt: skip
        now = time.time()
        with self.writing() as session:
            overdue = (Job.state == QUEUED, Job.deadline.is_not(None), Job.deadline < now)
            session.execute(update(Job).where(*overdue).values(state=EXPIRED, finished=now))
            job = session.scalar(next_one)
            if job is not None:
                job.state, job.worker, job.beat, job.started = RUNNING, worker, now, job.started or now
                job.attempts += 1
            return job

    def progress(
        self, worker: str, steps: Mapping[str, int], previews: Mapping[str, tuple[int, bytes]] = NONE
    ) -> set[str]:
        """Note how far a worker's jobs are, how they look, and that it lives; those that are its own still."""
        now, mine = time.time(), set[str]()
        with self.writing() as session:
            for id, step in steps.items():
                own = update(Job).where(Job.id == id, Job.worker == worker, Job.state == RUNNING)
                seen = dict(zip(("previewed", "preview"), previews[id], strict=True)) if id in previews else {}
                if _changed(session, own.values(step=step, beat=now, **seen)):
                    mine.add(id)
        return mine

    def finish(
        self, id: str, worker: str, state: str, results: Iterable[Given] = (), error: str | None = None,
        cost: float | None = None,
    ) -> bool:  # fmt: skip
        """End a job with its results, in one transaction; False, and nothing kept, where it is not this worker's."""
        mine = update(Job).where(Job.id == id, Job.worker == worker, Job.state == RUNNING)
        said = None if error is None else error[:2000]
        with self.writing() as session:
            end = {"state": state, "finished": time.time(), "error": said, "cost": cost, "preview": None}
            if not _changed(session, mine.values(**end)):
                return False
            session.add_all(_rows(id, results))
            return True

    def recover(self, silent: float = SILENT) -> int:
        """Put the jobs of workers that are not heard of any more back into the queue; how many.

        A job that was given up so ATTEMPTS times fails: it may be what the workers died of.
        """
        lost = (Job.state == RUNNING, Job.beat < time.time() - silent)
        said = f"{ATTEMPTS} workers were lost with it"
        with self.writing() as session:
            tried = update(Job).where(*lost, Job.attempts >= ATTEMPTS)
            session.execute(tried.values(state=FAILED, finished=time.time(), error=said, worker=None, preview=None))
            fresh = {"state": QUEUED, "worker": None, "beat": None, "step": 0, "previewed": 0, "preview": None}
            return session.execute(update(Job).where(*lost).values(**fresh)).rowcount  # type: ignore[attr-defined]

    def forget(self, before: float) -> int:
        """Delete jobs that ended before then, with their pictures; how many."""
        old = (Job.finished.is_not(None), Job.finished < before)
        with self.writing() as session:
            session.execute(delete(Picture).where(Picture.job.in_(select(Job.id).where(*old))))
            return session.execute(delete(Job).where(*old)).rowcount  # type: ignore[attr-defined]

    @contextmanager
    def reading(self) -> Iterator[Session]:
        with Session(self.engine.execution_options(reads=True), expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session


def new_id() -> str:
    """32 characters: when, in nanoseconds, then chance; so ids are in the order of acceptance and cannot be guessed."""
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def _rows(job: str, given: Iterable[Given]) -> list[Picture]:
    places: dict[str, int] = {}
    rows: list[Picture] = []
    for each in given:
        place = places.setdefault(each.role, 0)
        places[each.role] += 1
        digest = hashlib.sha256(each.data).hexdigest()
        rows.append(Picture(job=job, role=each.role, place=place, media=each.media, sha256=digest, data=each.data,
                            facts=each.facts))  # fmt: skip
    return rows


def _changed(session: Session, changes: Any) -> bool:
    found: Any = session.execute(changes)
    return found.rowcount == 1
