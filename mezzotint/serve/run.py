"""A server at work: bind, answer, and on SIGTERM or Ctrl-C end what was begun."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from mezzotint.errors import InputError
from mezzotint.serve.app import create
from mezzotint.serve.log import logged
from mezzotint.serve.server import Server

HEAD = 65_536  # bytes of a request's headers


def answer(server: Server, host: str, port: int, drain: float, ready: Callable[[str], None]) -> bool:
    """Answer until told to stop; `ready` hears the address. Whether all running jobs ended within `drain` seconds."""
    logged()
    config = uvicorn.Config(
        create(server), host, port, log_config=None, timeout_graceful_shutdown=int(drain), server_header=False,
        lifespan="off", h11_max_incomplete_event_size=HEAD,
    )  # fmt: skip
    runner = uvicorn.Server(config)
    with bound(host, port) as place:
        ready(f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}")
        for told in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it is done, and we are not
            signal.signal(told, lambda *_: None)
        runner.run([place])
    return server.close(drain) and runner.started


def bound(host: str, port: int) -> socket.socket:
    """The place where callers knock; InputError where it is taken, or not ours."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}. Choose another --port.") from error
