"""Continuous batching: texts of many requests wait in one queue, and go through the model together.

There is no timer. While the model works, texts gather; when it is done, the text that has waited longest is taken
together with others of about its length, as many as the token budget holds. An idle model starts at once.
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

import numpy as np

from secateur.inference.monitoring import ApiError, Metrics, busy, log
from secateur.inference.workers import TRIES, EncoderProcess
from secateur.options import ServeOptions
from secateur.runtime.core import FULL_RATE, LENGTH_STEP, Encoder, Tokens, Vectors, plan_batches

LOOKAHEAD = 1024
"""How many waiting texts are looked at when a batch is made."""
PADDING = 1.1
"""A batch is padded to at most this many times the tokens that its texts would take one by one."""
LONGEST_RETRY = 60
"""Seconds after which a refused client may come again, at most."""
LOOK_SECONDS = 0.5
"""How often an idle worker is checked."""
RESTART_SECONDS = 5.0
"""Seconds between attempts to start a worker that cannot start."""
PATIENCE, LEAST_PATIENCE = 20, 10.0
"""A batch may take this many times as long as the slowest so far, token for token (a small one counts as of
:data:`FULL_RATE`); and always so many seconds, or a quarter of what a request may take."""


class LocalWorker:
    """An encoder in a thread of this process, where an :class:`.EncoderProcess` could be; it cannot be ended."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        encoder.padding, encoder.length_step = math.inf, LENGTH_STEP  # the queue makes batches, of any lengths

    def ready(self) -> bool:
        return True

    def restart(self) -> None:
        pass

    def encode_batch(self, batch: Sequence[Tokens], timeout: float | None = None) -> Vectors:
        """Vectors of a batch; in smaller parts once such a batch did not fit into memory."""
        return self.encoder.encode_tokens(batch)


Worker = LocalWorker | EncoderProcess


@dataclass(eq=False)
class _Text:
    tokens: Tokens
    vector: asyncio.Future[Vectors]
    since: float = field(default_factory=time.monotonic)
    tries: int = 0


class Batcher:
    """One queue before one or several workers, for the tasks of one event loop.

    ``encoder`` says how many tokens a batch has, and how many a text when it is padded; ``workers`` are called in
    ``threads``, one for each, as long as they are ready.
    """

    def __init__(
        self, encoder: Encoder, workers: Sequence[Worker], threads: Executor, options: ServeOptions, metrics: Metrics
    ) -> None:
        self._encoder, self._workers, self._threads = encoder, workers, threads
        self._options, self._metrics = options, metrics
        self._waiting: dict[_Text, None] = {}  # a set that keeps its order
        self._filled = asyncio.Event()
        self._tokens = 0
        self._rate = 0.0  # tokens per second, of all workers
        self._slowest = 0.0  # seconds per token
        metrics.queue_tokens.set_function(lambda: self._tokens)

    @property
    def ready(self) -> bool:
        """Whether a worker takes batches."""
        return any(worker.ready() for worker in self._workers)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take batches until the end of the block; requests that still wait are cancelled then."""
        tasks = [asyncio.create_task(self._work(worker)) for worker in self._workers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for text in self._waiting:
                text.vector.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def embed(self, texts: Sequence[Tokens]) -> Vectors:
        """The vectors (texts, dimension) of one request; cancelled, its texts leave the queue.

        Raises:
            ApiError: Too many tokens wait already (429), or the model fails on one of these texts (500).
        """
        tokens = sum(map(len, texts))
        if self._tokens and self._tokens + tokens > self._options.queue_tokens:
            seconds = self._tokens / self._rate if self._rate else 1
            raise busy(min(LONGEST_RETRY, max(1, math.ceil(seconds))))
        loop = asyncio.get_running_loop()
        queued = [_Text(text, loop.create_future()) for text in texts]
        self._tokens += tokens
        self._waiting.update(dict.fromkeys(queued))
        self._filled.set()
        try:
            return np.stack(await asyncio.gather(*(text.vector for text in queued)))
        finally:
            self._tokens -= tokens
            for text in queued:
                text.vector.cancel()
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
                with suppress(TimeoutError):  # an idle worker may have died
                    await asyncio.wait_for(self._filled.wait(), LOOK_SECONDS)
                continue
            start = time.monotonic()
            tokens = [text.tokens for text in batch]
            try:
                vectors = await loop.run_in_executor(self._threads, worker.encode_batch, tokens, self._timeout(tokens))
            except Exception as error:
                # The worker sees tokens only: there is no text in what it says.
                log.error("batch failed", extra={"facts": {"texts": len(batch), "problem": repr(error)[:300]}})
                self._metrics.batch_errors.inc()
                self._retry(batch)
                continue
            for text, vector in zip(batch, vectors, strict=True):
                if not text.vector.done():
                    text.vector.set_result(vector)
            self._record(batch, start)

    def _take(self) -> list[_Text]:
        """The next batch, taken out of the queue: the first text, and others of about its length.

        Texts of a batch that failed go in smaller batches, and at last alone: so a text that breaks the model fails
        only its own request.
        """
        if not self._waiting:
            return []
        first, *others = itertools.islice(self._waiting, LOOKAHEAD)
        alike = first.tries, first.tokens.prompt_length
        texts = [first, *(text for text in others if (text.tries, text.tokens.prompt_length) == alike)]
        lengths = [self._encoder.padded_length(len(text.tokens)) for text in texts]
        size = 1 if first.tries == TRIES - 1 else None
        plan = plan_batches(lengths, self._encoder.batch_tokens >> first.tries, PADDING, size, full=0)
        places = next(places for places in plan if 0 in places)
        batch = [texts[place] for place in places]
        for text in batch:
            del self._waiting[text]
        return batch

    def _timeout(self, batch: Sequence[Tokens]) -> float:
        """Seconds that a batch may take: so few that it can be repeated before those who wait for it give up."""
        longest = self._options.timeout / 2
        if not self._slowest:
            return longest
        least = min(LEAST_PATIENCE, longest / 2)
        return min(longest, max(least, PATIENCE * self._slowest * sum(map(len, batch))))

    def _retry(self, batch: Sequence[_Text]) -> None:
        """Put a failed batch back in front, except texts that failed too often or that nobody waits for."""
        for text in batch:
            text.tries += 1
            if text.tries == TRIES and not text.vector.done():
                text.vector.set_exception(ApiError(500, "the model failed on these texts", "encoding_failed"))
        again = [text for text in batch if not text.vector.done()]
        self._waiting = dict.fromkeys([*again, *self._waiting])
        self._filled.set()

    def _record(self, batch: Sequence[_Text], start: float) -> None:
        seconds = time.monotonic() - start
        tokens = sum(len(text.tokens) for text in batch)
        rate = tokens / max(seconds, 1e-6) * len(self._workers)
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate
        self._slowest = max(self._slowest, seconds / max(tokens, FULL_RATE))
        self._metrics.texts.inc(len(batch))
        self._metrics.tokens.inc(tokens)
        self._metrics.batch_texts.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_seconds.observe(seconds)
        for text in batch:
            self._metrics.queue_seconds.observe(start - text.since)
