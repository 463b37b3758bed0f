"""The app: routes and what every request passes."""

from __future__ import annotations

from fastapi import FastAPI, Response
from starlette.concurrency import run_in_threadpool

from mezzotint.serve import door, events, jobs, openai, trouble
from mezzotint.serve.metrics import Metrics
from mezzotint.serve.server import Server
from mezzotint.serve.web import pages
from mezzotint.serve.web.choices import choices


def create(server: Server) -> FastAPI:
    """The app of a server."""
    app = FastAPI(title="Mezzotint", version="1", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    metrics = Metrics(server)
    app.state.server, app.state.choices = server, choices(server)
    app.include_router(openai.router)
    app.include_router(events.router)
    app.include_router(jobs.router)
    app.include_router(pages.router)
    app.mount(door.STATIC.rstrip("/"), pages.static)
    trouble.answers(app, pages.trouble)

    @app.get("/health", tags=["state"])
    def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["state"])
    def ready(response: Response) -> dict[str, str]:
        """The database answers and new jobs are taken."""
        if server.draining:
            response.status_code = 503
            return {"status": "draining"}
        server.store.counts()
        return {"status": "ready"}

    @app.get("/metrics", tags=["state"], response_class=Response)
    async def told() -> Response:
        """Counts for Prometheus."""
        return Response(await run_in_threadpool(metrics.text), media_type="text/plain; version=0.0.4")

    app.add_middleware(door.Door, server=server, metrics=metrics)
    return app
