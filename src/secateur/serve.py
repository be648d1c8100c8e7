"""The OpenAI embeddings API over a model folder: ``POST /v1/embeddings`` and ``GET /v1/models``.

A request goes through four stations: :class:`Gate` (key, size, time; for every path alike), :func:`prepare` (JSON to
tokens, in one thread), :class:`~secateur.queueing.Batcher` (tokens to vectors, together with other requests) and
:func:`_body` (vectors to JSON, piece by piece). What waits anywhere is bounded. Texts are never logged.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json

from secateur.encoders import Encoder, EncoderProcess, ModelEncoder, TextRefused, Tokens, Vectors
from secateur.errors import ConfigError, MissingPackage
from secateur.models import model_label, open_model
from secateur.pooling import PoolingName
from secateur.queueing import Batch, Batcher, EncodingFailed, QueueFull

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from fastapi.security import HTTPBearer
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingPackage(error.name or "fastapi", "serving", "pip install 'secateur[serve]'") from error

API_KEYS = "SECATEUR_API_KEYS"
"""The environment variable that API keys are read from, separated by commas."""

BODIES_AT_ONCE = 8
"""All bodies in memory together have at most this many times the size that one may have."""

BODY_SECONDS = 30.0
SEND_SECONDS = 30.0
DRAIN_SECONDS = 2.0
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, so that it is they who close it
PIECE_NUMBERS = 1 << 15
OPEN_PATHS = ("/health", "/ready", "/openapi.json")
LEFT = 499  # what a log calls the answer to a client that left; it never travels

_log = logging.getLogger("secateur.serve")


@dataclass(frozen=True)
class Limits:
    """What a server takes. Tokens count after the prompt is added; ``timeout`` is in seconds, from body to vectors."""

    batch_tokens: int = 4096
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
            _log.error("batch failed", extra={"facts": {"texts": batch.texts, "problem": repr(batch.error)[:300]}})
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
        ConfigError: The file cannot be read, or holds no key.
    """
    keys = [key.strip() for key in os.environ.get(API_KEYS, "").split(",") if key.strip()]
    if file is None:
        return Keys(keys)
    try:
        lines = Path(file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", str(file), f"{file} cannot be read ({type(error).__name__})") from None
    if not lines:
        raise ConfigError("api_key_file", str(file), f"{file} holds no key", "one key a line")
    return Keys([*keys, *lines])


class _ClientLeft(Exception):
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
        answer = _Answer(send)
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        body = bytearray()
        start = time.monotonic()
        try:
            self._check_key(scope)
            await self._read(scope, receive, body)
            answer.asked = True
            await self._app(scope, _replay(bytes(body), receive), answer.send)
        except _ClientLeft:
            answer.status = answer.status or LEFT
        except ApiError as error:
            await self._refuse(error, scope, receive, answer)
        except Exception as error:
            _log.error("bug", exc_info=error)
            if answer.status:
                raise
            await self._refuse(ApiError(500, "internal error", code="internal_error"), scope, receive, answer)
        finally:
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
                raise _ClientLeft
            more = message.get("more_body", False)
            chunk = message.get("body", b"")
            body += chunk
            self._held += len(chunk)
            if len(body) > limit:
                raise too_large
            if self._held > BODIES_AT_ONCE * limit:
                raise _busy(1)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, answer: _Answer) -> None:
        self._metrics.errors.labels(error.code or "other").inc()
        scope["state"]["facts"]["error"] = error.code
        if not answer.asked and not any(name == b"expect" for name, _ in scope["headers"]):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_drain(receive), DRAIN_SECONDS)
        await error.response()(scope, receive, answer.send)

    def _tell(self, scope: Scope, answer: _Answer, facts: Mapping[str, Any], seconds: float) -> None:
        # The path of the route, not of the request: that one is anything, and for ever new.
        path = getattr(scope.get("route"), "path", "other")
        if answer.status == LEFT:
            self._metrics.errors.labels("client_left").inc()
        self._metrics.requests.labels(path, answer.status).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        told = {"request": answer.request_id, "method": scope["method"][:16], "path": path, "status": answer.status}
        _log.info("request", extra={"facts": told | {"seconds": round(seconds, 4)} | dict(facts)})


@dataclass
class _Answer:
    """The way back to a client: whether it has said everything, and the answer's status and number."""

    _send: Send
    asked: bool = False
    status: int = 0
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        # A client that does not read would hold its answer in memory for ever.
        await asyncio.wait_for(self._send(message), SEND_SECONDS)


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


def _busy(seconds: int) -> ApiError:
    message = f"the server is busy; try again in {seconds} s"
    return ApiError(429, message, code="server_busy", headers={"Retry-After": str(seconds)})


def _kind(value: Any) -> str:
    """Which form of ``input`` a value means to be, by its first part."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else ""
    return "ids" if isinstance(first, int | float) else "id_lists" if isinstance(first, list) else "texts"


def _whole(value: Any) -> Any:
    """15.0 as 15, also in a list: to JSON they are the same."""
    if isinstance(value, list):
        return [_whole(number) if type(number) is float else number for number in value]
    return int(value) if type(value) is float and value.is_integer() else value


TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), BeforeValidator(_whole)]
_INPUT = "A text, several texts, token ids of one text, or those of several. Ids go to the model as they are."
_DIMENSIONS = "Keep this many numbers of each vector, and make it one long again; for models trained for it."


class EmbeddingRequest(BaseModel):
    """The body of ``POST /v1/embeddings``: OpenAI's, and ``prompt``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("texts")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[list[Ids], Field(min_length=1, fail_fast=True), Tag("id_lists")],
        Discriminator(_kind),
    ] = Field(description=_INPUT)
    dimensions: Annotated[int | None, BeforeValidator(_whole)] = Field(None, ge=1, description=_DIMENSIONS)
    encoding_format: Literal["float", "base64"] = "float"
    prompt: str | None = Field(None, description="Name of the model's prompt that goes before each text.")
    user: str | None = Field(None, description="Ignored.")


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "secateur"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def request_schema(encoder: Encoder, name: str, limits: Limits) -> dict[str, Any]:
    """The JSON schema of a request to this very model: its name, lengths, prompts and dimensions."""
    schema = EmbeddingRequest.model_json_schema()
    fields = schema["properties"]
    fields["model"] = {"type": "string", "enum": [name]}
    fields["dimensions"]["anyOf"][0]["maximum"] = encoder.dimension
    if encoder.prompts:
        fields["prompt"]["anyOf"][0]["enum"] = sorted(encoder.prompts)
    else:
        fields["prompt"]["anyOf"] = [{"type": "null"}]
    ids = {"type": "integer", "minimum": 0, "maximum": encoder.vocabulary - 1}
    ids = {"type": "array", "items": ids, "minItems": 1, "maxItems": encoder.max_length}
    texts = {"type": "array", "items": {"type": "string", "minLength": 1}}
    several = {"minItems": 1, "maxItems": limits.max_items}
    lists = {"type": "array", "items": ids}
    text_forms = [{"type": "string", "minLength": 1}, texts | several]
    fields["input"]["oneOf"] = [*text_forms, ids, lists | several]
    prompted = {"properties": {"input": {"oneOf": text_forms}}}
    schema["anyOf"] = [prompted, {"properties": {"prompt": {"type": "null"}}}]
    return schema


def parse(body: bytes) -> EmbeddingRequest:
    """The request in a body.

    Raises:
        ApiError: 400: it is no JSON, or not this request; nothing of the body is in the message but the field.
    """
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    # Before pydantic sees them: it would make an error of each of a million keys.
    unknown = next((key for key in content if key not in EmbeddingRequest.model_fields), None)
    if unknown is not None:
        known = ", ".join(EmbeddingRequest.model_fields)
        raise ApiError(400, f"no such field; known are {known}", param=unknown[:64], code="unknown_field")
    try:
        return EmbeddingRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        tags = ("text", "texts", "ids", "id_lists")
        name, *places = [part for part in first["loc"] if part not in tags]
        param = str(name) + "".join(f"[{place}]" for place in places)
        raise ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value") from None


@dataclass(frozen=True)
class Prepared:
    """A request, ready for the model."""

    texts: list[Tokens]
    dimensions: int | None
    as_base64: bool


def prepare(body: bytes, encoder: Encoder, name: str, limits: Limits) -> Prepared:
    """A body as tokens; run in one thread, so that no two are taken apart at once.

    Raises:
        ApiError: The request is not one that this model can answer.
    """
    request = parse(body)
    if request.model != name:
        raise ApiError(404, f"no such model; this server has {name}", param="model", code="model_not_found")
    if request.dimensions is not None and request.dimensions > encoder.dimension:
        problem = f"dimensions: the model's vectors have {encoder.dimension} numbers, so at most {encoder.dimension}"
        raise ApiError(400, problem, param="dimensions", code="invalid_value")
    several = request.input if isinstance(request.input, list) and not isinstance(request.input[0], int) else None
    inputs: list[Any] = [request.input] if several is None else list(several)
    if len(inputs) > limits.max_items:
        problem = f"input: {len(inputs)} texts in one request, at most {limits.max_items}"
        raise ApiError(400, problem, param="input", code="too_many_texts")
    try:
        texts = _tokens(inputs, request.prompt, encoder, limits)
    except TextRefused as error:
        param = "input" if error.place is None or several is None else f"input[{error.place}]"
        raise ApiError(400, f"{param}: {error}", param=param, code="text_refused") from None
    return Prepared(texts, request.dimensions, request.encoding_format == "base64")


def _tokens(inputs: list[Any], prompt: str | None, encoder: Encoder, limits: Limits) -> list[Tokens]:
    if prompt is not None and prompt not in encoder.prompts:
        known = ", ".join(sorted(encoder.prompts)) or "none"
        raise ApiError(
            400, f"prompt: the model has no such prompt; it has {known}", param="prompt", code="invalid_value"
        )
    if isinstance(inputs[0], str):
        name = prompt if prompt is not None else encoder.default_prompt
        return encoder.tokenize(inputs, name, truncate=limits.truncate, limit=limits.max_tokens)
    if prompt is not None:
        raise ApiError(400, "prompt: goes before texts, not before token ids", param="prompt", code="invalid_value")
    return _given_tokens(inputs, encoder, limits)


def _given_tokens(inputs: list[list[int]], encoder: Encoder, limits: Limits) -> list[Tokens]:
    """Token ids that a client made itself: checked, and cut where texts would be."""
    texts = []
    for place, ids in enumerate(inputs):
        if max(ids) >= encoder.vocabulary:
            raise TextRefused(place, "a token id that the model does not have", f"ids are below {encoder.vocabulary}")
        if len(ids) > encoder.max_length and not limits.truncate:
            raise TextRefused(place, f"{len(ids)} tokens are too many", f"the model reads at most {encoder.max_length}")
        texts.append(Tokens(np.asarray(ids[: encoder.max_length], dtype=np.int32)))
    if sum(map(len, texts)) > limits.max_tokens:
        raise TextRefused(None, f"more than {limits.max_tokens} tokens in one request", "send fewer texts at once")
    return texts


def shorten(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first ``dimensions`` numbers of vectors, of length one again; None leaves them as they are."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    short = vectors[:, :dimensions]
    norms = np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
    return np.asarray(short / norms, dtype=np.float32)


def _body(vectors: Vectors, name: str, tokens: int, as_base64: bool) -> Iterator[bytes]:
    """The answer as JSON, in pieces of about ``PIECE_NUMBERS`` numbers."""
    yield b'{"object":"list","model":%s,"data":[' % json.dumps(name).encode()
    rows = max(1, PIECE_NUMBERS // vectors.shape[1])
    for start in range(0, len(vectors), rows):
        piece = [_embedding(i, vectors[i], as_base64) for i in range(start, min(start + rows, len(vectors)))]
        yield (b"," if start else b"") + ",".join(piece).encode()
    yield b'],"usage":%s}' % json.dumps({"prompt_tokens": tokens, "total_tokens": tokens}).encode()


def _embedding(index: int, vector: Vectors, as_base64: bool) -> str:
    written = (
        f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"' if as_base64 else json.dumps(vector.tolist())
    )
    return f'{{"object":"embedding","index":{index},"embedding":{written}}}'


def _response(vectors: Vectors, name: str, tokens: int, as_base64: bool) -> Response:
    pieces = _body(vectors, name, tokens, as_base64)
    if vectors.size <= PIECE_NUMBERS:
        return Response(b"".join(pieces), media_type="application/json")

    async def one_by_one() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            await asyncio.sleep(0)  # others get their turn

    return StreamingResponse(one_by_one(), media_type="application/json")


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A request that cannot be answered."},
    401: {"model": ErrorBody, "description": "No valid API key."},
    404: {"model": ErrorBody, "description": "No such model."},
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "The body is not application/json."},
    429: {"model": ErrorBody, "description": "Too much waits already; Retry-After says for how long."},
    500: {"model": ErrorBody, "description": "The model failed on these texts."},
    503: {"model": ErrorBody, "description": "Not in time."},
}


def make_app(
    encoder: Encoder,
    name: str,
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    processes: Sequence[EncoderProcess] = (),
    metrics: Metrics | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        encoder: Tokenizes; and encodes, in a thread, where there are no ``processes``.
        name: What clients call the model.
        limits: What is taken.
        keys: API keys; none: everybody is served.
        processes: Encode in place of ``encoder``, each batch in one of them.
        metrics: Where to count.
    """
    limits, keys, metrics = limits or Limits(), keys or Keys(), metrics or Metrics()
    batcher = Batcher(
        [process.encode for process in processes] or [encoder.encode],
        max_length=encoder.max_length,
        batch_tokens=limits.batch_tokens,
        queue_tokens=limits.queue_tokens,
        observe=metrics.observe,
    )
    metrics.queue_tokens.set_function(lambda: batcher.tokens)
    preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        for process in processes:
            process.close()
        await batcher.close()
        preparing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="secateur", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, keys=keys, limits=limits, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_error)
    guarded = [Depends(HTTPBearer(auto_error=False))] if keys else []  # told in the schema; the gate is what checks
    content = {"application/json": {"schema": request_schema(encoder, name, limits)}}

    async def answer(body: bytes, facts: dict[str, Any]) -> Response:
        prepared = await asyncio.get_running_loop().run_in_executor(
            preparing, partial(prepare, body, encoder, name, limits)
        )
        tokens = sum(map(len, prepared.texts))
        facts.update(texts=len(prepared.texts), tokens=tokens)
        vectors = await batcher.embed(prepared.texts)
        return _response(shorten(vectors, prepared.dimensions), name, tokens, prepared.as_base64)

    @app.post(
        "/v1/embeddings",
        responses={200: {"model": EmbeddingList}, **_ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": content}},
        dependencies=guarded,
    )
    async def embeddings(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send Content-Type: application/json", code="unsupported_media_type")
        body = await request.body()
        return await _while_connected(request, answer(body, request.state.facts), limits.timeout)

    @app.get("/v1/models", responses={401: _ERRORS[401], 413: _ERRORS[413]}, dependencies=guarded)
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name)])

    @app.get(
        "/v1/models/{model:path}",
        responses={status: _ERRORS[status] for status in (401, 404, 413)},
        dependencies=guarded,
    )
    async def one_model(model: str) -> ModelCard:
        if model != name:
            raise ApiError(404, f"no such model; this server has {name}", param="model", code="model_not_found")
        return ModelCard(id=name)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: _ERRORS[503]})
    async def ready() -> dict[str, str]:
        if not batcher.running:
            raise ApiError(503, "the encoder does not run", code="not_ready")
        return {"status": "ready"}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: _ERRORS[401]},
        dependencies=guarded,
    )
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors (no such path, no such method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail, code="not_found", headers=error.headers).response()


async def _while_connected(request: Request, answer: Any, timeout: float) -> Response:
    """Await an answer as long as its client waits for it."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work: asyncio.Task[Response] = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(left())
    try:
        await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise _ClientLeft
        raise ApiError(503, f"not done in {timeout:g} s", code="timeout", headers={"Retry-After": "1"})
    except QueueFull as error:
        raise _busy(error.retry_after) from None
    except EncodingFailed:
        raise ApiError(500, "the model failed on these texts", code="encoding_failed") from None
    finally:
        work.cancel()
        gone.cancel()


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
    for name, level in (("secateur.serve", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class Server(uvicorn.Server):
    """uvicorn's server, which ends well when it is told to end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what was taken; a second signal ends at once. uvicorn would raise the signal again at the end."""
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(app: FastAPI, timeout: float = Limits.timeout) -> Server:
    """A uvicorn server for an app; what it took it finishes, for at most ``timeout`` seconds."""
    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(timeout) + 5,
        )
    )


def bind(host: str, port: int, keys: Keys, auth: bool = True) -> socket.socket:
    """A socket at an address, not yet listening.

    Raises:
        ConfigError: Others could reach it and there is no key, or the address is taken or not of this machine.
    """
    if auth and not keys and not _is_loopback(host):
        problem = "is reachable from other machines, and there is no API key"
        hint = f"set {API_KEYS} or --api-key-file, or say --no-auth"
        raise ConfigError("host", host, f"{host} {problem}", hint)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError("host", host, f"cannot listen at {host}:{port} ({error.strerror or error})") from None
    return bound


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: str | Path | None = None,
    auth: bool = True,
    workers: int = 0,
    batch_tokens: int = Limits.batch_tokens,
    queue_tokens: int = Limits.queue_tokens,
    max_items: int = Limits.max_items,
    max_tokens: int = Limits.max_tokens,
    max_bytes: int = Limits.max_bytes,
    timeout: float = Limits.timeout,
    truncate: bool = False,
    pooling: PoolingName | None = None,
    max_length: int = 512,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve a model until the process is told to end (SIGTERM, Ctrl-C); then finish what was taken.

    Args:
        model: As :func:`~secateur.models.open_model` takes it, to which ``pooling`` and all that follow it go.
        host: Address to listen at; others than loopback need a key.
        port: Port to listen at; 0 takes a free one, which the log tells.
        name: What clients call the model; default: the last part of its path or Hub id.
        api_key_file: API keys, one a line, besides those in the environment variable ``SECATEUR_API_KEYS``.
        auth: False serves everybody who reaches ``host``.
        workers: Encoder processes, each with the model in its memory, replaced when they die; 0: a thread of this one.
        batch_tokens: Tokens in one pass of the model, padding included.
        queue_tokens: Tokens that may wait or be encoded; more are answered with 429.
        max_items: Texts in a request.
        max_tokens: Tokens in a request.
        max_bytes: Bytes of a request's body.
        timeout: Seconds that a request may take.
        truncate: Cut texts that are too long for the model; else they are refused.
        pooling: How a bare language model pools its tokens.
        max_length: Tokens in a text, for a bare language model.
        dtype: Number format of the weights.
        device: Torch device.
        trust_remote_code: Run the model code that a repository brings along.

    Raises:
        ConfigError: ``host`` is open to others without a key, the address is taken, or a key file holds none.
        ModelError: The model cannot be opened, or not be served.
    """
    keys = read_keys(api_key_file) if auth else Keys()
    limits = Limits(batch_tokens, queue_tokens, max_items, max_tokens, max_bytes, timeout, truncate)
    opening: dict[str, Any] = {"pooling": pooling, "max_length": max_length, "dtype": dtype}
    opening |= {"trust_remote_code": trust_remote_code}
    metrics = Metrics()
    with bind(host, port, keys, auth) as listener:
        encoder = open_encoder(model, opening | {"device": "cpu" if workers else device})
        if workers:
            encoder.model.to("meta")  # only its tokenizer is needed here
        share = max(1, torch.get_num_threads() // max(1, workers))
        make = partial(open_encoder, model, opening | {"device": device}, threads=share)
        processes = [EncoderProcess(make, metrics.restarts.inc) for _ in range(workers)]
        name = name or model_label(model)
        app = make_app(encoder, name, limits=limits, keys=keys, processes=processes, metrics=metrics)
        log_as_json()
        address = "http://{}:{}".format(*listener.getsockname()[:2])
        _log.info("serving", extra={"facts": {"model": name, "address": address, "pid": os.getpid()}})
        make_server(app, timeout).run(sockets=[listener])
        _log.info("ended")


def open_encoder(model: str | Path, opening: Mapping[str, Any], threads: int | None = None) -> ModelEncoder:
    """A model, opened with these options, as the server's encoder; ``threads`` is its share of the processor."""
    if threads:
        torch.set_num_threads(threads)
    return ModelEncoder(open_model(model, **opening), model_label(model))
