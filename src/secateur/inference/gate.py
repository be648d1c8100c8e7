"""What every request to the server passes first and last, whatever its path: key, size, time, errors, log, counts."""

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
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from secateur.errors import ConfigError
from secateur.inference.connections import Connection
from secateur.inference.encoders import CPU_BATCH
from secateur.inference.queueing import Batch

API_KEYS = "SECATEUR_API_KEYS"
"""The environment variable that API keys are read from, separated by commas."""

BODIES_AT_ONCE = 8
"""All bodies in memory together have at most this many times the size that one may have."""

BODY_SECONDS = 30.0
DRAIN_SECONDS = 2.0
OPEN_PATHS = ("/health", "/ready", "/openapi.json")
LEFT = 499  # what a log calls the answer to a client that left; it never travels

log = logging.getLogger("secateur.serve")


@dataclass(frozen=True)
class Limits:
    """What a server takes. Tokens count after the prompt is added; ``timeout`` is in seconds, from body to vectors."""

    batch_tokens: int = CPU_BATCH
    queue_tokens: int = 500_000
    max_items: int = 2048
    max_tokens: int = 300_000
    max_bytes: int = 4 << 20
    timeout: float = 60.0
    truncate: bool = False


class ApiError(Exception):
    """An answer that is no success, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.headers = headers
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = kind if status < 500 else "server_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)

    def response(self) -> Response:
        """The answer."""
        return JSONResponse(self.content, self.status, self.headers)


class Metrics:
    """What Prometheus reads; one registry for each server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        powers = [float(2**i) for i in range(18)]
        self.requests = Counter("secateur_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram("secateur_request_seconds", "Request to answer.", ["path"], registry=registry)
        self.errors = Counter("secateur_errors", "Requests that failed, by code.", ["code"], registry=registry)
        self.texts = Counter("secateur_texts", "Texts encoded.", registry=registry)
        self.tokens = Counter("secateur_tokens", "Tokens encoded.", registry=registry)
        self.batch_texts = Histogram(
            "secateur_batch_texts", "Texts in a batch.", buckets=powers[:12], registry=registry
        )
        self.batch_tokens = Histogram("secateur_batch_tokens", "Tokens in a batch.", buckets=powers, registry=registry)
        self.batch_seconds = Histogram("secateur_batch_seconds", "A batch in the model.", registry=registry)
        self.batch_errors = Counter("secateur_batch_errors", "Batches that failed.", registry=registry)
        self.queue_seconds = Histogram("secateur_queue_seconds", "A text in the queue.", registry=registry)
        self.queue_tokens = Gauge("secateur_queue_tokens", "Tokens waiting or being encoded.", registry=registry)
        self.restarts = Counter("secateur_encoder_restarts", "Encoder processes replaced.", registry=registry)

    def observe(self, batch: Batch) -> None:
        """Count a batch."""
        if batch.error is not None:
            self.batch_errors.inc()
            # The encoder sees tokens only: there is no text in what it says.
            log.error("batch failed", extra={"facts": {"texts": batch.texts, "problem": repr(batch.error)[:300]}})
            return
        self.texts.inc(batch.texts)
        self.tokens.inc(batch.tokens)
        self.batch_texts.observe(batch.texts)
        self.batch_tokens.observe(batch.tokens)
        self.batch_seconds.observe(batch.seconds)
        for wait in batch.waits:
            self.queue_seconds.observe(wait)


class Keys:
    """API keys, kept as digests and compared in constant time."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, header: bytes) -> bool:
        """Whether an ``Authorization`` header carries one of the keys; every header does where there are none."""
        scheme, _, key = header.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return not self._digests or (scheme.lower() == b"bearer" and any(found))


def read_keys(file: str | Path | None) -> Keys:
    """Keys from the environment variable ``SECATEUR_API_KEYS`` and from a file, one a line.

    Raises:
        ConfigError: The file cannot be read, or holds no key; or what should be a key is none.
    """
    return Keys([*_keys_of_environment(), *(_keys_of_file(file) if file is not None else [])])


def _keys_of_environment() -> list[str]:
    # No key is in the errors: not even one that is wrong.
    keys = [key.strip() for key in os.environ.get(API_KEYS, "").split(",") if key.strip()]
    if any(len(key.split()) > 1 for key in keys):
        raise ConfigError(API_KEYS, None, "has blanks or line ends within a key", "keys are separated by commas")
    if any("\udc80" <= character <= "\udcff" for key in keys for character in key):  # Python's for a byte that is none
        raise ConfigError(API_KEYS, None, "is not UTF-8")
    return keys


def _keys_of_file(file: str | Path) -> list[str]:
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
    return [line for line in lines if line]


class ClientLeft(Exception):
    """The client closed its connection before it was answered."""


class Gate:
    """What every request passes first and last: key, size and time of the body; error, log and count of the answer."""

    def __init__(self, app: ASGIApp, *, keys: Keys, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        connection: Connection | None = scope["state"].get("connection")  # none where another server runs the app
        answer = _Answer(send, connection)
        body = bytearray()
        start = time.monotonic()
        if connection:
            connection.begin()
        try:
            self._check_key(scope)
            await self._read(scope, receive, body)
            answer.asked = True
            await self._app(scope, _replay(bytes(body), receive), answer.send)
            if not answer.complete:
                raise ClientLeft
        except ClientLeft:
            answer.status = LEFT
        except asyncio.CancelledError:  # by a server that ends at once
            answer.asked = True
            if not answer.status:
                await self._refuse(ApiError(503, "the server ends", code="shutdown"), scope, receive, answer)
        except ApiError as error:
            await self._refuse(error, scope, receive, answer)
        except Exception as error:
            log.error("bug", exc_info=error)
            if answer.status:
                raise
            await self._refuse(ApiError(500, "internal error", code="internal_error"), scope, receive, answer)
        finally:
            if connection:
                connection.end()
            self._held -= len(body)
            self._tell(scope, answer, facts, time.monotonic() - start)

    def _check_key(self, scope: Scope) -> None:
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if scope["path"] not in OPEN_PATHS and not self._keys.allow(header):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(
                401, "no valid API key; send Authorization: Bearer KEY", code="invalid_api_key", headers=challenge
            )

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """Read the body; it counts as held as it comes in, whatever length was declared."""
        limit = self._limits.max_bytes
        too_large = ApiError(413, f"a request has at most {limit} bytes", code="request_too_large")
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        end = time.monotonic() + BODY_SECONDS
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(408, "the body came too slowly", code="timeout") from None
            if message["type"] == "http.disconnect":
                raise ClientLeft
            more = message.get("more_body", False)
            chunk = message.get("body", b"")
            body += chunk
            self._held += len(chunk)
            if len(body) > limit:
                raise too_large
            if self._held > BODIES_AT_ONCE * limit:
                raise busy(1)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, answer: _Answer) -> None:
        self._metrics.errors.labels(error.code or "other").inc()
        scope["state"]["facts"]["error"] = error.code
        if not answer.asked and not any(name == b"expect" for name, _ in scope["headers"]):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_drain(receive), DRAIN_SECONDS)
        await error.response()(scope, receive, answer.send)

    def _tell(self, scope: Scope, answer: _Answer, facts: Mapping[str, Any], seconds: float) -> None:
        path = _path(scope)
        if answer.status == LEFT:
            self._metrics.errors.labels("client_left").inc()
        self._metrics.requests.labels(path, answer.status).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        told = {"request": answer.request_id, "method": scope["method"][:16], "path": path, "status": answer.status}
        log.info("request", extra={"facts": told | {"seconds": round(seconds, 4)} | dict(facts)})


def _path(scope: Scope) -> str:
    """The path of the route, not of the request: that one is anything, and for ever new."""
    routes = [scope["route"]] if "route" in scope else scope["app"].routes  # none where the gate let nothing pass
    return next((route.path for route in routes if route.matches(scope)[0] is not Match.NONE), "other")


@dataclass
class _Answer:
    """The way back to a client: whether it has said everything, whether it got all, the answer's status and number."""

    _send: Send
    _connection: Connection | None
    asked: bool = False
    complete: bool = False
    status: int = 0
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last:  # the end apart: it is sent when all before it has left
            await self._send({**message, "more_body": True})
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)
        self.complete = last and not (self._connection and self._connection.gone)


async def _drain(receive: Receive) -> None:
    """Drop what is left of a body: a client that is still sending when it is closed reads a reset, not its answer."""
    while (await receive()).get("more_body", False):
        pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` with the body in one piece, and then what really comes: the client's leaving."""
    first: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def busy(seconds: int) -> ApiError:
    """The answer to a client that has to wait."""
    message = f"the server is busy; try again in {seconds} s"
    return ApiError(429, message, code="server_busy", headers={"Retry-After": str(seconds)})


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
