"""What Prometheus is told; see docs/serve.md for the names."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentdiff.serving.queue import Queue
from latentdiff.serving.work import Failed, Made
from latentdiff.serving.workers import Workers

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """A registry of its own, as one process may run several servers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "latentdiff_requests", "Requests that were answered", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "latentdiff_request_seconds", "Time to the end of an answer", ["route"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.images = Counter("latentdiff_images", "Images by what became of them", ["outcome"], registry=self.registry)

    def watch(self, queue: Queue, workers: Workers) -> None:
        """Tell of these, too."""
        for name, text, value in (
            ("latentdiff_queue_images", "Images that wait", lambda: len(queue)),
            ("latentdiff_images_in_making", "Images that workers are at", lambda: queue.in_making),
            ("latentdiff_workers_ready", "Workers that can work", lambda: len(workers.ready)),
            ("latentdiff_worker_deaths", "Workers that died and were started again", lambda: workers.restarts),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def observe(self, message: object) -> None:
        """Count what workers say."""
        match message:
            case Made():
                self.images.labels("made").inc()
            case Failed(kind=kind):
                self.images.labels("cancelled" if kind == "cancelled" else "failed").inc()


class Measured:
    """ASGI middleware that counts answers and their time, by the route's pattern, which a request cannot invent."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), "500"

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)
