"""What the server's tests share: a desk with a small model, a server on a port of its own, pictures as bytes."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from parts import class_model
from PIL import Image

import mezzotint as mz
from mezzotint.batching import Batcher
from mezzotint.governance.policy import Policy
from mezzotint.serve.app import create
from mezzotint.serve.crew import Desk
from mezzotint.serve.server import Server


def desk(model: mz.Model | None = None, **tables: dict[str, Any]) -> Desk:
    """A small model under a policy that looks at no picture, but for these tables."""
    plain = {"pictures": {"unsafe": False, "copies": False}}
    rules = Policy.model_validate({"name": "test", **plain, **tables})
    pipeline = mz.pipeline(model or class_model(), rules)
    return Desk(pipeline, Batcher(pipeline.model.backbone))


@contextmanager
def answering(server: Server) -> Iterator[str]:
    """The address at which the server answers for the length of the block; it is closed with its store afterwards."""
    runner = uvicorn.Server(uvicorn.Config(create(server), host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join(10)
        server.close(10)
        server.store.close()


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
