"""The server as an ASGI application: ``POST /v1/embeddings``, ``GET /v1/models``, health and metrics.

A request meets :class:`RequestMiddleware` (error responses, log, size of the body), becomes tokens (:class:`Requests`,
in one thread), vectors (:class:`.Batcher`, together with other requests) and JSON (:func:`respond`). What waits
anywhere is bounded. Texts are never logged.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from secateur.inference.monitoring import ApiError, Metrics, busy, log
from secateur.inference.queueing import Batcher, LocalWorker, Worker
from secateur.inference.workers import EncoderProcess
from secateur.options import ServeOptions
from secateur.runtime.core import Encoder, TextRefused, Tokens, Vectors

BEARER = HTTPBearer(auto_error=False)
BODIES_AT_ONCE = 8
"""All bodies in memory together have at most this many times the size that one may have."""
DRAIN_SECONDS = 2.0
CLIENT_LEFT = 499  # in the log only; it is never sent
ERROR: dict[int | str, dict[str, Any]] = {"default": {"description": "Why there is no answer: error.message, .code."}}
FORMS = ("text", "texts", "ids", "id_lists")


def _form(value: Any) -> str:
    """Which form of ``input`` a value means to be, by its first part."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else ""
    return "ids" if isinstance(first, int | float) else "id_lists" if isinstance(first, list) else "texts"


def _integers(value: Any) -> Any:
    """15.0 as 15, also in a list: to JSON they are the same."""
    if isinstance(value, list):
        return [_integers(number) if type(number) is float else number for number in value]
    return int(value) if type(value) is float and value.is_integer() else value


def request_model(encoder: Encoder, name: str, options: ServeOptions) -> type[BaseModel]:
    """The body of ``POST /v1/embeddings`` to this very model: OpenAI's fields, and ``prompt``."""
    several: dict[str, Any] = {"min_length": 1, "max_length": options.max_items, "fail_fast": True}
    longest = None if options.truncate else encoder.max_length
    text = Annotated[str, Field(min_length=1)]
    token_id = Annotated[int, Field(ge=0, lt=encoder.vocabulary)]
    ids = Annotated[list[token_id], Field(min_length=1, max_length=longest, fail_fast=True), BeforeValidator(_integers)]
    inputs = Annotated[
        Annotated[text, Tag("text")]
        | Annotated[list[text], Field(**several), Tag("texts")]
        | Annotated[ids, Tag("ids")]
        | Annotated[list[ids], Field(**several), Tag("id_lists")],
        Discriminator(_form),
    ]
    size = Annotated[int, Field(ge=1, le=encoder.dimension), BeforeValidator(_integers)]
    prompt_name: Any = Literal[(None, *sorted(encoder.prompts))]

    class EmbeddingRequest(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

        model: Annotated[str, Field(json_schema_extra={"enum": [name]})]
        input: Annotated[inputs, Field(description="Text, texts, token ids of a text, or those of several texts.")]
        dimensions: Annotated[size | None, Field(description="Truncate vectors, and normalise them.")] = None
        encoding_format: Literal["float", "base64"] | None = "float"
        prompt: Annotated[prompt_name, Field(description="Name of the prompt before each text.")] = None
        user: Annotated[Any, Field(description="Ignored.")] = None

    return EmbeddingRequest


class Requests:
    """Requests to one model, as tokens.

    Args:
        encoder: Its tokenizer and limits; used by one thread at a time.
        name: What clients call the model.
    """

    def __init__(self, encoder: Encoder, name: str, options: ServeOptions) -> None:
        self._encoder, self.name, self.options = encoder, name, options
        self._model = request_model(encoder, name, options)

    def json_schema(self) -> dict[str, Any]:
        """The schema of a request; a prompt goes with texts, not with token ids."""
        schema = self._model.model_json_schema()
        texts = [form for form in schema["properties"]["input"]["oneOf"] if "integer" not in json.dumps(form)]
        with_prompt = {"properties": {"input": {"oneOf": texts}}}
        return schema | {"anyOf": [with_prompt, {"properties": {"prompt": {"type": "null"}}}]}

    def prepare(self, body: bytes) -> tuple[Any, list[Tokens]]:
        """A body as a request (:func:`request_model`), and its tokens; for one thread: no two are parsed at once.

        Raises:
            ApiError: It is not a request that this model can answer; of the body, only the field is in the message.
        """
        try:
            request: Any = self._model.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            name, *places = [part for part in first["loc"] if part not in FORMS] or [""]
            param = (str(name) + "".join(f"[{place}]" for place in places))[:64]
            known = f"; known are {', '.join(self._model.model_fields)}" if first["type"] == "extra_forbidden" else ""
            message = f"{param or 'the body'}: {first['msg']}{known}"
            raise ApiError(400, message, first["type"], param or None) from None
        if request.model != self.name:
            raise ApiError(404, f"no such model; this server has {self.name}", "model_not_found", "model")
        several = isinstance(request.input, list) and not isinstance(request.input[0], int)
        inputs, limit = request.input if several else [request.input], self.options.max_tokens
        try:
            if isinstance(inputs[0], str):
                prompt, cut = self._encoder.prompt_of(request.prompt), self.options.truncate
                return request, self._encoder.tokenize(inputs, prompt, truncate=cut, limit=limit)
            if request.prompt is not None:
                raise ApiError(400, "prompt: goes before texts, not before token ids", "invalid_value", "prompt")
            longest = self._encoder.max_length
            place = slice(longest) if self._encoder.truncation_side == "right" else slice(-longest, None)
            texts = [Tokens(np.asarray(ids[place], dtype=np.int32)) for ids in inputs]
            if sum(map(len, texts)) > limit:
                raise TextRefused(None, f"more than {limit} tokens in one request", "send fewer texts at once")
            return request, texts
        except TextRefused as error:
            param = "input" if error.place is None or not several else f"input[{error.place}]"
            raise ApiError(400, f"{param}: {error}", "text_refused", param) from None


def respond(vectors: Vectors, tokens: int, request: Any) -> Response:
    """The response to a request, made a vector at a time."""
    if request.dimensions is not None and request.dimensions < vectors.shape[1]:
        short = vectors[:, : request.dimensions]
        vectors = short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
    rows, in_base64 = [], request.encoding_format == "base64"
    for index, vector in enumerate(vectors):
        numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode() if in_base64 else vector.tolist()
        rows.append(to_json({"object": "embedding", "index": index, "embedding": numbers}))
    usage = to_json({"prompt_tokens": tokens, "total_tokens": tokens})
    body = b'{"object":"list","model":%s,"data":[%s],"usage":%s}' % (to_json(request.model), b",".join(rows), usage)
    return Response(body, media_type="application/json")


class RequestMiddleware:
    """Gives every request an id, turns exceptions into error responses, and counts and logs the response.

    A body has at most ``most`` bytes, and those in memory together are bounded, too.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int) -> None:
        self._app, self._metrics, self._most, self._held = app, metrics, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {"request": uuid.uuid4().hex}
        scope.setdefault("state", {})["facts"] = facts
        status, size, unread, start = 0, 0, True, time.monotonic()

        async def read() -> Message:
            nonlocal size, unread
            message = await receive()
            unread = message.get("more_body", False)
            size += (more := len(message.get("body", b"")))
            self._held += more
            if size > self._most:
                raise ApiError(413, f"a request has at most {self._most} bytes", "request_too_large")
            if self._held > BODIES_AT_ONCE * self._most:
                raise busy(1)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", facts["request"].encode())]
            await send(message)

        async def drain() -> None:
            while (await receive()).get("more_body", False):
                pass

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
        finally:
            self._held -= size
        if error and not status:
            facts["error"] = error.code
            self._metrics.errors.labels(error.code).inc()
            if unread:  # a client that still sends would read a reset, not its response
                with suppress(TimeoutError):
                    await asyncio.wait_for(drain(), DRAIN_SECONDS)
            await error.response(scope, receive, answer)
        # The path of the route, not of the request: that one can be anything, and would fill the metrics.
        path, seconds = getattr(scope.get("route"), "path", "other"), time.monotonic() - start
        self._metrics.requests.labels(path, status).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        about = {"method": scope["method"][:16], "path": path, "status": status, "seconds": round(seconds, 4)}
        log.info("request", extra={"facts": about | facts})


def make_app(
    encoder: Encoder,
    name: str,
    options: ServeOptions,
    *,
    keys: Sequence[bytes] = (),
    processes: Sequence[EncoderProcess] = (),
    metrics: Metrics | None = None,
    thread: Executor | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        encoder: Tokenizes; and encodes, in a thread, where there are no ``processes``.
        name: What clients call the model.
        options: Limits.
        keys: API keys; none: every request is allowed.
        processes: Encode in place of ``encoder``.
        metrics: Where to count.
        thread: Where ``encoder`` was opened, and encodes: OpenMP is slow where two threads have run models.
    """
    metrics = metrics or Metrics()
    workers: Sequence[Worker] = processes or [LocalWorker(encoder)]
    threads = ThreadPoolExecutor(len(processes)) if processes else thread or ThreadPoolExecutor(1)
    batcher = Batcher(encoder, workers, threads, options, metrics)
    preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher.running():
            yield
        for process in processes:
            process.close()
        preparing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="secateur", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(RequestMiddleware, metrics=metrics, most=options.max_bytes)
    app.add_exception_handler(HTTPException, _as_api_error)

    async def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        key = given.credentials.encode("latin-1") if given else b""
        if not any([hmac.compare_digest(key, known) for known in keys]):
            message = "no valid API key; send Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    guarded = [Depends(check_key)] if keys else []
    _add_embeddings(app, Requests(encoder, name, options), batcher, preparing, guarded)
    _add_information(app, name, batcher, metrics, guarded)
    return app


def _add_embeddings(
    app: FastAPI, requests: Requests, batcher: Batcher, preparing: Executor, guarded: list[Any]
) -> None:
    content = {"application/json": {"schema": requests.json_schema()}}
    timeout = requests.options.timeout

    @app.post(
        "/v1/embeddings",
        responses=ERROR,
        openapi_extra={"requestBody": {"required": True, "content": content}},
        dependencies=guarded,
    )
    async def embeddings(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send Content-Type: application/json", "unsupported_media_type")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise ApiError(415, "send the body as it is, without Content-Encoding", "unsupported_media_type")
        try:
            body = await asyncio.wait_for(request.body(), timeout)
        except TimeoutError:
            raise ApiError(408, "the body came too slowly", "timeout") from None
        return await _while_connected(request, answer(body, request.state.facts), timeout)

    async def answer(body: bytes, facts: dict[str, Any]) -> Response:
        parsed, texts = await asyncio.get_running_loop().run_in_executor(preparing, requests.prepare, body)
        tokens = sum(map(len, texts))
        facts.update(texts=len(texts), tokens=tokens)
        return await asyncio.to_thread(respond, await batcher.embed(texts), tokens, parsed)


async def _while_connected(request: Request, answer: Coroutine[Any, Any, Response], timeout: float) -> Response:
    """Await a response as long as its client waits for it."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    try:
        await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnect
        raise ApiError(503, f"not done in {timeout:g} s", "timeout", headers={"Retry-After": "1"})
    finally:
        work.cancel()
        gone.cancel()


def _add_information(app: FastAPI, name: str, batcher: Batcher, metrics: Metrics, guarded: list[Any]) -> None:
    card = {"id": name, "object": "model", "created": 0, "owned_by": "secateur"}

    @app.get("/v1/models", responses=ERROR, dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}", responses=ERROR, dependencies=guarded)
    async def one_model(model: str) -> dict[str, Any]:
        if model != name:
            raise ApiError(404, f"no such model; this server has {name}", "model_not_found", "model")
        return card

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=ERROR)
    async def ready() -> dict[str, str]:
        if not batcher.ready:
            raise ApiError(503, "no worker can take requests", "not_ready")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=ERROR, dependencies=guarded)
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")


async def _as_api_error(request: Request, error: Exception) -> NoReturn:
    """Starlette's own errors (no such path, no such method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        takes = (error.headers or {}).get("Allow", "other methods")
        raise ApiError(405, f"this path takes {takes}", "method_not_allowed", headers=error.headers)
    known = ", ".join(request.app.openapi()["paths"])
    raise ApiError(error.status_code, f"no such path; there are {known}", "not_found", headers=error.headers)
