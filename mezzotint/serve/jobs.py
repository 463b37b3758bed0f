"""Jobs over HTTP: accept, list, look at, follow, cancel, fetch."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from PIL import Image
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from mezzotint.errors import InputError
from mezzotint.serve.asked import MEDIA, Asked, Seed
from mezzotint.serve.keys import Caller
from mezzotint.serve.server import DAY, Server
from mezzotint.serve.store import Given
from mezzotint.serve.tables import OPEN, Job
from mezzotint.serve.told import Listed, Told, told
from mezzotint.serve.trouble import Trouble, failures

Encoded = Annotated[str, Field(max_length=28_000_000)]  # a picture in base64


class Wished(Asked):
    """A job as its caller states it: a request, its pictures in base64, and how long somebody waits for it."""

    seed: Seed | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    image: Encoded | None = None
    mask: Encoded | None = None
    pictures: Annotated[tuple[Encoded, ...], Field(max_length=4)] = ()  # what control networks follow, in their order
    patience: Annotated[float, Field(gt=0, le=7 * DAY)] | None = None  # seconds


def serving(request: Request) -> Server:
    return request.app.state.server


def calling(request: Request) -> Caller:
    return request.state.caller


Serving: TypeAlias = Annotated[Server, Depends(serving)]
Calling: TypeAlias = Annotated[Caller, Depends(calling)]
KINDS: dict[str, Any] = {media: {} for media in MEDIA.values()}
FILES: dict[int | str, Any] = {
    200: {"content": KINDS, "description": "the signed file"}, 304: {"description": "the one that the caller has"},
}  # fmt: skip
JPEG: dict[int | str, Any] = {
    200: {"content": {"image/jpeg": {}}, "description": "a JPEG"}, 204: {"description": "there is none now"},
}  # fmt: skip
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=failures())


@router.post("", status_code=202, response_model=Told, responses=failures(403, 404, 503))
def create(wished: Wished, server: Serving, caller: Calling) -> Told:
    """Accept a job; what cannot be drawn is said now."""
    roles = {"image": [wished.image] if wished.image else [], "mask": [wished.mask] if wished.mask else [],
             "control": list(wished.pictures)}  # fmt: skip
    pictures = {role: [decoded(text, role) for text in texts] for role, texts in roles.items() if texts}
    plain = wished.model_dump(exclude={"image", "mask", "pictures", "patience"})
    deadline = None if wished.patience is None else time.time() + wished.patience
    return told(server, [accepted(server, caller, plain, pictures, deadline)])[0]


@router.get("", response_model=Listed)
def index(
    server: Serving, caller: Calling, limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[str | None, Query(max_length=32)] = None,
) -> Listed:  # fmt: skip
    """The newest jobs first: the caller's own, or everybody's where the key may see them."""
    rows = server.store.listed(None if caller.sees_all else caller.id, limit, before)
    return Listed(jobs=told(server, rows))


@router.get("/{id}", response_model=Told, responses=failures(404))
def show(id: str, server: Serving, caller: Calling) -> Told:
    """One job."""
    return told(server, [visible(server, caller, id)])[0]


@router.delete("/{id}", response_model=Told, responses=failures(403, 404, 409))
def cancel(id: str, server: Serving, caller: Calling) -> Told:
    """Cancel a job that is open; one that has ended stays as it is, which is an error (409)."""
    job = visible(server, caller, id)
    if caller.id != job.owner and caller.role != "admin":
        raise Trouble(403, "only its owner or an admin cancels a job", "permission_error")
    if not server.store.cancel(id):
        raise Trouble(409, f"job {id} has ended: it is {job.state}")
    server.news.tell(id)
    return told(server, [visible(server, caller, id)])[0]


@router.get("/{id}/preview", response_class=Response, responses=failures(404) | JPEG)
def preview(id: str, server: Serving, caller: Calling) -> Response:
    """How a job looks that is drawn now, where it asked for `previews`: small, unsigned, gone when it ends."""
    visible(server, caller, id)
    seen = server.store.preview(id)
    return Response(status_code=204) if seen is None else Response(seen, media_type="image/jpeg")


@router.get("/{id}/pictures/{place}", response_class=Response, responses=failures(404) | FILES)
def picture(
    id: str, place: Annotated[int, Path(ge=0, le=1000)], request: Request, server: Serving, caller: Calling,
    side: Annotated[int | None, Query(ge=16, le=1024)] = None,
) -> Response:  # fmt: skip
    """A picture that a job has made: the signed file, or a small copy of it with so many pixels on its longer side."""
    visible(server, caller, id)
    row = server.store.picture(id, place)
    if row is None:
        raise Trouble(404, f"job {id} has no picture {place}", "not_found_error")
    headers = {"etag": f'"{row.sha256}{f"-{side}" if side else ""}"', "cache-control": "private, no-cache"}
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if side is not None:
        return Response(small(row.data, side), media_type="image/jpeg", headers=headers)
    name = f"{id}-{place}.{row.media.rpartition('/')[2]}"
    headers["content-disposition"] = f'inline; filename="{name}"'
    return Response(row.data, media_type=row.media, headers=headers)


def small(data: bytes, side: int) -> bytes:
    """A small copy of a picture of ours, as JPEG."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        copy = picture.convert("RGB")
    copy.thumbnail((side, side))
    copy.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def accepted(
    server: Server, caller: Caller, plain: Mapping[str, Any], pictures: Mapping[str, list[bytes]],
    deadline: float | None = None,
) -> Job:  # fmt: skip
    """Check a request and put it into the queue; a seed is drawn where none is given."""
    if not caller.asks:
        raise Trouble(403, "this key looks, and does not ask", "permission_error")
    if server.draining:
        raise Trouble(503, "the server is going down: ask again in a minute", "server_error", wait=60.0)
    seed = plain.get("seed")
    asked = Asked.model_validate({**plain, "seed": secrets.randbelow(2**31) if seed is None else seed})
    desk = server.desks.get(asked.model)
    if desk is None:
        known = ", ".join(sorted(server.desks))
        raise Trouble(404, f"no model {asked.model!r} here: {known}", code="model_not_found", param="model")
    if caller.per_day is not None:
        drawn = server.store.drawn_since(caller.id, time.time() - DAY)
        if drawn + asked.count > caller.per_day:
            raise Trouble(429, f"{drawn} of {caller.per_day} pictures a day are drawn", "insufficient_quota",
                          "insufficient_quota", wait=3600.0)  # fmt: skip
    steps = desk.check(asked, pictures)
    given = [Given(role, data, "application/octet-stream", {}) for role, rows in pictures.items() for data in rows]
    id = server.store.submit(caller.id, asked.model, asked.model_dump(mode="json"), asked.count, given, deadline,
                             steps, server.pace())  # fmt: skip
    server.crew.ring()
    job = server.store.get(id)
    assert job is not None
    return job


async def ended(server: Server, request: Request, id: str, patience: float) -> Job:
    """The job when it has ended; cancelled where its caller goes away, or after `patience` seconds."""
    until = time.monotonic() + patience
    while True:
        job = await run_in_threadpool(server.store.get, id)
        if job is None or job.state not in OPEN:
            break
        if time.monotonic() > until or await request.is_disconnected():
            await run_in_threadpool(server.store.cancel, id)
            continue
        await server.news.of([id])
    if job is None:
        raise Trouble(404, f"no job {id}", "not_found_error")
    return job


def visible(server: Server, caller: Caller, id: str) -> Job:
    """A job that the caller may see; one of somebody else is as if it were not there."""
    job = server.store.get(id)
    if job is None or not (caller.sees_all or job.owner == caller.id):
        raise Trouble(404, f"no job {id[:32]}", "not_found_error")
    return job


def decoded(text: str, what: str) -> bytes:
    """Base64 as people send it, with or without the prefix of a data URL."""
    head, _, rest = text.partition(",")
    try:
        return base64.b64decode(rest if head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the {what} is no base64: {error}") from error
