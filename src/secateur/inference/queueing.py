"""Continuous batching: texts of many requests wait in one queue, and go through the model together.

There is no timer. While the model works, texts gather; when it is done, the text that has waited longest is taken
together with those nearest to it in length, as many as the token budget holds. An idle model starts at once.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from secateur.inference.middleware import Metrics, log
from secateur.options import ServeOptions
from secateur.runtime.core import Encoder, Tokens, Vectors

LOOKAHEAD = 1024
"""How many waiting texts are looked at when a batch is made."""

TRIES = 3
"""How often a text is given to the model before its request fails."""

PADDING = 1.1
"""A batch is padded to at most this many times the tokens that its texts would take one by one."""

LONGEST_RETRY = 60
LOOK_SECONDS = 0.5
"""How often an idle worker is checked."""

RESTART_SECONDS = 5.0
"""Seconds between attempts to start a worker that cannot start."""

PATIENCE, LEAST_PATIENCE = 20, 10.0
"""A batch may take this many times as long as the slowest so far, token for token; and always so many seconds."""


class QueueFull(Exception):
    """No room for a request; there should be some after ``retry_after`` seconds."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"the queue is full; try again in {retry_after} s")


class EncodingFailed(Exception):
    """The model failed on the texts of one request, also when they were alone."""


class Worker(Protocol):
    """What encodes batches; ``encode_batch`` and ``restart`` run in one thread at a time."""

    def ready(self) -> bool:
        """Whether it can take a batch; at once."""

    def restart(self) -> None:
        """Make it ready; may take long, and raises where that fails."""

    def encode_batch(self, batch: Sequence[Tokens], timeout: float) -> Vectors:
        """Vectors of texts that share a prompt length, in at most ``timeout`` seconds."""


class LocalWorker:
    """An encoder in this process as a :class:`.Worker`: in a thread, which cannot be ended, however long it takes."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def ready(self) -> bool:
        return True

    def restart(self) -> None:
        pass

    def encode_batch(self, batch: Sequence[Tokens], timeout: float = math.inf) -> Vectors:
        """Vectors of a batch; in smaller parts once such a batch did not fit into memory."""
        return self.encoder.encode_tokens(batch)


@dataclass(eq=False)
class _Request:
    done: asyncio.Future[Vectors]
    vectors: list[Vectors | None]
    missing: int


@dataclass(eq=False)
class _Text:
    tokens: Tokens
    request: _Request
    place: int
    since: float = field(default_factory=time.monotonic)
    tries: int = 0


class Batcher:
    """One queue before one or several workers, for the tasks of one event loop.

    Args:
        encoder: Says how many tokens a batch has, and how many a text when it is padded.
        workers: Each takes batches as long as it is ready.
        threads: Where workers are called: one thread for each.
        options: Tokens in the queue, and the timeout.
        metrics: Where to count.
    """

    def __init__(
        self, encoder: Encoder, workers: Sequence[Worker], threads: Executor, options: ServeOptions, metrics: Metrics
    ) -> None:
        self._encoder = encoder
        self._workers = workers
        self._threads = threads
        self._options = options
        self._metrics = metrics
        self._waiting: dict[_Text, None] = {}  # a set that keeps its order
        self._filled = asyncio.Event()
        self._tokens = 0
        self._rate = 0.0  # tokens per second, of all workers
        self._slowest = 0.0  # seconds per token
        self._tasks: list[asyncio.Task[None]] = []
        metrics.queue_tokens.set_function(lambda: self._tokens)

    @property
    def ready(self) -> bool:
        """Whether a worker takes batches."""
        working = zip(self._workers, self._tasks, strict=False)  # no tasks before the start
        return any(worker.ready() and not task.done() for worker, task in working)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take batches until the end of the block; requests that still wait are cancelled then."""
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in self._workers]
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for text in self._waiting:
                text.request.done.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def embed(self, texts: Sequence[Tokens]) -> Vectors:
        """The vectors (texts, dimension) of one request; cancelled, its texts leave the queue.

        Raises:
            QueueFull: Too many tokens wait already.
            EncodingFailed: The model failed on these texts.
        """
        tokens = sum(map(len, texts))
        if self._tokens and self._tokens + tokens > self._options.queue_tokens:
            seconds = self._tokens / self._rate if self._rate else 1
            raise QueueFull(min(LONGEST_RETRY, max(1, math.ceil(seconds))))
        request = _Request(asyncio.get_running_loop().create_future(), [None] * len(texts), len(texts))
        queued = [_Text(text, request, place) for place, text in enumerate(texts)]
        self._tokens += tokens
        self._waiting.update(dict.fromkeys(queued))
        self._filled.set()
        try:
            return await request.done
        finally:
            self._tokens -= tokens
            for text in queued:
                self._waiting.pop(text, None)

    async def _work(self, worker: Worker) -> None:
        """One worker's batches, one after the other."""
        loop = asyncio.get_running_loop()
        while True:
            if not worker.ready():
                try:
                    await loop.run_in_executor(self._threads, worker.restart)
                except Exception as error:
                    log.error("worker cannot start", extra={"facts": {"problem": str(error)[:300]}})
                    await asyncio.sleep(RESTART_SECONDS)
                continue
            batch = self._take()
            if not batch:
                self._filled.clear()
                with suppress(asyncio.TimeoutError):  # an idle worker may have died
                    await asyncio.wait_for(self._filled.wait(), LOOK_SECONDS)
                continue
            start = time.monotonic()
            tokens = [text.tokens for text in batch]
            try:
                found = await loop.run_in_executor(self._threads, worker.encode_batch, tokens, self._patience(tokens))
                if len(found) != len(batch):
                    raise RuntimeError(f"{len(found)} vectors for {len(batch)} texts")
            except Exception as error:
                # The worker sees tokens only: there is no text in what it says.
                log.error("batch failed", extra={"facts": {"texts": len(batch), "problem": repr(error)[:300]}})
                self._metrics.batch_errors.inc()
                self._retry(batch, error)
            else:
                self._deliver(batch, found)
                self._record(batch, start)

    def _take(self) -> list[_Text]:
        """The next batch, taken out of the queue."""
        ahead = list(itertools.islice(self._waiting, LOOKAHEAD))
        if not ahead:
            return []
        first = ahead[0]
        if first.tries:  # texts that failed with others are tried request by request
            ahead = [text for text in ahead if text.request is first.request]
        same = first.tokens.prompt_length
        ahead = [text for text in ahead if bool(text.tries) == bool(first.tries) and text.tokens.prompt_length == same]
        budget = self._encoder.batch_tokens >> first.tries  # it may have been too large
        batch = self._choose(ahead, budget)
        for text in batch:
            del self._waiting[text]
        return batch

    def _choose(self, waiting: Sequence[_Text], budget: int) -> list[_Text]:
        """The first text, and those nearest to it in length that cost little padding.

        On a CPU many batches of even lengths are quicker than few of mixed ones. A text longer than the budget goes
        alone.
        """
        first, *others = waiting
        chosen, longest = [first], self._encoder.padded_length(len(first.tokens))
        real = longest
        for text in sorted(others, key=lambda text: abs(len(text.tokens) - len(first.tokens))):
            length = self._encoder.padded_length(len(text.tokens))
            if max(longest, length) * (len(chosen) + 1) <= min(budget, PADDING * (real + length)):
                chosen.append(text)
                longest, real = max(longest, length), real + length
        return chosen

    def _patience(self, batch: Sequence[Tokens]) -> float:
        """Seconds that a batch may take; as long as anybody waits, before there was one to compare with."""
        if not self._slowest:
            return self._options.timeout
        return min(self._options.timeout, max(LEAST_PATIENCE, PATIENCE * self._slowest * sum(map(len, batch))))

    def _deliver(self, batch: Sequence[_Text], vectors: Vectors) -> None:
        for text, vector in zip(batch, vectors, strict=True):
            request = text.request
            request.vectors[text.place] = vector
            request.missing -= 1
            if not request.missing and not request.done.done():
                request.done.set_result(np.stack([vector for vector in request.vectors if vector is not None]))

    def _retry(self, batch: Sequence[_Text], error: Exception) -> None:
        """Put a failed batch back in front, except texts that failed too often or that nobody waits for."""
        again: list[_Text] = []
        for text in batch:
            text.tries += 1
            if text.tries < TRIES:
                again.append(text)
            elif not text.request.done.done():
                text.request.done.set_exception(EncodingFailed(f"{type(error).__name__}: {error}"))
        queue = [*again, *self._waiting]
        self._waiting = {text: None for text in queue if not text.request.done.done()}
        self._filled.set()

    def _record(self, batch: Sequence[_Text], start: float) -> None:
        seconds = time.monotonic() - start
        tokens = sum(len(text.tokens) for text in batch)
        rate = tokens / max(seconds, 1e-6) * len(self._workers)
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate
        self._slowest = max(self._slowest, seconds / tokens)
        self._metrics.texts.inc(len(batch))
        self._metrics.tokens.inc(tokens)
        self._metrics.batch_texts.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_seconds.observe(seconds)
        for text in batch:
            self._metrics.queue_seconds.observe(start - text.since)
