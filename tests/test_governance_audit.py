"""The audit log: what is changed, removed, added, moved or cut off is found and named."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mezzotint.errors import InputError
from mezzotint.governance import audit


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    for i in range(6):
        audit.append(path, "drawn", {"picture": f"digest-{i}", "seed": i})
    return path


def test_a_log_is_whole_and_found_again_by_what_it_holds(log: Path) -> None:
    assert audit.check(log) == audit.Audit(6, ())
    (row,) = audit.rows(log, "digest-4")
    assert (row.n, row.event, row.facts["seed"]) == (5, "drawn", 4)
    assert log.stat().st_mode & 0o777 == 0o600
    assert audit.head(log) == (6, list(audit.rows(log))[-1].hash)


def edit(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[2].replace('"seed":2', '"seed":7'), *lines[3:]]


def edit_with_its_hash(lines: list[str]) -> list[str]:
    row = json.loads(lines[2])
    row["facts"]["seed"] = 7
    row["hash"] = audit._hash(audit.Row(**row))
    return [*lines[:2], json.dumps(row), *lines[3:]]


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (edit, "row 3: was changed (drawn"),
        (edit_with_its_hash, "row 4: does not follow"),
        (lambda lines: [*lines[:2], *lines[3:]], "row 3: is numbered 4"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "row 4: is numbered 3"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "row 2: is numbered 3"),
        (lambda lines: lines[:-2], "rows 5 to 6 are missing at the end"),
        (lambda lines: [*lines[:3], "nonsense", *lines[3:]], "after row 3: a line that is no row"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "the last line was cut off"),
    ],
)  # fmt: skip
def test_what_was_done_to_a_log_is_named(tamper: Callable[[list[str]], list[str]], said: str, log: Path) -> None:
    log.write_text("\n".join(tamper(log.read_text().splitlines())) + "\n")
    found = audit.check(log)
    assert not found.whole and any(said in problem for problem in found.problems), found.problems


def test_a_forged_last_row_is_not_the_one_that_the_head_names(log: Path) -> None:
    *lines, last = log.read_text().splitlines()
    row = json.loads(last)
    row["facts"]["seed"] = 9
    row["hash"] = audit._hash(audit.Row(**row))
    log.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    assert audit.check(log).problems == ("row 6: is not the one that the head names",)


def test_a_line_cut_off_by_a_crash_is_kept_and_accounted_for(log: Path) -> None:
    with open(log, "ab") as stream:
        stream.write(b'{"n":7,"time":"20')
    row = audit.append(log, "drawn", {"seed": 7})
    assert row.n == 8 and audit.check(log).whole
    assert [each.event for each in audit.rows(log)][-2:] == ["torn", "drawn"]
    content = log.read_text().replace('{"n":7,"time":"20\n', '{"n":7,"time":"19\n')
    log.write_text(content)
    assert audit.check(log).problems == ("after row 6: a line that is no row",)


def many(path: Path, count: int) -> None:
    for i in range(count):
        audit.append(path, "drawn", {"process": os.getpid(), "i": i})


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=many, args=(path, 15)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert audit.check(path) == audit.Audit(60, ())


def test_a_killed_writer_loses_nothing_that_it_had_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    script = "\n".join([
        "from pathlib import Path", "from mezzotint.governance import audit", "i = 0", "while True:",
        f"    audit.append(Path({str(path)!r}), 'drawn', {{'i': i}})", "    i += 1", "    print(i, flush=True)",
    ])  # fmt: skip
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    for _ in range(20):
        said = int(worker.stdout.readline())
    time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    said = max([said, *(int(line) for line in worker.stdout.read().split() if line.isdecimal())])
    worker.wait()
    audit.append(path, "after", {})
    found = audit.check(path)
    assert found.whole and [row.facts["i"] for row in audit.rows(path) if row.event == "drawn"][:said] == list(
        range(said)
    )


def test_a_log_that_cannot_be_written_or_read_is_said(tmp_path: Path, log: Path) -> None:
    with pytest.raises(InputError, match="no such audit log"):
        audit.check(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="Nothing is given out unlogged"):
        audit.append(log / "below.jsonl", "drawn", {})
    (log.parent / "audit.jsonl.head").unlink()
    assert audit.check(log).problems == ("the head audit.jsonl.head is missing or unreadable",)
