"""`mezzotint serve` as a process: it answers, it is killed, and the next one finishes what was accepted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from parts import class_model
from test_plan import SPEEDS

from mezzotint.cli.main import main
from mezzotint.families import save
from mezzotint.plan import calibrate
from mezzotint.plan.generating import Job, generating
from mezzotint.plan.machines import Machine
from mezzotint.plan.subject import find
from mezzotint.serve.asked import Asked
from mezzotint.serve.prices import Prices
from mezzotint.serve.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(class_model(), tmp_path / "cells")
    (tmp_path / "policy.toml").write_text("name = 'test'\n[pictures]\nunsafe = false\ncopies = false\n")
    return tmp_path


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A server process and a client of it."""
    environment = {**os.environ, "MEZZOTINT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    args = [sys.executable, "-m", "mezzotint", "serve", "--model", str(folder / "cells"), "--port", "0",
            "--policy", str(folder / "policy.toml"), *more]  # fmt: skip
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.match(r"(http://127\.0\.0\.1:\d+) serves cells", line)
    assert found, line + process.stderr.read()
    with httpx.Client(base_url=found[1], timeout=60) as client:
        try:
            yield process, client
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


@pytest.mark.slow
def test_what_was_accepted_outlives_a_killed_server_and_is_done_once(folder: Path) -> None:
    wish = {"model": "cells", "label": "crack", "steps": 200, "guidance": 1.0, "count": 4}
    with serving(folder, "--hands", "2") as (process, client):
        ids = [client.post("/v1/jobs", json={**wish, "seed": 10 * i}).json()["id"] for i in range(3)]
        until = time.monotonic() + 60
        while client.get(f"/v1/jobs/{ids[0]}").json()["step"] < 2 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    store = Store(f"sqlite:///{folder / 'home' / 'jobs.db'}")
    assert store.counts() == {"running": 2, "queued": 1}
    assert store.recover(0.0) == 2  # as the next server does after half a minute
    store.close()
    with serving(folder) as (process, client):
        until = time.monotonic() + 120
        jobs: list[Any] = []
        while time.monotonic() < until:
            jobs = [client.get(f"/v1/jobs/{id}").json() for id in ids]
            if all(job["state"] == "done" for job in jobs):
                break
            time.sleep(0.1)
        assert [job["state"] for job in jobs] == ["done"] * 3
        assert all(len(job["pictures"]) == 4 for job in jobs)
        assert client.get(jobs[0]["pictures"][3]["url"]).content.startswith(b"\x89PNG")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(("verb", "missing"), [("serve", "fastapi"), ("keys", "sqlalchemy")])
def test_a_missing_library_is_said_with_what_installs_it(
    verb: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mezzotint.extras.find_spec", lambda name: None if name == missing else name)
    assert main([verb, *{"serve": ["--model", "."], "keys": ["list"]}[verb]]) == 2
    assert f"{missing} is not installed: pip install 'mezzotint[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "missing --model"),
        (["--model", "nowhere"], "no such file or folder: nowhere"),
        (["--model", "a=.", "--model", "a=."], "two are named 'a'"),
        (["--model", "a b=."], "a name is letters, digits"),
        (["--model", ".", "--adapter", "x.safetensors"], "as NAME=PATH"),
        (["--model", ".", "--hands", "0"], "--hands must be at least 1"),
        (["--model", ".", "--port", "70000"], "--port is at most 65535"),
        (["--model", ".", "--host", "0.0.0.0"], "there is no key"),
        (["--model", ".", "--db", "nothing"], "no database by this URL"),
        (["--model", ".", "--workers", "2"], "--workers 2 goes with --engine ray"),
        (["--model", ".", "--engine", "ray", "--workers", "0"], "--workers must be at least 1"),
        (["--model", ".", "--engine", "ray", "--cluster", "auto"], "is a file of this machine"),
        (["--model", ".", "--engine", "ray", "--device", "cuda:1"], "with --engine ray say cuda"),
        (["--model", "CELLS", "--price-per-hour", "2"], "cpu was not measured yet"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if "CELLS" in options:
        save(class_model(), tmp_path / "cells")
    assert main(["serve", *(str(tmp_path / "cells") if word == "CELLS" else word for word in options)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") <= 2


def test_a_job_costs_what_the_plan_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    machine = Machine("test", "cpu", 8e9, {"float32": SPEEDS}, 1e-6, 0.0, "made up", True, {"forward": 1.0})
    calibrate.keep(machine, "cpu")
    prices = Prices(folder / "cells", "float32", "cpu", 3.6)
    asked = Asked(model="cells", seed=1, label="crack", steps=3, guidance=1.0, count=2)
    job = Job(steps=3, guidance=1.0, images=2, batch=2)
    expected = generating(find(str(folder / "cells")), job, machine).seconds
    assert expected is not None and prices.of(asked) == pytest.approx(expected / 1000) and expected > 0
    more, again = prices.of(asked.model_copy(update={"steps": 6})), prices.of(asked)
    assert more is not None and again is not None and more > 1.5 * again
    prices.close()


def test_keys_are_made_shown_once_and_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path))
    assert main(["keys", "add", "line", "--per-day", "50"]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("mz-") and secret.encode() not in (tmp_path / "jobs.db").read_bytes()
    assert main(["keys", "list"]) == 0 and "line: user, any requests a minute, 50 pictures" in capsys.readouterr().out
    for wrong, said in ((["add", "line"], "already"), (["add", "x", "--role", "king"], "no role"),
                        (["add"], "Give a name"), (["revoke", "other"], "no key named")):  # fmt: skip
        assert main(["keys", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["keys", "revoke", "line"]) == 0 and main(["keys", "add", "line"]) == 0
