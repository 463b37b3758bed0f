"""The audit log: a row for everything that happened, each bound to the one before, so that none can be changed unseen.

One JSON object a line. A row's hash is over the row and the hash before it. Rows are only ever appended. Beside the log
lies its head, the number and hash of the last row, by which rows cut off at the end are found. Whoever can write both
files can still write a whole new log: keep the head elsewhere, too, where that is to be ruled out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from mezzotint import files
from mezzotint.errors import InputError
from mezzotint.governance.home import home

FIRST = "0" * 64  # the hash before the first row
TORN = "torn"  # the event that accounts for a line that was cut off by a crash
TAIL = 1 << 16  # bytes that are read from the end to find the last row


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the log."""

    n: int
    time: str  # UTC
    event: str
    facts: Mapping[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True, slots=True)
class Audit:
    """What checking a log gave."""

    rows: int
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return not self.problems


def place(path: Path | None = None) -> Path:
    """The log given, else that of this user."""
    return path if path is not None else home() / "audit.jsonl"


def append(path: Path, event: str, facts: Mapping[str, Any]) -> Row:
    """Add a row; it is on the disk when this returns. Safe between processes.

    A line that an earlier crash cut off stays, and a row before the new one accounts for it. InputError where the log
    cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            last, torn = _last(stream)
            if torn:
                what = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
                last = _write(stream, _row(last, TORN, what))
            row = _write(stream, _row(last, event, facts))
            stream.flush()
            os.fsync(stream.fileno())
            files.write_json(_head(path), {"n": row.n, "hash": row.hash})
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"the audit log {path} cannot be written: {why}. Nothing is given out unlogged.") from error
    return row


def check(path: Path) -> Audit:
    """Follow the chain from the first row to the last; every break is named by its row."""
    problems: list[str] = []
    before, count, broken = FIRST, 0, b""
    hashes: dict[int, str] = {}
    for line in _lines(path):
        row = _parsed(line)
        if row is None:
            problems += [f"after row {count}: a line that is no row"] if broken else []
            broken = line
            continue
        if broken:
            accounted = row.event == TORN and row.facts.get("sha256") == hashlib.sha256(broken).hexdigest()
            problems += [] if accounted else [f"after row {count}: a line that is no row"]
            broken = b""
        count += 1
        if row.n != count:
            problems.append(f"row {count}: is numbered {row.n}, so rows are missing, added or in another order")
            count = row.n
        if row.previous != before:
            problems.append(f"row {row.n}: does not follow from the row before it")
        if row.hash != _hash(row):
            problems.append(f"row {row.n}: was changed ({row.event} of {row.time})")
        before = row.hash
        hashes[row.n] = row.hash
    if broken:
        problems.append(f"after row {count}: the last line was cut off")
    problems += _against_head(path, count, hashes)
    return Audit(count, tuple(problems))


def rows(path: Path, holding: str = "") -> Iterator[Row]:
    """All rows whose line holds a text, such as a digest, in their order; lines that are no rows are passed over."""
    for line in _lines(path):
        if holding.encode() in line and (row := _parsed(line)) is not None:
            yield row


def head(path: Path) -> tuple[int, str] | None:
    """Number and hash of the last row as they were written down beside the log."""
    try:
        found = json.loads(_head(path).read_bytes())
        return int(found["n"]), str(found["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _head(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _against_head(path: Path, count: int, hashes: Mapping[int, str]) -> list[str]:
    known = head(path)
    if known is None:
        return [f"the head {_head(path).name} is missing or unreadable"] if count else []
    n, digest = known
    if n > count:
        return [f"rows {count + 1} to {n} are missing at the end"]
    return [] if n == 0 or hashes.get(n) == digest else [f"row {n}: is not the one that the head names"]


def _lines(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise InputError(f"no such audit log: {path}")
    with open(path, "rb") as stream:
        for line in stream:
            yield line.rstrip(b"\n")


def _parsed(line: bytes) -> Row | None:
    try:
        return Row(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _hash(row: Row) -> str:
    return files.sha256_json([row.n, row.time, row.event, row.facts, row.previous])


def _row(last: Row | None, event: str, facts: Mapping[str, Any]) -> Row:
    n, previous = (last.n + 1, last.hash) if last else (1, FIRST)
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    facts = json.loads(json.dumps(facts))  # as it will be read
    row = Row(n, time, event, facts, previous, "")
    return Row(n, time, event, facts, previous, _hash(row))


def _write(stream: BinaryIO, row: Row) -> Row:
    content = {"n": row.n, "time": row.time, "event": row.event, "facts": row.facts, "previous": row.previous,
               "hash": row.hash}  # fmt: skip
    stream.seek(0, os.SEEK_END)
    stream.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")
    return row


def _last(stream: BinaryIO) -> tuple[Row | None, bytes]:
    """The last whole row, and what a crash left behind it."""
    size, reach = stream.seek(0, os.SEEK_END), TAIL
    while size:
        stream.seek(max(0, size - reach))
        *lines, rest = stream.read().split(b"\n")
        found = next((row for line in reversed(lines) if (row := _parsed(line)) is not None), None)
        if found is not None or reach >= size:
            return found, rest
        reach *= 4
    return None, b""
