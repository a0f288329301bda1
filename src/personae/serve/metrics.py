"""What Prometheus reads: requests, batches, rows, tokens, the queue."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from personae.serve.scheduler import Job

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "personae_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "personae_request_seconds", "Seconds to the answer.", ["endpoint"], registry=registry
        )
        self._rows = Counter("personae_rows", "Rows computed.", ["task"], registry=registry)
        self._tokens = Counter("personae_tokens", "Tokens.", ["task", "kind"], registry=registry)
        self._batch_rows = Histogram(
            "personae_batch_rows", "Rows of a batch.", buckets=_SIZES, registry=registry
        )
        self._batch_tasks = Histogram(
            "personae_batch_tasks", "Tasks of a batch.", buckets=_SIZES, registry=registry
        )

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Tell a value that is looked up when it is asked for."""
        Gauge(name, meaning, registry=self._registry).set_function(value)

    def batch(self, jobs: Sequence[Job]) -> None:
        """Count a batch."""
        self._batch_rows.observe(len(jobs))
        self._batch_tasks.observe(len({job.task for job in jobs}))
        for job in jobs:
            self._rows.labels(job.task).inc()

    def tokens(self, task: str, asked: int, generated: int) -> None:
        """Count tokens of a generated answer."""
        self._tokens.labels(task, "prompt").inc(asked)
        self._tokens.labels(task, "generated").inc(generated)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def measured(self, app: Any) -> Any:
        """An ASGI application whose requests are counted."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            began, status = time.perf_counter(), 499  # none was sent: the client has left

            async def sent(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, sent)
            finally:
                route = scope.get("route")
                endpoint = getattr(route, "path", "other")
                self._requests.labels(endpoint, status).inc()
                self._seconds.labels(endpoint).observe(time.perf_counter() - began)

        return counted
