"""The images API of OpenAI, so that its clients draw here; what it has no word for goes into the same body."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from mezzotint.errors import InputError
from mezzotint.serve.asked import Plain, Seed, Text, Wish, opened
from mezzotint.serve.jobs import Calling, Serving, accepted, ended
from mezzotint.serve.server import Server
from mezzotint.serve.tables import DONE, REFUSED, Job
from mezzotint.serve.trouble import Trouble, failures

router = APIRouter(prefix="/v1", tags=["openai"], responses=failures())


class Wanted(Wish):
    """A request of OpenAI's, and our own words beside them."""

    model: str | None = None
    prompt: Text
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|\d{2,4}x\d{2,4})$")] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    # taken, and without effect here
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    input_fidelity: str | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    # ours, beside those of a wish
    seed: Seed | None = None

    def plain(self, server: Server) -> dict[str, Any]:
        """The same in our words; the first model where none is named."""
        width, height = (None, None)
        if self.size and self.size != "auto":
            width, height = map(int, self.size.split("x"))
        return {
            **self.model_dump(include={*Wish.model_fields, "prompt", "seed"}),
            "model": self.model or next(iter(server.desks)), "count": self.n or 1,
            "width": width, "height": height, "format": self.output_format or "png",
        }  # fmt: skip


class Datum(Plain):
    b64_json: str | None = None
    url: str | None = None


class Images(Plain):
    created: int
    data: list[Datum]
    output_format: str
    size: str | None = None


class Known(Plain):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "mezzotint"


class Models(Plain):
    object: Literal["list"] = "list"
    data: list[Known]


@router.get("/models", response_model=Models)
def models(server: Serving, caller: Calling) -> Models:
    """The models that draw here."""
    return Models(data=[Known(id=name) for name in server.desks])


@router.get("/models/{name}", response_model=Known, responses=failures(404))
def model(name: str, server: Serving, caller: Calling) -> Known:
    """One of them."""
    if name not in server.desks:
        raise Trouble(404, f"no model {name[:80]!r} here", code="model_not_found", param="model")
    return Known(id=name)


@router.post(
    "/images/generations", response_model=Images, response_model_exclude_none=True, responses=failures(403, 404, 503)
)
async def generations(wanted: Wanted, request: Request, server: Serving, caller: Calling) -> Images:
    """Draw, and answer with the pictures."""
    return await _drawn(request, server, caller, wanted, {})


def form() -> dict[str, Any]:
    """An edit's body as OpenAPI describes it: the fields of a request, and files."""
    schema = Wanted.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    file = {"type": "string", "format": "binary"}
    schema["properties"] = {**schema["properties"], "image": file, "mask": file}
    schema["required"] = [*schema["required"], "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


async def uploads(request: Request) -> tuple[Wanted, dict[str, list[bytes]]]:
    """A form of OpenAI's, fields as text; `image` may be given as `image[]`, too."""
    async with request.form(max_files=4, max_fields=40, max_part_size=1_000_000) as form:
        pictures: dict[str, list[bytes]] = {}
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields[name] = value
            else:
                pictures.setdefault(name.removesuffix("[]"), []).append(await value.read())
    for name, rows in pictures.items():
        if name not in ("image", "mask") or len(rows) > 1:
            raise InputError(f"one image and one mask are taken, and this is {len(rows)} {name[:40]!r}")
    if "image" not in pictures:
        raise InputError("image: an edit needs an image")
    return Wanted.model_validate(fields), pictures


@router.post(
    "/images/edits", response_model=Images, response_model_exclude_none=True, responses=failures(403, 404, 503),
    openapi_extra={"requestBody": form()},
)  # fmt: skip
async def edits(request: Request, server: Serving, caller: Calling) -> Images:
    """Repaint where the mask is transparent, or white where nothing of it is; without a mask the whole picture."""
    wanted, pictures = await uploads(request)
    if "mask" in pictures:
        pictures["mask"] = [await run_in_threadpool(repainted, pictures["mask"][0])]
    return await _drawn(request, server, caller, wanted, pictures)


def repainted(data: bytes) -> bytes:
    """A mask of OpenAI's as one of ours: white where its alpha is 0."""
    mask = opened(data, "the mask")
    if "A" not in mask.getbands():
        return data
    stream = io.BytesIO()
    mask.getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0).save(stream, "PNG")
    return stream.getvalue()


async def _drawn(
    request: Request, server: Server, caller: Any, wanted: Wanted, pictures: Mapping[str, list[bytes]]
) -> Images:
    plain = wanted.plain(server)
    job = await run_in_threadpool(accepted, server, caller, plain, pictures)
    job = await ended(server, request, job.id, server.limits.wait)
    if job.state == REFUSED:
        raise Trouble(400, job.error or "refused", code="content_policy_violation")
    if job.state != DONE:
        raise Trouble(500 if job.state == "failed" else 503, job.error or f"the job is {job.state}", "server_error")
    return await run_in_threadpool(_answer, request, server, job, wanted.response_format or "b64_json")


def _answer(request: Request, server: Server, job: Job, form: str) -> Images:
    rows = server.store.pictures(job.id, "result", data=form == "b64_json")
    base = str(request.base_url).rstrip("/")
    data = [
        Datum(b64_json=base64.b64encode(row.data).decode()) if form == "b64_json"
        else Datum(url=f"{base}/v1/jobs/{job.id}/pictures/{row.place}")
        for row in rows
    ]  # fmt: skip
    size = rows[0].facts.get("request", {}) if rows else {}
    told = f"{size['width']}x{size['height']}" if "width" in size else None
    return Images(created=int(job.created), data=data, output_format=job.request["format"], size=told)
