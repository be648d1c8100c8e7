"""What a server tells: its clients an error, Prometheus its counts, and whoever runs it a log."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

log = logging.getLogger("secateur.serve")


class ApiError(Exception):
    """An error response in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.code = code
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        error = {"message": message, "type": kind if status < 500 else "server_error", "param": param, "code": code}
        self.response = JSONResponse({"error": error}, status, headers)
        super().__init__(message)


def busy(seconds: int) -> ApiError:
    """The response to a client that has to wait."""
    message = f"the server is busy; try again in {seconds} s"
    return ApiError(429, message, "server_busy", headers={"Retry-After": str(seconds)})


class Metrics:
    """What Prometheus reads; one registry for each server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        powers = [float(2**i) for i in range(18)]
        self.requests = Counter("secateur_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram("secateur_request_seconds", "Request to response.", ["path"], registry=registry)
        self.errors = Counter("secateur_errors", "Requests that failed, by code.", ["code"], registry=registry)
        self.texts = Counter("secateur_texts", "Texts encoded.", registry=registry)
        self.tokens = Counter("secateur_tokens", "Tokens encoded.", registry=registry)
        self.batch_texts = Histogram("secateur_batch_texts", "Texts per batch.", buckets=powers[:12], registry=registry)
        self.batch_tokens = Histogram("secateur_batch_tokens", "Tokens per batch.", buckets=powers, registry=registry)
        self.batch_seconds = Histogram("secateur_batch_seconds", "A batch in the model.", registry=registry)
        self.batch_errors = Counter("secateur_batch_errors", "Batches that failed.", registry=registry)
        self.queue_seconds = Histogram("secateur_queue_seconds", "A text in the queue.", registry=registry)
        self.queue_tokens = Gauge("secateur_queue_tokens", "Tokens waiting or being encoded.", registry=registry)
        self.restarts = Counter("secateur_encoder_restarts", "Worker processes restarted.", registry=registry)
