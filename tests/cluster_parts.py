"""What the cluster's tests let workers do, apart from everything that is slow to import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

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
