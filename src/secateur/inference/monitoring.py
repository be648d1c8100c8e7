"""What a server tells besides vectors: errors to its clients, a log, and the counts that Prometheus reads."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

log = logging.getLogger("secateur.serve")


class ApiError(Exception):
    """An error response to a client, in OpenAI's shape."""

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


class JsonLines(logging.Formatter):
    """Log records as JSON, one a line; of an exception only its kind and place, since its message may hold a text."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        line |= {"event": record.getMessage().strip(), **getattr(record, "facts", {})}
        if record.exc_info and record.exc_info[1] is not None:
            frames = traceback.extract_tb(record.exc_info[2])[-8:]
            line["error"] = type(record.exc_info[1]).__name__
            line["at"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        return json.dumps(line)


def log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in ((log.name, logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


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
