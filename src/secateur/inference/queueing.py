"""Dynamic batching: texts of many requests wait in one queue, and go through the model together.

There is no timer. While the model works, texts gather; when it is done, the longest waiting text is taken together with
those nearest to it in length, as many as the token budget holds. An idle model starts at once.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from secateur.models.forward import padded_length
from secateur.runtime.core import LENGTH_STEP, Tokens, Vectors, halves, is_out_of_memory

LOOKAHEAD = 1024
"""How many waiting texts are looked at when a batch is made."""

TRIES = 3
"""How often a text is given to the model before its request fails."""

PADDING = 1.1
"""A batch is padded to at most this many times the tokens that its texts would take one by one."""

LONGEST_RETRY = 60

LOOK_SECONDS = 0.5
"""How often an idle worker is looked at."""

PATIENCE = 20
"""A batch that takes this many times as long as the slowest so far, token for token, hangs."""

LEAST_PATIENCE = 10.0
"""Seconds that a batch may always take: what is short can be held up by anything."""

REVIVE_SECONDS = 5.0
"""How long a worker that could not be made ready is left alone."""


class QueueFull(Exception):
    """No room for a request; there should be some after ``retry_after`` seconds."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"the queue is full; try again in {retry_after} s")


class EncodingFailed(Exception):
    """The model failed on the texts of one request, also when they were alone."""


@dataclass(frozen=True)
class Batch:
    """What one pass of the model did: how many texts and tokens, seconds in it, and seconds that each text waited."""

    texts: int
    tokens: int
    seconds: float
    waits: tuple[float, ...]
    error: Exception | None = None


@dataclass(eq=False)
class _Job:
    """The texts of one request."""

    done: asyncio.Future[Vectors]
    vectors: list[Vectors | None]
    missing: int


@dataclass(eq=False)
class _Item:
    """One text of a job."""

    tokens: Tokens
    job: _Job
    place: int
    since: float = field(default_factory=time.monotonic)
    tries: int = 0


def choose_batch(waiting: Sequence[Tokens], budget: int, max_length: int) -> list[int]:
    """Which of the waiting texts go through the model together.

    The first always does; the others have its prompt length, are nearest to it in length, and cost little padding:
    on a CPU many batches of even lengths are quicker than few of mixed ones.

    Args:
        waiting: Texts, the longest waiting first.
        budget: Tokens of the batch, padding included; a longer text goes alone.
        max_length: Tokens that the model reads.
    """
    first = waiting[0]
    near = [i for i, tokens in enumerate(waiting) if i and tokens.prompt_length == first.prompt_length]
    near.sort(key=lambda i: abs(len(waiting[i]) - len(first)))
    chosen, width = [0], padded_length(len(first), max_length, LENGTH_STEP)
    alone = width
    for i in near:
        own = padded_length(len(waiting[i]), max_length, LENGTH_STEP)
        padded = max(width, own) * (len(chosen) + 1)
        if padded <= min(budget, PADDING * (alone + own)):
            width, alone = max(width, own), alone + own
            chosen.append(i)
    return chosen


@dataclass(frozen=True)
class Worker:
    """What takes batches; its functions run in one thread at a time, but for ``ready``.

    Args:
        encode: Texts of one prompt length to vectors; the second argument is how many seconds it may take.
        ready: Whether it can take a batch; at once.
        revive: Tries to make it ready, and takes its time.
    """

    encode: Callable[[Sequence[Tokens], float], Vectors]
    ready: Callable[[], bool] = lambda: True
    revive: Callable[[], None] = lambda: None


class Batcher:
    """One queue before one or several workers, for the tasks of one event loop.

    Args:
        workers: Each takes batches as long as it is ready, in a thread of its own.
        max_length: Tokens in a text.
        batch_tokens: Tokens in a pass of the model, padding included.
        queue_tokens: Tokens that may wait or be encoded; more are refused.
        timeout: Seconds after which nobody waits for an answer any more.
        observe: Told of every batch.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_length: int,
        batch_tokens: int,
        queue_tokens: int,
        timeout: float = math.inf,
        observe: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self._workers = workers
        self._max_length = max_length
        self._batch_tokens = batch_tokens
        self._queue_tokens = queue_tokens
        self._timeout = timeout
        self._observe = observe
        self._waiting: dict[_Item, None] = {}  # in order; a set that keeps it
        self._filled = asyncio.Event()
        self._tokens = 0
        self._rate = 0.0
        self._slowest = 0.0  # seconds for a token
        self._threads = ThreadPoolExecutor(len(workers), thread_name_prefix="encoder")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def tokens(self) -> int:
        """Tokens that wait or are being encoded."""
        return self._tokens

    @property
    def ready(self) -> bool:
        """Whether a worker takes batches."""
        working = zip(self._workers, self._tasks, strict=False)  # no tasks before the start
        return any(worker.ready() and not task.done() for worker, task in working)

    def start(self) -> None:
        """Begin to take batches; in the event loop."""
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in self._workers]
        self._tasks.append(asyncio.create_task(self._look()))

    async def close(self) -> None:
        """Stop taking batches. Who waited waits no more: their tasks are cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for item in self._waiting:
            item.job.done.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def embed(self, texts: Sequence[Tokens]) -> Vectors:
        """The vectors (texts, dimension) of one request; cancelled, its texts leave the queue.

        Raises:
            QueueFull: Too many tokens wait already.
            EncodingFailed: The model failed on these texts.
        """
        tokens = sum(map(len, texts))
        if self._tokens and self._tokens + tokens > self._queue_tokens:
            seconds = self._tokens / self._rate if self._rate else 1
            raise QueueFull(min(LONGEST_RETRY, max(1, math.ceil(seconds))))
        job = _Job(asyncio.get_running_loop().create_future(), [None] * len(texts), len(texts))
        items = [_Item(text, job, place) for place, text in enumerate(texts)]
        self._tokens += tokens
        self._waiting.update(dict.fromkeys(items))
        self._filled.set()
        try:
            return await job.done
        finally:
            self._tokens -= tokens
            for item in items:
                self._waiting.pop(item, None)

    async def _work(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._readiness(worker)
            await self._filled.wait()
            if not worker.ready():
                continue
            batch = self._take()
            if not batch:
                self._filled.clear()
                continue
            start = time.monotonic()
            error: Exception | None = None
            try:
                tokens = [item.tokens for item in batch]
                vectors = await loop.run_in_executor(self._threads, self._encode, worker, tokens)
                if len(vectors) != len(batch):
                    raise RuntimeError(f"{len(vectors)} vectors for {len(batch)} texts")
                self._deliver(batch, vectors)
            except Exception as caught:
                error = caught
                self._again(batch, caught)
            self._record(batch, start, error)

    def _encode(self, worker: Worker, batch: Sequence[Tokens]) -> Vectors:
        """One pass of the model; as many as it takes where a batch is too large for the memory."""
        try:
            return worker.encode(batch, self._patience(batch))
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        # Not while the error is handled: it holds on to what filled the memory.
        smaller = max(self._max_length, self._batch_tokens // 2)  # never so small that a passing need of others stays
        self._batch_tokens = min(self._batch_tokens, smaller)
        return np.concatenate([self._encode(worker, [batch[i] for i in rows]) for rows in halves(range(len(batch)))])

    def _patience(self, batch: Sequence[Tokens]) -> float:
        """Seconds that a batch may take, by what others have taken; as long as somebody waits, before there was one."""
        if not self._slowest:
            return self._timeout
        return min(self._timeout, max(LEAST_PATIENCE, PATIENCE * self._slowest * sum(map(len, batch))))

    async def _look(self) -> None:
        """Wake the workers now and then: an idle one may have died."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._filled.set()

    async def _readiness(self, worker: Worker) -> None:
        while not worker.ready():
            await asyncio.get_running_loop().run_in_executor(self._threads, worker.revive)
            if not worker.ready():
                await asyncio.sleep(REVIVE_SECONDS)

    def _take(self) -> list[_Item]:
        """The next batch, taken out of the queue."""
        ahead = list(itertools.islice(self._waiting, LOOKAHEAD))
        if not ahead:
            return []
        # What failed with others is tried alone, so that one request's texts cannot fail another's.
        first = ahead[0]
        ahead = [item for item in ahead if item.job is first.job] if first.tries else [i for i in ahead if not i.tries]
        budget = self._batch_tokens >> first.tries  # it may have been too large: who has too little memory is killed
        chosen = choose_batch([item.tokens for item in ahead], budget, self._max_length)
        batch = [ahead[i] for i in chosen]
        for item in batch:
            del self._waiting[item]
        return batch

    def _deliver(self, batch: Sequence[_Item], vectors: Vectors) -> None:
        for item, vector in zip(batch, vectors, strict=True):
            job = item.job
            job.vectors[item.place] = vector
            job.missing -= 1
            if not job.missing and not job.done.done():
                job.done.set_result(np.stack([vector for vector in job.vectors if vector is not None]))

    def _again(self, batch: Sequence[_Item], error: Exception) -> None:
        """Put a failed batch back in front, except what has failed too often or is waited for no more."""
        again: dict[_Item, None] = {}
        for item in batch:
            item.tries += 1
            if item.job.done.done():
                continue
            if item.tries < TRIES:
                again[item] = None
            else:
                item.job.done.set_exception(EncodingFailed(f"{type(error).__name__}: {error}"))
        self._waiting = {item: None for item in [*again, *self._waiting] if not item.job.done.done()}
        self._filled.set()

    def _record(self, batch: Sequence[_Item], start: float, error: Exception | None) -> None:
        seconds = time.monotonic() - start
        tokens = sum(len(item.tokens) for item in batch)
        if error is None:
            rate = tokens / max(seconds, 1e-6) * len(self._workers)
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
            self._slowest = max(self._slowest, seconds / tokens)
        self._observe(Batch(len(batch), tokens, seconds, tuple(start - item.since for item in batch), error))
