"""What every request to the server passes: errors in OpenAI's shape, log and metrics; body limits; API keys."""

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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from secateur.errors import ConfigError

API_KEYS = "SECATEUR_API_KEYS"
"""The environment variable that API keys are read from, separated by commas."""

BODIES_AT_ONCE = 8
"""All bodies in memory together have at most this many times the size that one may have."""

BODY_SECONDS = 30.0
DRAIN_SECONDS = 2.0
OPEN_PATHS = ("/health", "/ready", "/openapi.json")
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


class ClientLeft(Exception):
    """The client closed its connection before it was answered."""


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
        state = scope.setdefault("state", {})
        state["facts"] = facts
        status, complete, start = 0, False, time.monotonic()

        async def answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", facts["request"].encode())]
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last:  # the end by itself: it is sent when all before it has left
                await send({**message, "more_body": True})
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)
            complete = last and not getattr(state.get("connection"), "lost", False)

        error: ApiError | None = None
        try:
            await self._app(scope, receive, answer)
        except ApiError as caught:
            error = caught
        except ClientLeft:
            complete = False
        except asyncio.CancelledError:  # by a server that ends at once
            error = ApiError(503, "the server ends", "shutdown")
        except Exception as caught:
            log.error("bug", exc_info=caught)
            error = ApiError(500, "internal error", "internal_error")
        if error and not status:
            facts["error"] = error.code
            self._metrics.errors.labels(error.code).inc()
            await error.response(scope, receive, answer)
        if not complete:
            status = CLIENT_LEFT
            self._metrics.errors.labels("client_left").inc()
        path, seconds = route_path(scope), time.monotonic() - start
        self._metrics.requests.labels(path, status).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        about = {"method": scope["method"][:16], "path": path, "status": status, "seconds": round(seconds, 4)}
        log.info("request", extra={"facts": about | facts})


def route_path(scope: Scope) -> str:
    """The path of the route, not of the request: that one can be anything, and would fill the metrics."""
    routes = [scope["route"]] if "route" in scope else scope["app"].routes  # none where a middleware refused it
    return next((route.path for route in routes if route.matches(scope)[0] is not Match.NONE), "other")


class BodyLimitMiddleware:
    """Bounds the size of a body, of all bodies in memory together, and the time in which a body must arrive.

    Bytes are counted as they come in, whatever length was declared.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes, self._held = app, max_bytes, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        declared = headers.get(b"content-length", b"0")
        size, more, end = 0, scope["type"] == "http", time.monotonic() + BODY_SECONDS

        async def limited() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            if declared.isdigit() and int(declared[:20]) > self._max_bytes:
                raise self._too_large()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(408, "the body came too slowly", "timeout") from None
            if message["type"] == "http.disconnect":
                raise ClientLeft
            more = message.get("more_body", False)
            size += (length := len(message.get("body", b"")))
            self._held += length
            if size > self._max_bytes:
                raise self._too_large()
            if self._held > BODIES_AT_ONCE * self._max_bytes:
                raise busy(1)
            return message

        try:
            await self._app(scope, limited, send)
        except ApiError:
            if more and b"expect" not in headers:  # a client that still sends would read a reset, not its response
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_drain(receive), DRAIN_SECONDS)
            raise
        finally:
            self._held -= size

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request has at most {self._max_bytes} bytes", "request_too_large")


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


class Keys:
    """API keys, kept as digests and compared in constant time; without keys, every request is allowed."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, header: bytes) -> bool:
        """Whether an ``Authorization`` header carries one of the keys."""
        scheme, _, key = header.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return not self._digests or (scheme.lower() == b"bearer" and any(found))


class KeyMiddleware:
    """Refuses requests without a valid API key, but for :data:`OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not self._keys.allow(header):
                message = "no valid API key; send Authorization: Bearer KEY"
                raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await self._app(scope, receive, send)


def read_keys(file: str | Path | None) -> Keys:
    """Keys from the environment variable ``SECATEUR_API_KEYS`` and from a file, one a line.

    Raises:
        ConfigError: The file cannot be read, or holds no key; or a key is malformed. No key is in the message.
    """
    keys = [key.strip() for key in os.environ.get(API_KEYS, "").split(",") if key.strip()]
    if any(len(key.split()) > 1 for key in keys):
        raise ConfigError(API_KEYS, None, "has blanks or line ends within a key", "keys are separated by commas")
    try:
        "".join(keys).encode()
    except UnicodeEncodeError:
        raise ConfigError(API_KEYS, None, "is not UTF-8") from None
    if file is None:
        return Keys(keys)
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
    return Keys([*keys, *filter(None, lines)])


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
