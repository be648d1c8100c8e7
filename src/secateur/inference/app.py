"""The server as an ASGI application: ``POST /v1/embeddings``, ``GET /v1/models``, health and metrics.

A request goes through four stations: :class:`.Gate` (key, size, time; for every path alike), :func:`.prepare` (JSON to
tokens, in one thread), :class:`.Batcher` (tokens to vectors, together with other requests) and :func:`.respond`
(vectors to JSON, piece by piece). What waits anywhere is bounded. Texts are never logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from secateur.errors import SecateurError
from secateur.inference.embeddings import (
    EmbeddingList,
    ErrorBody,
    ModelCard,
    ModelList,
    prepare,
    request_schema,
    respond,
    shorten,
)
from secateur.inference.gate import ApiError, ClientLeft, Gate, Keys, Limits, Metrics, busy, log
from secateur.inference.queueing import Batcher, EncodingFailed, QueueFull, Worker
from secateur.inference.workers import EncoderDied, EncoderProcess
from secateur.runtime.core import Encoder, Tokens, Vectors

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A request that cannot be answered."},
    401: {"model": ErrorBody, "description": "No valid API key."},
    404: {"model": ErrorBody, "description": "No such model."},
    408: {"model": ErrorBody, "description": "The request came too slowly."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "The body is not application/json, or compressed."},
    429: {"model": ErrorBody, "description": "Too much waits already; Retry-After says for how long."},
    500: {"model": ErrorBody, "description": "The model failed on these texts."},
    503: {"model": ErrorBody, "description": "Not in time."},
}


@dataclass(frozen=True)
class _Service:
    """What the paths share."""

    encoder: Encoder
    name: str
    limits: Limits
    batcher: Batcher
    preparing: Executor

    async def answer(self, body: bytes, facts: dict[str, Any]) -> Response:
        """A request's body made into the response; ``facts`` are told how much it was."""
        reading = partial(prepare, body, self.encoder, self.name, self.limits)
        prepared = await asyncio.get_running_loop().run_in_executor(self.preparing, reading)
        tokens = sum(map(len, prepared.texts))
        facts.update(texts=len(prepared.texts), tokens=tokens)
        vectors = await self.batcher.embed(prepared.texts)
        return respond(shorten(vectors, prepared.dimensions), self.name, tokens, prepared.as_base64)


def _in_thread(thread: Executor | None, encoder: Encoder) -> Worker:
    def encode(batch: Sequence[Tokens], _: float) -> Vectors:  # a thread cannot be ended, however long it takes
        return thread.submit(encoder.encode_batch, batch).result() if thread else encoder.encode_batch(batch)

    return Worker(encode)


def _worker(process: EncoderProcess[Vectors]) -> Worker:
    def revive() -> None:
        try:
            process.restart()
        except (SecateurError, EncoderDied, OSError) as error:
            if not process.closed:
                log.error("encoder cannot start", extra={"facts": {"problem": str(error)[:300]}})

    return Worker(process.encode_batch, process.ready, revive)


def make_app(
    encoder: Encoder,
    name: str,
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    processes: Sequence[EncoderProcess[Vectors]] = (),
    metrics: Metrics | None = None,
    thread: Executor | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        encoder: Tokenizes; and encodes, in a thread, where there are no ``processes``.
        name: What clients call the model.
        limits: What is taken.
        keys: API keys; none: everybody is served.
        processes: Encode in place of ``encoder``, each batch in one of them.
        metrics: Where to count.
        thread: Where ``encoder`` was opened, and encodes: OpenMP is slow where two threads have run models.
    """
    limits, keys, metrics = limits or Limits(), keys or Keys(), metrics or Metrics()
    batcher = Batcher(
        [_worker(process) for process in processes] or [_in_thread(thread, encoder)],
        max_length=encoder.max_length,
        batch_tokens=limits.batch_tokens,
        queue_tokens=limits.queue_tokens,
        timeout=limits.timeout,
        observe=metrics.observe,
    )
    metrics.queue_tokens.set_function(lambda: batcher.tokens)
    preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.close()
        for process in processes:
            process.close()
        preparing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="secateur", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, keys=keys, limits=limits, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_error)
    guarded = [Depends(HTTPBearer(auto_error=False))] if keys else []  # told in the schema; the gate is what checks
    _add_embeddings(app, _Service(encoder, name, limits, batcher, preparing), guarded)
    _add_models(app, name, guarded)
    _add_health(app, batcher)
    _add_metrics(app, metrics, guarded)
    return app


def _add_embeddings(app: FastAPI, service: _Service, guarded: list[Any]) -> None:
    content = {"application/json": {"schema": request_schema(service.encoder, service.name, service.limits)}}

    @app.post(
        "/v1/embeddings",
        responses={200: {"model": EmbeddingList}, **_ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": content}},
        dependencies=guarded,
    )
    async def embeddings(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send Content-Type: application/json", code="unsupported_media_type")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise ApiError(415, "send the body as it is, without Content-Encoding", code="unsupported_media_type")
        answer = service.answer(await request.body(), request.state.facts)
        return await _while_connected(request, answer, service.limits.timeout)


def _add_models(app: FastAPI, name: str, guarded: list[Any]) -> None:
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


def _add_health(app: FastAPI, batcher: Batcher) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: _ERRORS[503]})
    async def ready() -> dict[str, str]:
        if not batcher.ready:
            raise ApiError(503, "no encoder can take work", code="not_ready")
        return {"status": "ready"}


def _add_metrics(app: FastAPI, metrics: Metrics, guarded: list[Any]) -> None:
    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: _ERRORS[401]},
        dependencies=guarded,
    )
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")


async def _http_error(request: Request, error: Exception) -> NoReturn:
    """Starlette's own errors (no such path, no such method) as the gate's, which counts and logs them."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        takes = (error.headers or {}).get("Allow", "other methods")
        raise ApiError(405, f"this path takes {takes}", code="method_not_allowed", headers=error.headers)
    routes = [route for route in request.app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    known = ", ".join(f"{' '.join(route.methods or ())} {route.path_format}" for route in routes)
    raise ApiError(error.status_code, f"no such path; there are {known}", code="not_found", headers=error.headers)


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
            raise ClientLeft
        raise ApiError(503, f"not done in {timeout:g} s", code="timeout", headers={"Retry-After": "1"})
    except QueueFull as error:
        raise busy(error.retry_after) from None
    except EncodingFailed:
        raise ApiError(500, "the model failed on these texts", code="encoding_failed") from None
    finally:
        work.cancel()
        gone.cancel()
