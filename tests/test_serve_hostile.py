"""Requests and files that mean no good, and what each gets: an error of a line, never a traceback, never a file."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serve_parts import answering, desk, encoded

from mezzotint.serve.server import Limits, Server
from mezzotint.serve.store import Store

WISH = {"model": "cells", "label": "crack", "steps": 2, "guidance": 1.0}
LIMITS = Limits(body=2_000_000, per_minute=100_000, wait=20.0)
IMAGE = encoded(Image.new("RGB", (16, 16), (90, 90, 90)))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MEZZOTINT_HOME", str(root / "home"))
        store = Store(f"sqlite:///{root / 'jobs.db'}")
        server = Server(store, {"cells": desk()}, True, root / "audit.jsonl", LIMITS, hands=2)
        with answering(server) as address:
            yield address


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(width: int, height: int, claimed: bytes = b"") -> bytes:
    """A PNG that claims a size, with next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", claimed or zlib.compress(bytes(100))) + chunk(
        b"IEND", b""
    )  # fmt: skip


def bomb() -> bytes:
    """Three gigabytes of text in three megabytes, squeezed again into a comment of a small PNG."""
    stream = io.BytesIO()
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "x" * 80_000_000, zip=True)
    Image.new("RGB", (16, 16)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


JOBS = {  # bodies of POST /v1/jobs -> status and words of the answer
    "no body": (b"", 400, "body"),
    "no JSON": (b"{not json", 400, "JSON"),
    "a list": (b"[]", 400, ""),
    "a number": (b"7", 400, ""),
    "null": (b"null", 400, ""),
    "bytes that are no text": (b"\xff\xfe\x00", 400, ""),
    "a very deep list": (b"[" * 100_000, 400, ""),
    "a key twice, then nonsense": (b'{"model": "cells", "model": 7}', 400, "model"),
    "no model": ({"label": "crack"}, 400, "model"),
    "another model": ({**WISH, "model": "dall-e-3"}, 404, "no model"),
    "a path for a model": ({**WISH, "model": "../../etc/passwd"}, 400, "model"),
    "a file URL for a model": ({**WISH, "model": "file:///etc/passwd"}, 400, "model"),
    "a name with a zero byte": ({**WISH, "model": "cells\x00"}, 400, "model"),
    "an unknown field": ({**WISH, "lora": "/etc/passwd"}, 400, "lora"),
    "start noise of one's own": ({**WISH, "start_noise": [[0.0]]}, 400, "start_noise"),
    "a prompt of a megabyte": ({**WISH, "prompt": "x" * 1_000_000}, 400, "prompt"),
    "a prompt that is a list": ({**WISH, "prompt": ["x"]}, 400, "prompt"),
    "a lone surrogate": (b'{"model": "cells", "label": "\\ud800"}', 400, ""),
    "count 0": ({**WISH, "count": 0}, 400, "count"),
    "count -1": ({**WISH, "count": -1}, 400, "count"),
    "count a million": ({**WISH, "count": 1_000_000}, 400, "count"),
    "count as text": ({**WISH, "count": "many"}, 400, "count"),
    "count a half": ({**WISH, "count": 1.5}, 400, "count"),
    "steps a million": ({**WISH, "steps": 1_000_000}, 400, "steps"),
    "steps 0": ({**WISH, "steps": 0}, 400, "steps"),
    "a negative seed": ({**WISH, "seed": -1}, 400, "seed"),
    "a seed beyond all": ({**WISH, "seed": 2**70}, 400, "seed"),
    "a width beyond memory": ({**WISH, "width": 100_000, "height": 100_000}, 400, "width"),
    "a negative width": ({**WISH, "width": -16, "height": 16}, 400, "width"),
    "a width alone": ({**WISH, "width": 16}, 400, "width and height"),
    "guidance that is not a number": (b'{"model": "cells", "label": "crack", "guidance": NaN}', 400, ""),
    "guidance without end": (b'{"model": "cells", "label": "crack", "guidance": Infinity}', 400, ""),
    "guidance 1e308": ({**WISH, "guidance": 1e308}, 400, "guidance"),
    "an unknown sampler": ({**WISH, "sampler": "'; DROP TABLE jobs; --"}, 400, "sampler"),
    "an unknown class": ({**WISH, "label": "kitten"}, 400, "no class"),
    "a class beyond the last": ({**WISH, "label": 99}, 400, "out of range"),
    "a script for a class": ({**WISH, "label": "<script>alert(1)</script>"}, 400, "no class"),
    "both label and prompt": ({**WISH, "prompt": "crack"}, 400, "not both"),
    "an adapter by path": ({**WISH, "adapters": [{"name": "../x.safetensors"}]}, 400, "adapters"),
    "an adapter that is not here": ({**WISH, "adapters": [{"name": "x"}]}, 400, "no adapter"),
    "a hundred adapters": ({**WISH, "adapters": [{"name": "x"}] * 100}, 400, "adapters"),
    "control without a picture": ({**WISH, "control": [{"name": "x"}]}, 400, "pictures"),
    "an image that is no base64": ({**WISH, "image": "%%%%"}, 400, "base64"),
    "an image by URL": ({**WISH, "image": "http://169.254.169.254/latest/meta-data"}, 400, "base64"),
    "an image by path": ({**WISH, "image": "/etc/passwd"}, 400, ""),
    "text for an image": ({**WISH, "image": b64(b"hello")}, 400, "no intact"),
    "a PDF for an image": ({**WISH, "image": b64(b"%PDF-1.7\n" + bytes(500))}, 400, "no intact"),
    "a GIF for an image": ({**WISH, "image": b64(encoded(Image.new("L", (9, 9)), "GIF"))}, 400, "no intact"),
    "a TIFF for an image": ({**WISH, "image": b64(encoded(Image.new("L", (9, 9)), "TIFF"))}, 400, "no intact"),
    "an SVG that reads a file": (
        {**WISH, "image": b64(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')},
        400, "no intact",
    ),
    "half an image": ({**WISH, "image": b64(IMAGE[: len(IMAGE) // 2])}, 400, "no intact"),
    "an image with a wrong checksum": ({**WISH, "image": b64(IMAGE[:40] + b"\x00" + IMAGE[41:])}, 400, "no intact"),
    "an image that claims a billion pixels": ({**WISH, "image": b64(png(40_000, 40_000))}, 400, "pixels"),
    "an image that claims no pixels": ({**WISH, "image": b64(png(0, 0))}, 400, "no intact"),
    "an image whose data bursts": ({**WISH, "image": b64(bomb())}, 400, "no intact"),
    "a mask without an image": ({**WISH, "mask": b64(encoded(Image.new("L", (16, 16))))}, 400, "no image"),
    "a mask of another shape": (
        {**WISH, "image": b64(IMAGE), "mask": b64(encoded(Image.new("L", (64, 16))))}, 400, "one shape",
    ),
    "strength without an image": ({**WISH, "strength": 0.5}, 400, "no image"),
    "patience below nothing": ({**WISH, "patience": -5}, 400, "patience"),
    "patience for years": ({**WISH, "patience": 1e12}, 400, "patience"),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_means_no_good_is_refused_in_a_line(name: str, url: str) -> None:
    body, status, said = JOBS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{url}/v1/jobs", content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]["message"]
    assert said in error and len(error) < 400 and "Traceback" not in error and "/" + "site-packages" not in error
    assert httpx.get(f"{url}/health").status_code == 200


ROUTES: dict[str, tuple[str, str, int]] = {
    "no such route": ("GET", "/v1/secrets", 404),
    "no such method": ("PUT", "/v1/jobs", 405),
    "a job that is not there": ("GET", "/v1/jobs/" + "0" * 32, 404),
    "a job by SQL": ("GET", "/v1/jobs/' OR '1'='1", 404),
    "a job by a path": ("GET", "/v1/jobs/..%2f..%2fetc%2fpasswd", 404),
    "a job of a thousand letters": ("GET", "/v1/jobs/" + "x" * 1000, 404),
    "a picture below the first": ("GET", "/v1/jobs/x/pictures/-1", 400),
    "a picture by name": ("GET", "/v1/jobs/x/pictures/passwd", 400),
    "a picture beyond all": ("GET", "/v1/jobs/x/pictures/99999999999999999999", 400),
    "a list of a million": ("GET", "/v1/jobs?limit=1000000", 400),
    "a list before nonsense": ("GET", "/v1/jobs?before=" + "%00" * 5, 200),
    "events of nothing": ("GET", "/v1/jobs/x/events", 404),
    "cancel nothing": ("DELETE", "/v1/jobs/x", 404),
    "a way out of the static files": ("GET", "/static/../../etc/passwd", 404),
    "the documents of the framework": ("GET", "/docs", 404),
    "a model by a path": ("GET", "/v1/models/..%2f..%2fx", 404),
}


@pytest.mark.parametrize("name", ROUTES)
def test_routes_that_lead_nowhere(name: str, url: str) -> None:
    method, path, status = ROUTES[name]
    answer = httpx.request(method, url + path, timeout=30)
    assert answer.status_code == status, answer.text
    assert "root:" not in answer.text and answer.headers["x-content-type-options"] == "nosniff"


def test_forms_that_are_none(url: str) -> None:
    for files, data, said in (
        ({}, {"prompt": "crack"}, "image"),
        ({"image": b"no picture"}, {"prompt": "crack", "model": "cells"}, "no intact"),
        ({"image": IMAGE, "mask": b"none"}, {"prompt": "crack", "model": "cells"}, "no intact"),
        ({"image": IMAGE, "other": IMAGE}, {"prompt": "crack"}, "other"),
        ({"image": IMAGE}, {"prompt": "crack", "n": "-3"}, "n"),
        ({"image": IMAGE}, {"prompt": "crack", "path": "/etc/passwd"}, "path"),
        ({"image": IMAGE}, {}, "prompt"),
    ):
        answer = httpx.post(f"{url}/v1/images/edits", files=files or None, data=data, timeout=60)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
    answer = httpx.post(f"{url}/v1/images/edits", content=b"x", headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400


def test_bodies_beyond_the_bound_are_not_read(url: str) -> None:
    answer = httpx.post(f"{url}/v1/jobs", content=bytes(2_000_001), timeout=30)
    assert answer.status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(100_000)

    with contextlib.suppress(httpx.WriteError):  # the server hung up, which is as good
        assert httpx.post(f"{url}/v1/jobs", content=endless(), timeout=30).status_code == 413
    assert httpx.get(f"{url}/health").status_code == 200


def raw(url: str, text: bytes, patience: float = 5.0) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), patience) as line:
        line.sendall(text)
        try:
            return line.recv(65_536)
        except TimeoutError:
            return b""


def test_what_is_not_http(url: str) -> None:
    assert b" 400 " in raw(url, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    assert b" 400 " in raw(url, b"GET /health\r\n\r\n")
    for length in (b"-5", b"abc", b"99999999999999999999"):
        text = b"POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: " + length + b"\r\n\r\n"
        assert raw(url, text).split(b" ")[1] in (b"400", b"413")
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    both = head + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET"
    assert raw(url, both).split(b" ")[1] in (b"400", b"422")
    answer = raw(url, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: " + b"y" * 200_000 + b"\r\n\r\n")
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"431")
    assert httpx.get(f"{url}/health").status_code == 200


def test_after_all_of_it_the_server_draws(url: str) -> None:
    answer = httpx.post(
        f"{url}/v1/images/generations", json={"model": "cells", "prompt": "crack", "steps": 2}, timeout=60
    )
    assert answer.status_code == 200 and len(answer.json()["data"]) == 1


def test_the_published_list_is_this_one() -> None:
    page = Path(__file__).parents[1] / "docs" / "hostile.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    told = {row[0]: int(next(cell for cell in row if cell.isdecimal())) for row in rows if row[0] != "what"}
    assert told == {name: row[1] for name, row in JOBS.items()} | {name: row[2] for name, row in ROUTES.items()}
    assert len(told) >= 60
