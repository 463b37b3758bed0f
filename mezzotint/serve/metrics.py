"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mezzotint.serve.server import Server
from mezzotint.serve.tables import STATES


class Metrics:
    """The counts of one server, in a registry of its own."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mezzotint_requests_total", "Requests answered", ("method", "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "mezzotint_request_seconds", "Seconds to an answer", ("route",), registry=registry,
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
        )  # fmt: skip
        self._jobs = Gauge("mezzotint_jobs", "Jobs by state", ("state",), registry=registry)
        self._busy = Gauge("mezzotint_hands_at_work", "Jobs that are drawn now", registry=registry)
        self._drawing = Gauge("mezzotint_processes_drawing", "Processes that draw, and answer", registry=registry)
        self._calls = Gauge(
            "mezzotint_network_calls", "Calls of a model's network so far", ("model",), registry=registry
        )
        self._rows = Gauge("mezzotint_network_rows", "Rows of these calls so far", ("model",), registry=registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        counts = self.server.store.counts()
        for state in STATES:
            self._jobs.labels(state).set(counts.get(state, 0))
        crews = self.server.counts()
        self._drawing.set(len(crews))
        self._busy.set(sum(crew.at_work for crew in crews))
        for name in self.server.desks:
            calls, rows = (sum(crew.calls[name][i] for crew in crews) for i in (0, 1))
            self._calls.labels(name).set(calls)
            self._rows.labels(name).set(rows)
        return generate_latest(self.registry)
