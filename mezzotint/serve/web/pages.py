"""The pages: what a person at the server sees and may do. They ask the same routes as programs do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from mezzotint.serve import keys
from mezzotint.serve.door import COOKIE, SIGN_IN
from mezzotint.serve.jobs import Calling, Serving, visible
from mezzotint.serve.keys import Caller
from mezzotint.serve.server import Server
from mezzotint.serve.tables import DONE, OPEN
from mezzotint.serve.told import Told, told
from mezzotint.serve.trouble import Trouble
from mezzotint.serve.web import lineage

PAGE = 48  # jobs of a page of the gallery
GUESSES = 20  # keys that may be tried a minute from one address
HERE = re.compile(r"/(?![/\\])[\w/.-]*")  # a path of this server
REPORT = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
static = StaticFiles(directory=Path(__file__).parent / "static")
environment = jinja2.Environment(
    loader=jinja2.PackageLoader("mezzotint.serve.web"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def page(name: str, request: Request, code: int = 200, **values: Any) -> HTMLResponse:
    """A page in the frame of all pages."""
    caller: Caller | None = request.state.caller
    server: Server = request.app.state.server
    told = environment.get_template(f"{name}.html.j2").render(
        caller=caller, open=server.open_to_all, here=request.url.path, version=metadata.version("mezzotint"), **values
    )
    return HTMLResponse(told, code)


def trouble(request: Request, error: Trouble) -> Response:
    """An error for a person."""
    return page("trouble", request, error.status, says=str(error), status=error.status)


@router.get("/")
def draw(request: Request, server: Serving, caller: Calling) -> Response:
    """Draw pictures and see them grow; who asks for none finds those that there are."""
    if not caller.asks:
        return RedirectResponse("/gallery", 303)
    return page("draw", request, models=request.app.state.choices)


@router.get("/place")
def place(
    request: Request, server: Serving, caller: Calling, on: Annotated[str, Query(max_length=32)] = "",
    at: Annotated[int, Query(ge=0, le=1000)] = 0,
) -> Response:  # fmt: skip
    """Draw a mask on a picture, and a defect under it."""
    job = visible(server, caller, on) if on else None
    source = f"/v1/jobs/{job.id}/pictures/{at}" if job else ""
    return page("place", request, models=request.app.state.choices, source=source, job=job)


@router.get("/compare")
def compare(request: Request, server: Serving, caller: Calling) -> Response:
    """The same request by several samplers and numbers of steps."""
    return page("compare", request, models=request.app.state.choices)


@router.get("/gallery")
def gallery(
    request: Request, server: Serving, caller: Calling, before: Annotated[str | None, Query(max_length=32)] = None,
    model: Annotated[str | None, Query(max_length=80)] = None,
) -> Response:  # fmt: skip
    """The newest pictures."""
    rows = server.store.listed(None if caller.sees_all else caller.id, PAGE, before, model or None, DONE)
    jobs = told(server, rows)
    after = rows[-1].id if len(rows) == PAGE else None
    return page("gallery", request, jobs=jobs, after=after, model=model, models=list(server.desks))


@router.get("/jobs")
def jobs(request: Request, server: Serving, caller: Calling) -> Response:
    """The newest jobs."""
    return page("jobs", request, jobs=listed(server, caller))


@router.get("/jobs/rows")
def rows(request: Request, server: Serving, caller: Calling) -> Response:
    """Their table alone, to be put in place of the one that is shown."""
    return page("jobs_rows", request, jobs=listed(server, caller))


@router.get("/jobs/{id}")
def job(id: str, request: Request, server: Serving, caller: Calling) -> Response:
    """One job: how far it is, or what it made."""
    row = visible(server, caller, id)
    mine = caller.id == row.owner or caller.role == "admin"
    return page("job", request, job=told(server, [row])[0], live=row.state in OPEN, may_cancel=mine)


@router.get("/pictures/{id}/{place}")
def picture(id: str, place: int, request: Request, server: Serving, caller: Calling) -> Response:
    """A picture: what was asked, and where it comes from."""
    row = visible(server, caller, id)
    made = server.store.results([id])[id]
    found = next((each for each in made if each.place == place), None)
    if found is None:
        raise Trouble(404, f"job {id} has no picture {place}", "not_found_error")
    return page("picture", request, job=told(server, [row])[0], picture=found, more=len(made))


@router.get("/pictures/{id}/{place}/chain")
def chain(id: str, place: int, request: Request, server: Serving, caller: Calling) -> Response:
    """From this picture back to the images its model was trained on, every step checked."""
    row = visible(server, caller, id)
    found = server.store.picture(id, place)
    desk = server.desks.get(row.model)
    if found is None or desk is None:
        raise Trouble(404, f"job {id} has no picture {place}, or its model is not served any more", "not_found_error")
    walked = lineage.walked(found, desk)
    return page("chain", request, steps=lineage.steps(walked, everything=caller.sees_all), holds=walked.holds)


@router.get("/doctor")
def doctor(request: Request, server: Serving, caller: Calling) -> Response:
    """What the doctor says of the models."""
    return page("doctor", request, exams=server.examinations.all(), may_start=caller.role == "admin")


@router.get("/doctor/rows")
def doctor_rows(request: Request, server: Serving, caller: Calling) -> Response:
    """The models alone, to be put in place of those that are shown."""
    return page("doctor_rows", request, exams=server.examinations.all(), may_start=caller.role == "admin")


@router.post("/doctor/{model}")
def examine(model: str, request: Request, server: Serving, caller: Calling) -> Response:
    """Examine a model, beside the drawing."""
    if caller.role != "admin":
        raise Trouble(403, "an admin starts the doctor", "permission_error")
    server.examinations.start(model)
    return RedirectResponse("/doctor", 303)


@router.get("/doctor/{model}/report")
def report(model: str, request: Request, server: Serving, caller: Calling) -> Response:
    """The doctor's own page of a model, which names files of this machine."""
    if not caller.sees_all:
        raise Trouble(403, "this key sees its own jobs, and no reports", "permission_error")
    told = server.examinations.report(model)
    if told is None:
        raise Trouble(404, f"no report on {model[:80]!r} here", "not_found_error")
    return HTMLResponse(told, headers={"content-security-policy": REPORT})


@router.get(SIGN_IN)
def asked(request: Request, next: Annotated[str, Query(max_length=200)] = "/") -> Response:
    """Ask for a key."""
    return page("sign_in", request, next=next, wrong=False)


@router.post(SIGN_IN)
def sign_in(
    request: Request, server: Serving, key: Annotated[str, Form(max_length=200)],
    next: Annotated[str, Form(max_length=200)] = "/",
) -> Response:  # fmt: skip
    """Let a browser in by a key."""
    client = request.client.host if request.client else "?"
    if (wait := server.within_rate(f"{SIGN_IN} {client}", GUESSES)) > 0:
        raise Trouble(429, f"too many keys were tried: wait {wait:.0f} s", "rate_limit_error", wait=wait)
    caller = keys.find(server.store, key.strip())
    if caller is None:
        return page("sign_in", request, 401, next=next, wrong=True)
    answer = RedirectResponse(next if HERE.fullmatch(next) else "/", 303)
    answer.set_cookie(
        COOKIE, keys.sign_in(server.store, caller), max_age=int(keys.SHIFT), httponly=True, samesite="strict",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return answer


@router.post("/sign-out")
def sign_out(request: Request, server: Serving) -> Response:
    """Forget this browser."""
    keys.sign_out(server.store, request.cookies.get(COOKIE, ""))
    answer = RedirectResponse(SIGN_IN, 303)
    answer.delete_cookie(COOKIE)
    return answer


def listed(server: Server, caller: Caller) -> list[Told]:
    """The newest jobs that the caller may see."""
    return told(server, server.store.listed(None if caller.sees_all else caller.id, 50))


def ago(then: float | None) -> str:
    """How long ago, in words."""
    seconds = max(0.0, time.time() - (then or time.time()))
    for size, name in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return "just now" if seconds < 10 else f"{seconds:.0f} seconds ago"


def asked_of(job: Told) -> str:
    """A request in a few words."""
    request = job.request
    words = [str(part) for part in (request["label"], request["prompt"]) if part not in (None, "")]
    ways = [request["sampler"] or "", f"{request['steps']} steps" if request["steps"] else ""]
    how = ", ".join(way for way in ways if way)
    return " · ".join(part for part in (", ".join(words) or "no words", how) if part)


def touched(job: Told) -> dict[str, Any]:
    """What a request says, without what it leaves open."""
    hidden, empty = ("previews", "model"), (None, "", [], 0.0)
    return {name: value for name, value in job.request.items() if name not in hidden and value not in empty}


FILTERS: dict[str, Callable[..., Any]] = {"ago": ago, "asked": asked_of, "touched": touched}
environment.filters.update(FILTERS)
