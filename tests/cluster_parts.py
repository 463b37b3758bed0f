"""What the cluster's tests let workers do, and how they look at them; nothing here is slow to import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mezzotint.errors import InputError, Refused

ERRORS = {"refused": Refused("classes", "not allowed"), "ours": KeyError("x")}


def noting(folder: Path) -> Callable[[str], tuple[str, int]]:
    """Work that notes who did it; some pieces end their worker, once or always, or go wrong."""
    (folder / f"built-{os.getpid()}").touch()

    def work(piece: str) -> tuple[str, int]:
        if piece in ERRORS:
            raise ERRORS[piece]
        if piece == "deadly" or (piece == "deadly-once" and not (folder / piece).exists()):
            (folder / piece).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        with open(folder / "log", "a") as log:
            log.write(f"{piece}\n")
        return piece, os.getpid()

    return work


class Held:
    """What stands in a worker; it tells who holds it."""

    def __init__(self, folder: Path) -> None:
        if (folder / "broken").exists():
            raise InputError("this cannot be held")
        self.folder = folder

    def who(self, word: str) -> tuple[str, int]:
        return word, os.getpid()


def descendants(root: int) -> dict[int, str]:
    """Processes that a process has started, and those have, by number; what each is called."""
    found: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(path.name)] = parent, (path / "cmdline").read_bytes().decode(errors="replace").strip("\0")

    def ours(pid: int) -> bool:
        return pid in found and (found[pid][0] == root or ours(found[pid][0]))

    return {pid: name for pid, (_, name) in found.items() if ours(pid)}


def workers() -> dict[int, str]:
    """Those of our own cluster."""
    return {pid: name for pid, name in descendants(os.getpid()).items() if name.startswith("ray::Worker")}


def until(holds: Callable[[], Any], patience: float = 60.0, pause: float = 0.02) -> Any:
    """The first answer that is true."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(pause)
    raise AssertionError("it did not come")
