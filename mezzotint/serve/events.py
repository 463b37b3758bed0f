"""Jobs as they go on, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from mezzotint.serve.jobs import Calling, Serving, visible
from mezzotint.serve.keys import Caller
from mezzotint.serve.server import Server
from mezzotint.serve.tables import OPEN
from mezzotint.serve.told import told
from mezzotint.serve.trouble import failures

MOST = 100  # jobs of one stream
EVENTS: dict[int | str, Any] = {200: {"content": {"text/event-stream": {}}, "description": "until all have ended"}}
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=failures(404) | EVENTS)


@router.get("/events", response_class=StreamingResponse)
async def several(
    request: Request, server: Serving, caller: Calling,
    ids: Annotated[list[str], Query(min_length=1, max_length=MOST)],
) -> StreamingResponse:  # fmt: skip
    """Several jobs on one stream, as browsers need it, which open few to one server: `progress` and `end` of each."""
    return await streamed(request, server, caller, list(dict.fromkeys(ids)))


@router.get("/{id}/events", response_class=StreamingResponse)
async def one(id: str, request: Request, server: Serving, caller: Calling) -> StreamingResponse:
    """A job as it goes on: `progress`, and at last `end`."""
    return await streamed(request, server, caller, [id])


async def streamed(request: Request, server: Server, caller: Caller, ids: list[str]) -> StreamingResponse:
    await run_in_threadpool(seen, server, caller, ids)

    async def lines() -> AsyncIterator[str]:
        last: dict[str, str] = {}
        open = list(ids)
        while open and not await request.is_disconnected():
            news = ""
            for id, ended, text in await run_in_threadpool(seen, server, caller, open):
                if text != last.get(id):
                    news += f"event: {'end' if ended else 'progress'}\ndata: {text}\n\n"
                    last[id] = text
                if ended:
                    open.remove(id)
            yield news or ": still here\n\n"
            if open:
                await server.news.of(open)

    return StreamingResponse(lines(), media_type="text/event-stream")


def seen(server: Server, caller: Caller, ids: Sequence[str]) -> list[tuple[str, bool, str]]:
    """Of each job its id, whether it has ended, and how it stands."""
    rows = told(server, [visible(server, caller, id) for id in ids])
    return [(job.id, job.state not in OPEN, job.model_dump_json()) for job in rows]
