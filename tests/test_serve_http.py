"""The server over HTTP: OpenAI's own client, our routes, keys, limits, and what wrong requests get."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serve_parts import answering, desk, encoded, pixels

import mezzotint as mz
from mezzotint.governance import audit
from mezzotint.serve import keys
from mezzotint.serve.server import Limits, Server
from mezzotint.serve.store import Store


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))


@dataclass
class House:
    """A server on a port of its own."""

    server: Server
    url: str
    log: Path

    def client(self, key: str = "any", **more: Any) -> Any:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=60, **more)

    def openai(self, key: str = "any") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[House]:
    told: dict[str, Any] = getattr(request, "param", {})
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}", room=told.get("room", 100))
    desks = {"cells": desk()}
    server = Server(store, desks, told.get("open", True), tmp_path / "audit.jsonl", Limits(**told.get("limits", {})),
                    told.get("hands", 4))  # fmt: skip
    with answering(server) as url:
        yield House(server, url, tmp_path / "audit.jsonl")


def test_openai_s_client_draws(house: House) -> None:
    client = house.openai()
    assert [model.id for model in client.models.list()] == ["cells"] and client.models.retrieve("cells").id == "cells"
    found = client.images.generate(
        model="cells", prompt="crack", n=2, size="16x16", extra_body={"seed": 7, "steps": 3, "guidance": 1.0}
    )
    expected = house.server.desks["cells"].pipeline.run(
        mz.Request(prompt="crack", count=2, seed=7, steps=3, guidance=1.0)
    )
    assert found.size == "16x16" and len(found.data) == 2
    for mine, theirs in zip(found.data, expected, strict=True):
        data = base64.b64decode(mine.b64_json)
        assert data.startswith(b"\x89PNG") and np.abs(pixels(data) - pixels(theirs.data)).max() <= 1
    (linked,) = client.images.generate(
        model="cells", prompt="crack", response_format="url", extra_body={"steps": 2}
    ).data
    answer = httpx.get(linked.url, headers={"authorization": "Bearer any"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert pixels(answer.content).shape == (16, 16, 3)


def test_openai_s_client_edits_where_the_mask_is_transparent(house: House) -> None:
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 8, 16))
    named = [("image.png", io.BytesIO(encoded(image))), ("mask.png", io.BytesIO(encoded(mask)))]
    found = house.openai().images.edit(
        model="cells", image=named[0], mask=named[1], prompt="crack", extra_body={"steps": 3, "guidance": 1.0}
    )
    got = pixels(base64.b64decode(found.data[0].b64_json))
    assert (got[:, 8:] == (200, 30, 60)).all() and (got[:, :8] != (200, 30, 60)).any()


def test_errors_reach_openai_s_client_as_its_own(house: House) -> None:
    client = house.openai()
    with pytest.raises(openai.BadRequestError, match="n: "):
        client.images.generate(model="cells", prompt="crack", n=99)
    for words in ({"size": "9999x9999"}, {"extra_body": {"label": "x" * 300}}, {"model": "a b"}):
        with pytest.raises(openai.BadRequestError, match=r"width|label|model"):
            client.images.generate(**({"model": "cells", "prompt": "crack"} | words))
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3' here: cells"):
        client.images.generate(model="dall-e-3", prompt="crack")
    with pytest.raises(openai.BadRequestError, match="did you mean 'crack'"):
        client.images.generate(model="cells", prompt="crck")
    with pytest.raises(openai.BadRequestError, match="unknown sampler"):
        client.images.generate(model="cells", prompt="crack", extra_body={"sampler": "magic"})


def test_a_job_is_accepted_followed_and_fetched(house: House) -> None:
    with house.client() as client:
        answer = client.post("/v1/jobs", json={"model": "cells", "label": "crack", "steps": 6, "guidance": 1.0})
        assert answer.status_code == 202
        job = answer.json()
        assert job["steps"] == 6 and isinstance(job["request"]["seed"], int)
        seen: list[tuple[str, dict[str, Any]]] = []
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            event = ""
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    seen.append((event, json.loads(line[6:])))
        assert seen[-1][0] == "end" and seen[-1][1]["state"] == "done"
        assert [event for event, _ in seen[:-1]] == ["progress"] * (len(seen) - 1)
        (made,) = seen[-1][1]["pictures"]
        picture = client.get(made["url"])
        assert picture.headers["etag"] == f'"{made["sha256"]}"' and "inline" in picture.headers["content-disposition"]
        again = client.post("/v1/jobs", json={**job["request"], "format": "webp"}).json()
        until = time.monotonic() + 30
        while client.get(f"/v1/jobs/{again['id']}").json()["state"] != "done" and time.monotonic() < until:
            time.sleep(0.05)
        same = client.get(f"/v1/jobs/{again['id']}/pictures/0")
        assert same.headers["content-type"] == "image/webp"
        assert np.abs(pixels(same.content) - pixels(picture.content)).max() <= 1
        assert [row["id"] for row in client.get("/v1/jobs").json()["jobs"]] == [again["id"], job["id"]]
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 409


def test_answers_carry_what_keeps_browsers_safe_and_every_request_is_logged(house: House) -> None:
    with house.client() as client:
        answer = client.get("/v1/models", headers={"x-request-id": "my-own-id-1"})
        bad = client.get("/v1/none", headers={"x-request-id": "no\tgood"})
        assert answer.headers["x-request-id"] == "my-own-id-1" and bad.headers["x-request-id"] != "no\tgood"
        for each in (answer, bad):
            assert "default-src 'none'; script-src 'self'" in each.headers["content-security-policy"]
            assert each.headers["x-content-type-options"] == "nosniff" and each.headers["cache-control"] == "no-store"
        wrong = client.put("/v1/jobs/x")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "DELETE, GET"
        assert bad.status_code == 404 and bad.json()["error"]["type"] == "invalid_request_error"
        assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").json() == {"status": "ready"}
        text = client.get("/metrics").text
        assert 'mezzotint_requests_total{method="GET",route="/v1/models",status="200"} 1.0' in text
        assert 'mezzotint_jobs{state="queued"} 0.0' in text
    rows = [json.loads(line) for line in house.log.read_text().splitlines()]
    assert [(row["facts"]["path"], row["facts"]["status"]) for row in rows] == [
        ("/v1/models", 200), ("/v1/none", 404), ("/v1/jobs/x", 405),
    ]  # fmt: skip
    assert audit.check(house.log).whole


def test_the_document_names_every_answer(house: House) -> None:
    with house.client() as client:
        found = client.get("/v1/openapi.json").json()
    for path, methods in found["paths"].items():
        for method, route in methods.items():
            if path.startswith("/v1/"):
                assert {"400", "401", "413", "429", "500"} <= set(route["responses"]), (method, path)
    body = found["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"prompt", "image"} <= set(body["required"])


@pytest.mark.parametrize("house", [{"open": False}], indirect=True)
def test_keys_open_what_their_roles_allow(house: House) -> None:
    store = house.server.store
    ann, bob = keys.add(store, "ann"), keys.add(store, "bob", per_day=1)
    eve, root = keys.add(store, "eve", "viewer"), keys.add(store, "root", "admin")
    with house.client("mz-wrong") as client:
        answer = client.get("/v1/models")
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        house.openai("mz-wrong").models.list()
    wish = {"model": "cells", "label": "crack", "steps": 2}
    with house.client(ann) as a, house.client(bob) as b, house.client(eve) as e, house.client(root) as r:
        job = a.post("/v1/jobs", json=wish).json()["id"]
        assert b.get(f"/v1/jobs/{job}").status_code == 404 and e.get(f"/v1/jobs/{job}").status_code == 200
        assert b.get("/v1/jobs").json()["jobs"] == [] and len(r.get("/v1/jobs").json()["jobs"]) == 1
        assert e.post("/v1/jobs", json=wish).status_code == 403 and e.delete(f"/v1/jobs/{job}").status_code == 403
        assert b.delete(f"/v1/jobs/{job}").status_code == 404
        assert b.post("/v1/jobs", json=wish).status_code == 202
        spent = b.post("/v1/jobs", json=wish)
        assert spent.status_code == 429 and spent.json()["error"]["code"] == "insufficient_quota"
        keys.revoke(store, "ann")
        assert a.get("/v1/models").status_code == 401
        keys.add(store, "ann")


@pytest.mark.parametrize("house", [{"limits": {"per_minute": 3}}], indirect=True)
def test_who_asks_too_often_waits(house: House) -> None:
    with house.client() as client:
        answers = [client.get("/v1/models") for _ in range(4)]
        assert [each.status_code for each in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert client.get("/ready").status_code == 200
    with pytest.raises(openai.RateLimitError):
        house.openai().models.list()


@pytest.mark.parametrize("house", [{"room": 2, "hands": 0}], indirect=True)
def test_a_full_queue_pushes_back_and_a_draining_server_takes_nothing(house: House) -> None:
    wish = {"model": "cells", "label": "crack", "steps": 2}
    with house.client() as client:
        assert [client.post("/v1/jobs", json=wish).status_code for _ in range(3)] == [202, 202, 429]
        answer = client.post("/v1/jobs", json=wish)
        assert answer.json()["error"]["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1
        (job, _) = client.get("/v1/jobs").json()["jobs"]
        assert client.delete(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"
        house.server.draining = True
        assert client.post("/v1/jobs", json=wish).status_code == 503 and client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("house", [{"limits": {"wait": 0.5}, "hands": 0}], indirect=True)
def test_what_takes_too_long_is_cancelled(house: House) -> None:
    with pytest.raises(openai.InternalServerError, match="cancelled"):
        house.openai().images.generate(model="cells", prompt="crack")
    assert house.server.store.counts() == {"cancelled": 1}
