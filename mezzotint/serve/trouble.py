"""What goes wrong, as it is answered: in the shape of OpenAI's errors, or as a page."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from mezzotint.errors import InputError, Refused
from mezzotint.serve.store import Full

LOG = logging.getLogger("mezzotint.serve")


class Said(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """An answer that is an error."""

    error: Said


FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": says}
    for status, says in {
        400: "the request is wrong, or the policy refuses it", 401: "no key, or an unknown one", 413: "too long",
        429: "too many requests, too many jobs, or a spent quota: see Retry-After", 500: "something broke",
    }.items()
}  # fmt: skip


def failures(*more: int) -> dict[int | str, dict[str, Any]]:
    """The errors that every route may answer with, and these."""
    says = {403: "this key may not", 404: "there is none", 409: "it has ended", 503: "the server is going down"}
    return FAILURES | {status: {"model": Failure, "description": says[status]} for status in more}


class Trouble(Exception):
    """An answer that is an error, in the shape of OpenAI's."""

    def __init__(self, status: int, says: str, kind: str = "invalid_request_error", code: str | None = None,
                 param: str | None = None, wait: float | None = None) -> None:  # fmt: skip
        super().__init__(says)
        self.status, self.kind, self.code, self.param, self.wait = status, kind, code, param, wait

    def response(self) -> JSONResponse:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        headers = {"retry-after": str(int(self.wait + 0.999))} if self.wait is not None else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse({"error": error}, self.status, headers)


def answers(app: FastAPI, shown: Callable[[Request, Trouble], Response]) -> None:
    """How errors of every kind are answered: to a person as a page, `shown`."""

    def answer(request: Request, trouble: Trouble) -> Response:
        person = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/")
        return shown(request, trouble) if person else trouble.response()

    @app.exception_handler(Trouble)
    async def trouble(request: Request, error: Trouble) -> Response:
        return answer(request, error)

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> Response:
        return answer(request, Trouble(400, str(error)))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return Trouble(400, str(error), code="content_policy_violation", param=error.rule).response()

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> JSONResponse:
        return Trouble(429, str(error), "rate_limit_error", "queue_full", wait=error.wait).response()

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError | ValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(request, Trouble(400, "the body is no JSON"))
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
        return answer(request, Trouble(400, f"{where or 'the body'}: {first['msg']}{more}", param=where))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        found = answer(request, Trouble(error.status_code, f"{error.detail}"))
        found.headers.update(error.headers or {})
        if error.status_code == 405 and (known := methods(request)):  # a route of the framework knows its own alone
            found.headers["allow"] = ", ".join(sorted(known))
        return found

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        LOG.error("an answer failed", exc_info=error, extra={"facts": {"id": request.state.id}})
        return Trouble(
            500, f"something broke here; the log says more under {request.state.id}", "server_error"
        ).response()


def methods(request: Request) -> set[str]:
    """What the place of a request can be asked for."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    here = [known for path, known in paths.items() if compile_path(path)[0].match(request.url.path)]
    return {method.upper() for known in here for method in known}
