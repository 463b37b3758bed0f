"""What a run holds while it works: its folder, for itself alone, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from mezzotint.errors import InputError


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, however that ends. InputError where another run has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115 (closed below, after the run)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}. Choose another folder.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is training in {folder}: wait for it, or stop it first.") from error
        yield


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and a polite kill ask the loop to finish its step, save once, and end; repeating them changes nothing."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
