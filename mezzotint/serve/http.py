"""What every request passes: its id, its size, its key, its rate, the headers of its answer, the log."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from mezzotint.errors import InputError, Refused
from mezzotint.governance import audit
from mezzotint.serve import keys
from mezzotint.serve.keys import ANYBODY, Caller
from mezzotint.serve.metrics import Metrics
from mezzotint.serve.server import Server
from mezzotint.serve.store import Full

LOG = logging.getLogger("mezzotint.serve")
ID = re.compile(r"[\w-]{8,64}")
OPEN = ("/health", "/ready", "/metrics")  # without a key
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; frame-ancestors 'none'; base-uri 'none';"
    " form-action 'self'"
)
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "x-frame-options": "DENY",
    "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()", "cache-control": "no-store",
}  # fmt: skip


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


Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


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


def answers(app: FastAPI) -> None:
    """How errors of every kind are answered."""

    @app.exception_handler(Trouble)
    async def trouble(request: Request, error: Trouble) -> JSONResponse:
        return error.response()

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> JSONResponse:
        return Trouble(400, str(error)).response()

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return Trouble(400, str(error), code="content_policy_violation", param=error.rule).response()

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> JSONResponse:
        return Trouble(429, str(error), "rate_limit_error", "queue_full", wait=error.wait).response()

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
        return Trouble(400, f"{where or 'the body'}: {first['msg']}{more}", param=where).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        found = Trouble(error.status_code, f"{error.detail}").response()
        found.headers.update(error.headers or {})
        if error.status_code == 405:  # a route of the framework knows its own methods alone
            found.headers["allow"] = ", ".join(sorted(methods(request)))
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


class Door:
    """The outermost layer of the app."""

    def __init__(self, app: Any, server: Server, metrics: Metrics) -> None:
        self.app, self.server, self.metrics = app, server, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        id = given if ID.fullmatch(given) else secrets.token_hex(12)
        state = scope.setdefault("state", {})
        state["id"], state["caller"] = id, None
        began, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                kept = {name.decode("latin-1") for name, _ in message["headers"]}
                extra = {**HEADERS, "x-request-id": id}
                rows = [(n.encode(), v.encode("latin-1")) for n, v in extra.items() if n not in kept]
                message["headers"] = [*message["headers"], *rows]
            await send(message)

        try:
            trouble = await self._stopped(scope, headers)
            if trouble is not None:
                await trouble.response()(scope, receive, sent)
            else:
                await self.app(scope, self._bounded(receive), sent)
        finally:
            seconds = time.perf_counter() - began
            await self._noted(scope, id, status, seconds)

    async def _stopped(self, scope: Scope, headers: MutableMapping[str, str]) -> Trouble | None:
        """Why a request goes no further."""
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return Trouble(400, "content-length is no number")
        if int(length) > self.server.limits.body:
            return Trouble(413, self._too_long())
        if scope["path"] in OPEN or scope["path"].startswith("/static/"):
            return None
        caller = await self._caller(headers)
        if caller is None:
            says = "this server asks for a key: Authorization: Bearer mz-..."
            return Trouble(401, says, "authentication_error", "invalid_api_key")
        scope["state"]["caller"] = caller
        if (wait := self.server.within_rate(caller.id, caller.per_minute)) > 0:
            return Trouble(429, f"too many requests: try again in {wait:.0f} s", "rate_limit_error",
                           "rate_limit_exceeded", wait=wait)  # fmt: skip
        return None

    async def _caller(self, headers: MutableMapping[str, str]) -> Caller | None:
        if self.server.open_to_all:
            return ANYBODY
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            return None
        return await run_in_threadpool(keys.find, self.server.store, secret.strip())

    def _bounded(self, receive: Receive) -> Receive:
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.server.limits.body:
                raise HTTPException(413, self._too_long())
            return message

        return bounded

    def _too_long(self) -> str:
        return f"the request is too long: at most {self.server.limits.body} bytes are read"

    async def _noted(self, scope: Scope, id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or ("(open)" if scope["path"] in OPEN else "(none)")
        self.metrics.answered(scope["method"], route, status, seconds)
        caller = scope["state"].get("caller")
        facts = {
            "id": id, "method": scope["method"], "path": scope["path"][:200], "status": status,
            "ms": round(1000 * seconds, 1), "caller": caller.name if caller else None,
            "from": scope["client"][0] if scope.get("client") else None,
        }  # fmt: skip
        LOG.info("answered", extra={"facts": facts})
        if self.server.log is not None and scope["path"] not in OPEN:
            try:
                await run_in_threadpool(audit.append, self.server.log, "http", facts)
            except InputError as error:
                LOG.error(str(error), extra={"facts": facts})


class Lines(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": self.formatTime(record), "level": record.levelname.lower(), "says": record.getMessage()}
        told |= getattr(record, "facts", {})
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def logged() -> None:
    """Write the server's records to the standard error as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
