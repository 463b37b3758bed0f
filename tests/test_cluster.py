"""Work on a cluster of two workers: as in one process, and whoever is killed, nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cluster_parts import Held, descendants, noting, until, workers
from parts import CLASSES, class_model
from serve_parts import answering, pixels
from test_serve_cli import serving
from test_synthesis import cells

import mezzotint as mz
from mezzotint.cli.main import main
from mezzotint.cluster import Cluster, joining
from mezzotint.errors import InputError, Refused
from mezzotint.families import save
from mezzotint.governance import audit
from mezzotint.serve.server import Server
from mezzotint.serve.store import Store
from mezzotint.serve.tables import DONE, QUEUED
from mezzotint.serve.workers import Hands, Models
from mezzotint.synthesis import paint, recipe

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    """Two workers on this machine, one cluster for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))  # what workers import
        with Cluster(2).joined():
            yield Cluster(2)


def test_workers_share_the_processors_that_there_are() -> None:
    def nodes(*sizes: int) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(size), "GPU": 1.0}} for size in sizes]

    assert [joining.share(nodes(8, 8), n) for n in (1, 2, 3, 4, 5, 16)] == [8, 8, 4, 4, 2, 1]
    assert joining.share(nodes(8, 8), 2, gpus=1) == 1
    for many, gpus in ((17, 0), (3, 1)):
        with pytest.raises(InputError, match="the cluster has 16 processors and 2 GPUs"):
            joining.share(nodes(8, 8), many, gpus)
    with pytest.raises(InputError, match="0 processors"):
        joining.share([{"Alive": False, "Resources": {"CPU": 8.0}}], 1)


def test_pieces_are_worked_out_once_by_workers_that_begin_once(two: Cluster, tmp_path: Path) -> None:
    pieces, came = ["a", "b", "deadly-once", *map(str, range(50))], list[tuple[str, int]]()
    with pytest.warns(UserWarning, match="a worker was lost"):
        two.spread(partial(noting, tmp_path), pieces, came.append)
    assert sorted(piece for piece, _ in came) == sorted(pieces) == sorted((tmp_path / "log").read_text().split())
    assert {pid for _, pid in came} <= {int(path.name[6:]) for path in tmp_path.glob("built-*")}
    assert len(list(tmp_path.glob("built-*"))) in (2, 3)  # the third may come up when all is done
    until(lambda: not workers(), 10)


def test_what_the_work_raises_comes_back_as_it_is(
    two: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyError) as ours:
        two.spread(partial(noting, tmp_path), ["ours"], print)
    assert type(ours.value) is KeyError and "cluster_parts.py" in str(ours.value.__cause__)  # where it happened
    with pytest.raises(Refused, match="not allowed") as refused:
        two.spread(partial(noting, tmp_path), ["refused"], print)
    assert type(refused.value) is Refused and refused.value.rule == "classes"
    monkeypatch.setattr("mezzotint.cluster.workers.TRIES", 2)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="2 workers were lost with the same piece"):
        two.spread(partial(noting, tmp_path), ["deadly"], print)


def test_what_stands_comes_back_when_it_is_killed(two: Cluster, tmp_path: Path) -> None:
    with two.standing(partial(Held, tmp_path)) as ask:
        before = ask(10.0, "who", "a")
        assert [word for word, _ in before] == ["a", "a"]
        os.kill(before[0][1], signal.SIGKILL)
        after = ask(30.0, "who", "b")
        assert after[0][0] == "b" and after[0][1] != before[0][1] and after[1] == ("b", before[1][1])
    until(lambda: not workers(), 10)
    (tmp_path / "broken").touch()
    with pytest.raises(InputError, match="this cannot be held"), two.standing(partial(Held, tmp_path)):
        pass


def test_a_missing_library_and_a_wrong_address_are_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        began = time.monotonic()
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "nonsense", "127.0.0.1:x"):
            with pytest.raises(InputError, match=f"--cluster {address}: no cluster of Ray answers"):
                Cluster(2, address).spread(partial(noting, HERE), ["a"], print)
        assert time.monotonic() - began < 20
    monkeypatch.setattr("mezzotint.extras.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mezzotint\[ray\]'"):
        Cluster(2).spread(partial(noting, HERE), ["a"], print)


COUNT = 18  # in three batches


@pytest.fixture(scope="module")
def painting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A set of images in a folder by its name, painted as asked for."""
    root = tmp_path_factory.mktemp("painting")
    good = cells(root / "good", 5, 1)

    def paint(name: str, *more: str) -> Path:
        args = ["--model", str(tiny_folder), "--good", str(good), "--out", str(root / name), "--type", "mono"]
        assert main(["synth", *args, "--count", str(COUNT), "--steps", "6", "--seed", "4", "--json", *more]) == 0
        return root / name

    return paint


@pytest.fixture(scope="module")
def alone(painting: Callable[..., Path]) -> Path:
    return painting("alone")


def same(out: Path, alone: Path) -> None:
    """A set is complete and as one process paints it; up to float rounding, where processes have other threads."""
    ours, theirs = (json.loads((each / "manifest.json").read_text())["images"] for each in (out, alone))
    assert [record["file"] for record in ours] == [f"images/{i:06d}.png" for i in range(COUNT)]
    for mine, other in zip(ours, theirs, strict=True):
        for kind in ("file", "mask", "source"):
            name = mine["file"] if kind == "file" else mine[kind]["file" if kind == "mask" else "resized"]
            most = np.abs(pixels((out / name).read_bytes()) - pixels((alone / name).read_bytes())).max()
            assert most <= (1 if kind == "file" else 0)
        free = {"sha256": "", "pixels": "", "governance": {}}
        assert mine | free == other | free
    assert not list(out.glob("*/.*"))


def test_two_workers_paint_what_one_process_paints(
    two: Cluster, painting: Callable[..., Path], alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = painting("two", "--engine", "ray")
    same(out, alone)
    assert json.loads(capsys.readouterr().out)["images"] == COUNT  # what workers say does not stand among answers
    assert (out / "recipe.toml").read_text() == (alone / "recipe.toml").read_text().replace(str(alone), str(out))


def test_a_worker_killed_in_the_middle_loses_and_repeats_nothing(
    two: Cluster, painting: Callable[..., Path], alone: Path
) -> None:
    log = audit.place()
    before, out = audit.check(log).rows, alone.parent / "killed"
    kept: dict[Path, int] = {}

    def kill() -> None:
        until(lambda: len(list(out.glob("records/0*.json"))) >= 3)
        pid = until(lambda: next((pid for pid, name in workers().items() if name == "ray::Worker.work"), None))
        os.kill(pid, signal.SIGKILL)
        kept.update({path: path.stat().st_mtime_ns for path in out.glob("records/0*.json")})

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.warns(UserWarning, match="a worker was lost"):
        painting("killed", "--engine", "ray")
    killer.join()
    same(out, alone)
    assert 3 <= len(kept) < COUNT and all(path.stat().st_mtime_ns == when for path, when in kept.items())
    released = [row for row in audit.rows(log) if row.n > before and row.event == "released"]
    assert COUNT <= len(released) <= COUNT + 1  # the one that was signed and not yet written down may be signed again
    assert audit.check(log).whole


def test_a_worker_that_sees_another_folder_or_model_says_so(painting: Callable[..., Path], alone: Path) -> None:
    plan = recipe.read(alone / "recipe.toml")
    with paint.marked(alone) as mark:
        with pytest.raises(InputError, match=f"{plan.model} is another model on"):
            paint.elsewhere(plan, "0" * 64, [0], mark)
        with pytest.raises(InputError, match=f"does not see {alone} as it is here"):
            paint.elsewhere(plan, "0" * 64, [0], mark.with_name("another"))
    assert not list(alone.glob("*/.*"))


def test_a_polite_kill_ends_with_its_own_code_whatever_ray_is_waiting_for(two: Cluster) -> None:
    with two.joined() as ray:
        asleep = ray.remote(lambda: time.sleep(60)).remote()
        for wait in (time.sleep, lambda seconds: ray.wait([asleep], timeout=seconds), lambda _: ray.get(asleep)):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            with pytest.raises(SystemExit) as ended, joining.told_to_end():
                wait(30.0)
            assert ended.value.code == 128 + signal.SIGTERM
        with pytest.raises(SystemExit) as ended, joining.told_to_end():
            sys.exit(3)
        assert ended.value.code == 3
        ray.cancel(asleep, force=True)


@pytest.mark.slow
def test_a_set_that_is_told_to_end_takes_its_workers_along(tiny_folder: Path, alone: Path) -> None:
    out = alone.parent / "ended"
    args = ["--model", str(tiny_folder), "--good", str(alone.parent / "good"), "--out", str(out), "--type", "mono"]
    command = [sys.executable, "-m", "mezzotint", "synth", *args, "--count", "5000", "--engine", "ray"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: list(out.glob("records/0*.json")))
        started = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert process.stderr is not None and "SIGTERM" not in (said := process.stderr.read()) and "Trace" not in said
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 10)
    assert not list(out.glob(".*"))


WISHES = [{"seed": 10 * i, "steps": 40 + i % 3, "count": 1 + i % 2, "label": CLASSES[i % 3]} for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(class_model(), tmp_path / "cells")
    (tmp_path / "policy.toml").write_text("name = 'test'\n[pictures]\nunsafe = false\ncopies = false\n")
    return tmp_path


@pytest.mark.slow
def test_a_server_s_workers_draw_every_job_once_whoever_is_killed(two: Cluster, folder: Path) -> None:
    models = Models({"cells": folder / "cells"}, {}, str(folder / "policy.toml"))
    db = f"sqlite:///{folder / 'jobs.db'}"
    store, desks = Store(db), models.desks()
    with two.standing(partial(Hands, models, db, 2)) as ask:
        server = Server(store, desks, True, hands=0, elsewhere=4)
        with answering(server) as url, httpx.Client(base_url=url, timeout=60) as client:
            wish = {"model": "cells", "guidance": 1.0}
            jobs = [client.post("/v1/jobs", json={**wish, **more}).json()["id"] for more in WISHES]
            until(lambda: store.counts().get("running", 0) > 2)  # both have some
            os.kill(next(iter(workers())), signal.SIGKILL)

            def done() -> bool:
                store.recover(3.0)  # as the server does after half a minute
                return store.counts() == {DONE: len(WISHES)}

            until(done, 60, 0.2)
            for id, more in zip(jobs, WISHES, strict=True):
                expected = desks["cells"].pipeline.run(mz.Request(guidance=1.0, **more))
                found = client.get(f"/v1/jobs/{id}").json()["pictures"]
                assert len(found) == len(expected) == more["count"]
                for mine, theirs in zip(found, expected, strict=True):
                    assert mine["seed"] == theirs.record["seed"]
                    assert np.abs(pixels(client.get(mine["url"]).content) - pixels(theirs.data)).max() <= 1
            assert {job.attempts for job in store.listed(None)} == {1, 2}
            answer = client.post("/v1/images/generations", json={"model": "cells", "prompt": "crack", "steps": 3})
            assert answer.status_code == 200 and answer.json()["data"]
            assert server.counts() == [] and 0.5 <= server.pace() < 10
            server.others = partial(ask, 20.0, "counts")
            told = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
            assert told["mezzotint_processes_drawing"] == "2.0" and told["mezzotint_hands_at_work"] == "0.0"
            assert float(told['mezzotint_network_calls{model="cells"}']) > 40  # of any one job
            assert ask(20.0, "close", 10.0) == [True, True]


@pytest.mark.slow
def test_the_command_draws_with_workers_ends_what_is_begun_and_leaves_nobody(folder: Path) -> None:
    with serving(folder, "--engine", "ray", "--hands", "1") as (process, client):
        wish = {"model": "cells", "label": "crack", "steps": 200, "guidance": 1.0}
        for i in range(4):
            client.post("/v1/jobs", json={**wish, "seed": i})
        store = Store(f"sqlite:///{folder / 'home' / 'jobs.db'}")
        until(lambda: store.counts().get("running", 0) == 2)
        started = descendants(process.pid)
        assert sum(name.startswith("ray::Worker") for name in started.values()) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert store.counts().keys() <= {DONE, QUEUED} and store.counts()[DONE] >= 2
    assert all(job.attempts == (job.state == DONE) for job in store.listed(None))
    store.close()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 10)
