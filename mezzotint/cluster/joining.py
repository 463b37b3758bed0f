"""Ray itself: found, started on this machine or met where it is, and left."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from mezzotint.errors import InputError
from mezzotint.extras import need

ANSWER = 5.0  # seconds that a cluster gets to answer at all
STORE = 100_000_000  # bytes of memory for what is handed over, which is little
# What Ray reads when it is imported: always, for a cluster that is there (what is none is given up after 40 seconds),
# and for one on this machine (which then answers no other one, on any system).
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
THERE = {"RAY_NUM_REDIS_GET_RETRIES": "1"}
HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def library(**more: str) -> Any:
    """Ray, told `more` where the environment says nothing else; InputError where it is not installed."""
    need("ray")
    for name, value in {**QUIET, **more}.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


@contextmanager
def joined(address: str | None, workers: int) -> Iterator[Any]:
    """Ray for the length of the block; without an address, on the cluster that the caller has, or on one of its own."""
    ray = library(**(THERE if address else HERE))
    if address is None and ray.is_initialized():
        yield ray
        return
    session = start(ray, workers) if address is None else connect(ray, address)
    try:
        with redirect_stdout(sys.stderr), told_to_end():  # where Ray prints what workers say, and that one was lost
            yield ray
    finally:
        ray.shutdown()
        if session is not None:
            shutil.rmtree(session, ignore_errors=True)


@contextmanager
def told_to_end() -> Iterator[None]:
    """A polite kill ends the block as an error does, and takes its processes along; Ray's own answer is to abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    told = False

    def end(number: int, frame: Any) -> None:
        nonlocal told
        told = True
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit:
        if told:  # what Ray was waiting for when it came ends with a code of its own, 1
            sys.exit(128 + signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def start(ray: Any, workers: int) -> str:
    """A cluster of this machine, and the folder of its logs."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # no other user of this machine is answered
    context = ray.init(
        "local", num_cpus=max(os.cpu_count() or 1, workers), include_dashboard=False, object_store_memory=STORE,
        logging_level=logging.ERROR, _node_ip_address="127.0.0.1",
    )  # fmt: skip
    return context.address_info["session_dir"]


def connect(ray: Any, address: str) -> None:
    """Be on a cluster that is there; InputError where there is none, in less than a minute."""
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":
            with socket.create_connection((host.strip("[]"), int(port)), ANSWER):
                pass
        ray.init(address, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"--cluster {address}: no cluster of Ray answers as HOST:PORT or auto: {why}\n"
            f"Start one with `ray start --head`; one that asks for a token wants RAY_AUTH_MODE=token here."
        ) from error


def share(nodes: Sequence[dict[str, Any]], workers: int, gpus: int = 0) -> int:
    """Processors of each worker: as many as let all of them find a place; InputError where there is none."""
    sizes = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, cards = ([int(size.get(name, 0)) for size in sizes] for name in ("CPU", "GPU"))
    fits = [n for n in range(1, max(cpus, default=0) + 1) if sum(each // n for each in cpus) >= workers]
    if not fits or gpus * workers > sum(cards):
        raise InputError(
            f"--workers {workers} find no place: the cluster has {sum(cpus)} processors and {sum(cards)} GPUs"
        )
    return 1 if gpus else max(fits)
