"""Jobs drawn by the crew: as the pipeline draws them, several in a batch, cancelled in the middle, never twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import CLASSES, class_model
from PIL import Image
from serve_parts import desk, encoded, pixels
from sqlalchemy import update
from torch import nn

import mezzotint as mz
from mezzotint.batching import Batcher
from mezzotint.errors import InputError, Refused
from mezzotint.serve import crew as crew_module
from mezzotint.serve.asked import Asked, opened
from mezzotint.serve.crew import Crew, Desk
from mezzotint.serve.store import Given, Store
from mezzotint.serve.tables import CANCELLED, DONE, FAILED, QUEUED, REFUSED, Job


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield found
    found.close()


def submit(store: Store, desk: Desk, given: tuple[Given, ...] = (), **wish: Any) -> str:
    asked = Asked.model_validate({"model": "cells", "seed": 1, "label": "crack", "guidance": 1.0, "steps": 3} | wish)
    return store.submit("ann", "cells", asked.model_dump(mode="json"), asked.count, given, steps=asked.steps or 0)


def ended(store: Store, id: str, patience: float = 60.0) -> Job:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        job = store.get(id)
        assert job is not None
        if job.finished is not None:
            return job
        time.sleep(0.02)
    raise AssertionError(f"job {id} did not end")


def test_jobs_come_out_as_the_pipeline_draws_them_and_share_the_network(store: Store) -> None:
    desk_ = desk()
    wishes = [{"seed": i, "steps": 3 + i, "count": 1 + i % 2, "label": CLASSES[i % 3]} for i in range(4)]
    with desk_.batcher(desk_.pipeline.model.backbone):  # holds the first one until all are there
        crew = Crew(store, {"cells": desk_}, hands=4)
        ids = [submit(store, desk_, **wish) for wish in wishes]
        crew.ring()
        until = time.monotonic() + 30
        while desk_.batcher.walking < 5 and time.monotonic() < until:
            time.sleep(0.01)
    for id, wish in zip(ids, wishes, strict=True):
        job = ended(store, id)
        assert job.state == DONE, job.error
        expected = desk_.pipeline.run(mz.Request(guidance=1.0, **wish))
        found = store.pictures(id, "result")
        assert len(found) == len(expected) == wish["count"]
        for mine, theirs in zip(found, expected, strict=True):
            assert np.abs(pixels(mine.data) - pixels(theirs.data)).max() <= 1
            assert mine.facts["seed"] == theirs.record["seed"] and mine.facts["request"] == theirs.record["request"]
    assert desk_.batcher.calls == 6 and desk_.batcher.rows == 3 + 2 * 4 + 5 + 2 * 6
    assert crew.close()


def test_a_job_that_is_cancelled_stops_and_leaves_nothing(store: Store) -> None:
    class Slow(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.config, self.calls = network, network.config, 0

        def forward(self, *asked: Any) -> Any:
            self.calls += 1
            time.sleep(0.3)
            return self.network(*asked)

    model = class_model()
    slow = Slow(model.backbone)
    desk_ = desk()
    desk_ = replace(desk_, pipeline=replace(desk_.pipeline, model=replace(desk_.pipeline.model, backbone=slow)))
    desk_ = replace(desk_, batcher=Batcher(slow))
    crew = Crew(store, {"cells": desk_}, hands=1)
    id = submit(store, desk_, steps=100)
    crew.ring()
    until = time.monotonic() + 30
    while slow.calls < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert store.cancel(id)
    assert crew.close(patience=20), "the hand was free again"
    assert slow.calls < 20 and ended(store, id).state == CANCELLED and store.pictures(id) == []


def test_a_crew_without_hands_draws_nothing_and_gives_back_the_jobs_of_the_dead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "RECOVERED", 0.1)
    desk_ = desk()
    crew, rung = Crew(store, {"cells": desk_}, hands=0), list[str]()
    monkeypatch.setattr(crew, "ring", lambda: rung.append("there is one"))
    id = submit(store, desk_)
    assert store.claim("dead", ["cells"]) is not None
    with store.writing() as session:
        session.execute(update(Job).values(beat=0.0))
    until = time.monotonic() + 10
    while not rung and time.monotonic() < until:
        time.sleep(0.02)
    job = store.get(id)
    assert job is not None and job.state == QUEUED and crew.counts().at_work == 0 and crew.close()


def test_a_database_that_stumbles_costs_time_and_no_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stumbles = {"claim": 1, "finish": 1, "progress": 1}

    class Stumbling(Store):
        def __init__(self) -> None:
            self.engine, self.room = store.engine, store.room

        def claim(self, *asked: Any) -> Any:
            return self._once("claim", *asked)

        def finish(self, *asked: Any, **more: Any) -> Any:
            return self._once("finish", *asked, **more)

        def progress(self, *asked: Any) -> Any:
            return self._once("progress", *asked)

        def recover(self, silent: float = 0.5) -> int:
            return super().recover(silent)

        def _once(self, name: str, *asked: Any, **more: Any) -> Any:
            if stumbles[name]:
                stumbles[name] -= 1
                raise OSError("the disk is full")
            return getattr(Store, name)(self, *asked, **more)

    monkeypatch.setattr(crew_module, "TROUBLE", 0.05)
    monkeypatch.setattr(crew_module, "RECOVERED", 0.2)
    desk_ = desk()
    crew = Crew(Stumbling(), {"cells": desk_}, hands=2)
    id = submit(store, desk_)
    job = ended(store, id)
    assert job.state == DONE and job.attempts == 2 and len(store.pictures(id, "result")) == 1
    assert not any(stumbles[name] for name in ("claim", "finish")) and crew.close()


def test_what_cannot_be_drawn_ends_with_its_reason(store: Store) -> None:
    desk_ = desk(prompts={"classes": ["healthy"]})
    with pytest.raises(Refused, match="crack"):
        desk_.check(Asked(model="cells", seed=1, label="crack"), {})
    for wish, said in (
        ({"sampler": "eular"}, "did you mean 'euler"),
        ({"adapters": [{"name": "rust"}]}, "no adapter 'rust'"),
    ):
        with pytest.raises(InputError, match=said):
            desk_.check(Asked(model="cells", seed=1, label="healthy", **wish), {})
    assert desk_.check(Asked(model="cells", seed=1, label="healthy", steps=7), {}) == 7
    crew = Crew(store, {"cells": desk_}, hands=2)
    refused, wrong = submit(store, desk_), submit(store, desk_, label="healthy", prompt="words")
    crew.ring()
    assert (job := ended(store, refused)).state == REFUSED and "crack" in str(job.error)
    assert (job := ended(store, wrong)).state == FAILED and "not both" in str(job.error)
    assert crew.close()


def test_edits_keep_what_is_black(store: Store) -> None:
    desk_ = desk()
    image, mask = Image.new("RGB", (16, 16), (40, 90, 160)), Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 12, 12))
    given = tuple(Given(role, encoded(each), "image/png", {}) for role, each in (("image", image), ("mask", mask)))
    crew = Crew(store, {"cells": desk_}, hands=1)
    id = submit(store, desk_, given)
    assert ended(store, id).state == DONE
    found = pixels(store.pictures(id, "result")[0].data)
    outside = np.ones((16, 16), bool)
    outside[4:12, 4:12] = False
    assert (found[outside] == (40, 90, 160)).all() and (found[~outside] != (40, 90, 160)).any()
    assert crew.close()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no intact"),
        (b"GIF89a" + bytes(100), "no intact"),
        (encoded(Image.new("RGB", (8, 8)), "BMP"), "no intact"),
        (encoded(Image.new("RGB", (64, 64), 9))[:-30], "no intact"),
        (bytes(20_000_001), "at most 20000000"),
        (encoded(Image.new("1", (6000, 6000))), "at most 20000000 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no intact"),
    ],
    ids=["empty", "gif", "bmp", "cut off", "too long", "bomb", "svg"],
)
def test_uploads_are_looked_at_before_they_are_decoded(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        opened(data, "the image")
