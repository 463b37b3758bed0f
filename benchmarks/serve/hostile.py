"""Requests and files that mean no good, and what each gets: prints the table of docs/hostile.md.

    python benchmarks/serve/hostile.py > docs/hostile.md

The list is the tests' own (tests/test_serve_hostile.py), sent to the same server.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import serve_parts
from test_serve_hostile import JOBS, LIMITS, ROUTES

from mezzotint.serve.server import Server
from mezzotint.serve.store import Store

HEAD = """# What the server says to those who mean no good

`benchmarks/serve/hostile.py` sends this list to a server that takes 2 MB; `tests/test_serve_hostile.py` holds every
status to it, and sends what is no HTTP, bodies without end and broken forms besides. After all of it the server draws.
`tests/test_serve_schema.py` makes up requests from the OpenAPI document.
"""


def said(answer: httpx.Response) -> str:
    """The words of an answer, as a table can hold them."""
    try:
        text = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = " ".join(answer.text.split())
    return text.replace("|", "\\|").replace("<", "&lt;")[:160]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/jobs.db")
        server = Server(store, {"cells": serve_parts.desk()}, True, Path(folder) / "audit.jsonl", LIMITS, hands=2)
        with serve_parts.answering(server) as url, httpx.Client(base_url=url, timeout=60) as client:
            print(f"{HEAD}\n## Bodies of POST /v1/jobs\n\n| what | status | answer |\n|---|---|---|")
            for name, (body, _, _) in JOBS.items():
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                answer = client.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
                print(f"| {name} | {answer.status_code} | {said(answer)} |")
            print("\n## Other routes\n\n| what | request | status | answer |\n|---|---|---|---|")
            for name, (method, path, _) in ROUTES.items():
                answer = client.request(method, path)
                shown = path if len(path) < 60 else f"{path[:50]}..."
                print(f"| {name} | `{method} {shown}` | {answer.status_code} | {said(answer)} |")


if __name__ == "__main__":
    main()
