"""What every request to the server meets: errors in OpenAI's shape, log and metrics; body limits; API keys."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from secateur.errors import ConfigError

API_KEYS = "SECATEUR_API_KEYS"
"""The environment variable that API keys are read from, separated by commas."""
BODIES_AT_ONCE = 8
"""All bodies in memory together have at most this many times the size that one may have."""
DRAIN_SECONDS = 2.0
CLIENT_LEFT = 499  # in the log only; it is never sent

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


class RequestMiddleware:
    """Gives every request an id, turns exceptions into error responses, and counts and logs the response."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {"request": uuid.uuid4().hex}
        scope.setdefault("state", {})["facts"] = facts
        status, unread, start = 0, True, time.monotonic()

        async def read() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", facts["request"].encode())]
            await send(message)

        error: ApiError | None = None
        try:
            await self._app(scope, read, answer)
        except ApiError as caught:
            error = caught
        except ClientDisconnect:
            status = CLIENT_LEFT
            self._metrics.errors.labels("client_left").inc()
        except asyncio.CancelledError:  # by a server that ends at once
            error = ApiError(503, "the server ends", "shutdown")
        except Exception as caught:
            log.error("bug", exc_info=caught)
            error = ApiError(500, "internal error", "internal_error")
        if error and not status:
            facts["error"] = error.code
            self._metrics.errors.labels(error.code).inc()
            if unread:  # a client that still sends would read a reset, not its response
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_drain(read), DRAIN_SECONDS)
            await error.response(scope, receive, answer)
        # The path of the route, not of the request: that one can be anything, and would fill the metrics.
        path, seconds = getattr(scope.get("route"), "path", "other"), time.monotonic() - start
        self._metrics.requests.labels(path, status).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        about = {"method": scope["method"][:16], "path": path, "status": status, "seconds": round(seconds, 4)}
        log.info("request", extra={"facts": about | facts})


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


class Bodies:
    """Reads bodies of at most so many bytes, of which those in memory together are bounded, too."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0

    @asynccontextmanager
    async def read(self, request: Request, seconds: float) -> AsyncIterator[bytes]:
        """A body, which is in memory until the end of the block; its bytes are counted as they come in."""
        chunks: list[bytes] = []

        async def gather() -> None:
            size = 0
            async for chunk in request.stream():
                chunks.append(chunk)
                self._held += len(chunk)
                size += len(chunk)
                if size > self._most:
                    raise ApiError(413, f"a request has at most {self._most} bytes", "request_too_large")
                if self._held > BODIES_AT_ONCE * self._most:
                    raise busy(1)

        try:
            try:
                await asyncio.wait_for(gather(), seconds)
            except asyncio.TimeoutError:
                raise ApiError(408, "the body came too slowly", "timeout") from None
            yield b"".join(chunks)
        finally:
            self._held -= sum(map(len, chunks))


class Keys:
    """API keys, kept as digests and compared in constant time."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(os.fsencode(key)).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, key: bytes) -> bool:
        """Whether this is one of the keys."""
        given = hashlib.sha256(key).digest()
        return any([hmac.compare_digest(given, digest) for digest in self._digests])


def read_keys(file: str | Path | None) -> Keys:
    """Keys from the environment variable ``SECATEUR_API_KEYS`` and from a file, one a line.

    Raises:
        ConfigError: The file cannot be read, or holds no key; or a key is malformed. No key is in the message.
    """
    keys = [key.strip() for key in os.environ.get(API_KEYS, "").split(",")]
    if any(len(key.split()) > 1 for key in keys):
        raise ConfigError(API_KEYS, None, "has blanks or line ends within a key", "keys are separated by commas")
    if file is not None:
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("api_key_file", str(file), f"{file} cannot be read ({type(error).__name__})") from None
        for number, line in enumerate(lines, 1):
            if len(line.split()) > 1:
                problem = f"{file}, line {number}: a key has no blanks in it"
                raise ConfigError("api_key_file", str(file), problem, "one key a line, and nothing else")
        if not any(lines):
            raise ConfigError("api_key_file", str(file), f"{file} holds no key", "one key a line")
        keys += lines
    return Keys([key for key in keys if key])


class JsonLines(logging.Formatter):
    """Log records as JSON, one a line; of an exception only its kind and place, since its message may hold a text."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        line |= {"event": record.getMessage().strip(), **getattr(record, "facts", {})}
        if record.exc_info and record.exc_info[1] is not None:
            frames = traceback.extract_tb(record.exc_info[2])[-8:]
            line["error"] = type(record.exc_info[1]).__name__
            line["at"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        return json.dumps(line)


def log_as_json() -> None:
    """Send the server's log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in ((log.name, logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
