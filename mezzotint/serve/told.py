"""What callers are told of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mezzotint.serve.asked import Plain
from mezzotint.serve.server import Server
from mezzotint.serve.tables import OPEN, Job, Picture


class Made(Plain):
    """A picture that was made."""

    url: str
    media: str
    sha256: str
    seed: int | None


class Told(Plain):
    """A job as it stands."""

    id: str
    state: str
    model: str
    request: dict[str, Any]
    created: float
    started: float | None
    finished: float | None
    step: int
    steps: int
    error: str | None
    cost: float | None
    previewed: int  # the step that /preview shows; 0: there is none
    pictures: list[Made]

    @staticmethod
    def of(job: Job, results: Sequence[Picture]) -> Told:
        """A row of the database with its pictures, as callers see it."""
        made = [
            Made(url=f"/v1/jobs/{job.id}/pictures/{row.place}", media=row.media, sha256=row.sha256,
                 seed=row.facts.get("seed"))
            for row in results
        ]  # fmt: skip
        return Told(
            id=job.id, state=job.state, model=job.model, request=job.request, created=job.created, started=job.started,
            finished=job.finished, step=job.step, steps=job.steps, error=job.error, cost=job.cost,
            previewed=job.previewed if job.state in OPEN else 0, pictures=made,
        )  # fmt: skip


class Listed(Plain):
    jobs: list[Told]


def told(server: Server, jobs: Sequence[Job]) -> list[Told]:
    """Jobs with their pictures."""
    made = server.store.results([job.id for job in jobs])
    return [Told.of(job, made[job.id]) for job in jobs]
