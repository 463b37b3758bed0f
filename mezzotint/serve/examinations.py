"""The doctor at the server: models are examined by a process of their own, one at a time, behind those who draw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.doctor.causes import CAUSES
from mezzotint.errors import InputError
from mezzotint.governance.home import home

NICE = 10
PAGE, DATA, LOG = "doctor.html", "doctor.json", "doctor.log"


@dataclass(frozen=True, slots=True)
class Exam:
    """How it stands with a model."""

    model: str
    running: bool
    says: str  # the verdict, or how far it is, or why it failed
    state: str  # none, running, healthy, ill, failed
    when: float | None  # of the report
    findings: tuple[tuple[str, str, str], ...] = ()  # grade, title of the cause, what it says


class Examinations:
    """The reports on the models that are served, `paths` by name; `data` are images such as each was trained on."""

    def __init__(
        self, paths: Mapping[str, Path], data: Mapping[str, Path] | None = None, folder: Path | None = None
    ) -> None:
        self.paths, self.data = dict(paths), dict(data or {})
        self.folder = folder or home() / "doctor"
        self._lock = threading.Lock()
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None

    def start(self, model: str) -> None:
        """Examine a model; InputError where there is none by this name, or another one is being examined."""
        if model not in self.paths:
            raise InputError(f"no model {model[:80]!r} here: {', '.join(sorted(self.paths))}")
        with self._lock:
            if self._busy():
                raise InputError("the doctor examines another model: wait until it is done")
            out = self.folder / model
            out.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "mezzotint", "doctor", str(self.paths[model]), "--out", str(out)]
            if model in self.data:
                command += ["--data", str(self.data[model])]
            with (out / LOG).open("wb") as log:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
            self._running = model, process

    def all(self) -> list[Exam]:
        """How it stands with every model."""
        with self._lock:
            self._busy()
            return [self._of(model) for model in self.paths]

    def report(self, model: str) -> str | None:
        """The page on a model."""
        try:
            return (self.folder / model / PAGE).read_text("utf-8") if model in self.paths else None
        except OSError:
            return None

    def close(self) -> None:
        """End what is running; the report before it stays."""
        with self._lock:
            if self._running is not None:
                self._running[1].terminate()
                self._running[1].wait()
                self._running = None

    def _busy(self) -> bool:
        if self._running is not None and self._running[1].poll() is None:
            return True
        if self._running is not None:
            model, process = self._running
            self._running = None
            if process.returncode not in (0, 1):  # its own answers
                (self.folder / model / LOG).rename(self.folder / model / f"{LOG}.failed")
            else:
                (self.folder / model / f"{LOG}.failed").unlink(missing_ok=True)
        return False

    def _of(self, model: str) -> Exam:
        folder = self.folder / model
        if self._running is not None and self._running[0] == model:
            return Exam(model, True, last(folder / LOG) or "it begins", "running", None)
        if (folder / f"{LOG}.failed").is_file():
            return Exam(model, False, last(folder / f"{LOG}.failed") or "it ended without a word", "failed", None)
        try:
            told: dict[str, Any] = json.loads((folder / DATA).read_text("utf-8"))
            when = (folder / DATA).stat().st_mtime
        except (OSError, ValueError):
            return Exam(model, False, "not examined yet", "none", None)
        found = tuple((each["grade"], titled(each["cause"]), each["says"]) for each in told["findings"])
        return Exam(
            model, False, told["verdict"], "healthy" if told["healthy"] else "ill", min(when, time.time()), found
        )


def titled(cause: str) -> str:
    """What people call a cause."""
    return CAUSES[cause].title if cause in CAUSES else cause


def last(path: Path) -> str:
    """The last line of a log."""
    try:
        lines = path.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("mezzotint: ")[:300] if lines else ""
