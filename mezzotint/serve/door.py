"""What every request passes: its id, its size, its key, its rate, the headers of its answer, the log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import quote, urlsplit

from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser

from mezzotint.errors import InputError
from mezzotint.governance import audit
from mezzotint.serve import keys
from mezzotint.serve.keys import ANYBODY, Caller
from mezzotint.serve.metrics import Metrics
from mezzotint.serve.server import Server, is_here
from mezzotint.serve.trouble import Trouble

LOG = logging.getLogger("mezzotint.serve")
ID = re.compile(r"[\w-]{8,64}")
OPEN = ("/health", "/ready", "/metrics")  # without a key, and not in the audit log
SIGN_IN, STATIC, COOKIE = "/sign-in", "/static/", "mezzotint"
READS = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "x-frame-options": "DENY",
    "referrer-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()", "cache-control": "no-store",
}  # fmt: skip

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


def foreign(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a browser asks for a change on behalf of another site's page, with this user's cookie or none."""
    if method in READS or headers.get("authorization"):
        return False
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    elsewhere = origin is not None and urlsplit(origin).netloc != headers.get("host")
    return elsewhere or site not in ("none", "same-origin")


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
                if scope["path"].startswith(STATIC):
                    extra["cache-control"] = "no-cache"  # asked for anew, and sent where it was changed
                rows = [(n.encode(), v.encode("latin-1")) for n, v in extra.items() if n not in kept]
                message["headers"] = [*message["headers"], *rows]
            await send(message)

        try:
            trouble = await self._stopped(scope, headers)
            if trouble is not None:
                await self._turned_away(trouble, scope, headers)(scope, receive, sent)
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
        if self.server.open_to_all and not is_here(urlsplit(f"//{headers.get('host', '')}").hostname or ""):
            return Trouble(403, "this server answers under this machine's own name alone: it has no keys")
        if foreign(scope["method"], headers):
            return Trouble(403, "a page of another site asks here: that is not allowed", "permission_error")
        if scope["path"] in (*OPEN, SIGN_IN) or scope["path"].startswith(STATIC):
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

    @staticmethod
    def _turned_away(trouble: Trouble, scope: Scope, headers: Mapping[str, str]) -> Response:
        """A person without a key is asked for it; whatever else is stopped is told why."""
        if trouble.status == 401 and "text/html" in headers.get("accept", ""):
            return RedirectResponse(f"{SIGN_IN}?next={quote(scope['path'])}", 303)
        return trouble.response()

    async def _caller(self, headers: MutableMapping[str, str]) -> Caller | None:
        if self.server.open_to_all:
            return ANYBODY
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secret.strip():
            return await run_in_threadpool(keys.find, self.server.store, secret.strip())
        token = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        return await run_in_threadpool(keys.signed_in, self.server.store, token) if token else None

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
        if self.server.log is not None and scope["path"] not in OPEN and not scope["path"].startswith(STATIC):
            try:
                await run_in_threadpool(audit.append, self.server.log, "http", facts)
            except InputError as error:
                LOG.error(str(error), extra={"facts": facts})
