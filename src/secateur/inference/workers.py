"""Encoders in processes of their own, on this machine or on a Ray cluster; those that die or hang are replaced."""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

from secateur.clusters import ray_cluster, ray_share
from secateur.errors import ModelError, SecateurError
from secateur.inference.opening import Opening, open_encoder
from secateur.runtime.core import OnBatch, Vectors, is_out_of_memory

TRIES = 3
"""How often some texts are given to a worker before the run fails."""
LEAVING_SECONDS = 2.0
"""What a process has to give back what it holds of the system, before it is killed."""
BEAT_SECONDS = 0.5
"""How often a process shows that it runs, and how often that is looked at."""
SILENT_SECONDS = 10.0
"""A process of a server that shows no sign of life for so long hangs."""
LONG_SILENCE = 120.0
"""The same where no client waits, and before the encoder has been made: while Python imports a large library, no other
thread of the process runs."""

Piece = tuple[int, Sequence[str]]
Encoded = tuple[int, Vectors, int]
Run = Callable[[Iterable[Piece], OnBatch], Iterator[tuple[int, Vectors]]]
"""Numbered pieces of work in, their numbers and vectors out, in any order; pieces are taken as they are needed.

A worker elsewhere reports its work when a piece is done.
"""


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for the tensors of the next batch, which are as large.

    Else glibc gives them back after each use, and each time the kernel clears every page anew; in threads other than
    the first one always (a fifth of the time, measured). For processes that do nothing but encode; other C libraries
    are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that it takes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX


class EncoderDied(RuntimeError):
    """The process of an encoder ended in the middle of a batch, or before it could take one."""


class EncoderProcess:
    """An encoder in a process of its own, killed when it hangs, and replaced at the next batch when it is dead.

    ``concurrent.futures`` never sees that a process hangs.

    Args:
        make: Makes the encoder in the new process, which has a method ``encode_batch``; it must be picklable.
        on_restart: Called when a dead process is replaced.
        silence: Seconds without a sign of life after which the process is killed, once its encoder has been made.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        on_restart: Callable[[], None] = lambda: None,
        silence: float = LONG_SILENCE,
    ) -> None:
        self._make, self._on_restart, self._silence = make, on_restart, silence
        self.closed = False
        self._start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def ready(self) -> bool:
        """Whether the process lives and its encoder has been made; called twice a second, it kills one that hangs."""
        self._kill_if_silent()
        return self._loaded and self._process.is_alive()

    def restart(self) -> None:
        """Replace the process if it is dead, and wait until its encoder has been made; in the thread of
        :meth:`encode_batch`.

        Raises:
            SecateurError: The encoder cannot be made; says why.
            EncoderDied: The process ended before it was.
        """
        with self._death_told():
            self._wait_until_made()

    def encode_batch(self, batch: Any, timeout: float = math.inf) -> Any:
        """What the encoder makes of a batch; used by one thread. After ``timeout`` seconds the process is killed.

        Raises:
            SecateurError: The encoder cannot be made; says why.
            EncoderDied: The process ended, or hung and was killed.
            RuntimeError: The encoder failed on this batch.
        """
        with self._death_told():
            self._wait_until_made()
            self._pipe.send(batch)
            answer = self._receive(timeout)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process; a batch in it is lost."""
        if not self.closed:
            self.closed = True
            self._process.terminate()
            self._process.join(LEAVING_SECONDS)
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._loaded, self._fault = False, ""
        self._beats, self._beat, self._silent, self._looked = context.RawValue("Q", 0), 0, 0.0, time.monotonic()
        self._process = context.Process(target=_serve, args=(theirs, self._make, self._beats), daemon=True)
        with _no_interrupt():
            self._process.start()
        theirs.close()

    def _receive(self, timeout: float = math.inf) -> Any:
        deadline = time.monotonic() + timeout
        while not self._pipe.poll(BEAT_SECONDS):
            if time.monotonic() > deadline:
                self._fault = "was at one batch for too long"
                self._process.kill()
            self._kill_if_silent()
        return self._pipe.recv()

    def _kill_if_silent(self) -> None:
        """Kill a process that hangs; then the other end of the pipe is closed.

        Silence is counted in looks, not by the clock: when all of the server was stopped (Ctrl-Z) nobody hung.
        """
        beat, now = self._beats.value, time.monotonic()
        waited = min(now - self._looked, BEAT_SECONDS)
        self._silent = self._silent + waited if beat == self._beat else 0.0
        self._beat, self._looked = beat, now
        if self._silent > (self._silence if self._loaded else LONG_SILENCE) and self._process.is_alive():
            self._fault = f"showed no sign of life for {self._silent:.0f} s"
            self._process.kill()

    def _wait_until_made(self) -> None:
        if not self._process.is_alive() and not self.closed:
            self._pipe.close()
            self._start()
            self._on_restart()
            if self.closed:  # by another thread, just now
                self._process.kill()
        if not self._loaded:
            problem: str | None = self._receive()
            if problem is not None:
                self._process.join(LEAVING_SECONDS)
                raise SecateurError(problem)
            self._loaded = True

    @contextmanager
    def _death_told(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):  # the other end of the pipe is closed
            self._process.kill()
            self._process.join()
            end = self._fault or f"ended with code {self._process.exitcode}"
            raise EncoderDied(f"an encoder process {end}") from None


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keep Ctrl-C, which reaches all processes of a terminal, from those started here; who started them ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting the first process would; it lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, make: Callable[[], Any], beats: Any) -> None:
    """The life of an encoder process: what was wrong with the encoder, or None; then batches in, answers out.

    It ends when the other end is closed, or at SIGTERM, when it gives back what it holds of the system.
    """

    def beat() -> None:
        for beats.value in itertools.count(1):
            time.sleep(BEAT_SECONDS / 2)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    Finalize(None, pipe.close, exitpriority=-1)  # all else is given back; libraries, slow to end, wait
    keep_freed_memory()
    threading.Thread(target=beat, name="beat", daemon=True).start()
    with suppress(EOFError, OSError):
        try:
            encoder = make()
        except Exception as error:
            pipe.send(str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}")
            return
        pipe.send(None)
        while True:
            batch = pipe.recv()
            try:
                answer = encoder.encode_batch(batch)
            except Exception as error:
                # So that it is known for what it is on the other side, where it is but a text.
                kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
                answer = f"{kind}: {error}"
            pipe.send(answer)


class TextEncoder:
    """An encoder elsewhere: a numbered piece of texts in; its number, vectors, and how many tokens it had out."""

    def __init__(self, opening: Opening, prompt: str) -> None:
        keep_freed_memory()
        self._encoder, self._prompt = open_encoder(opening), prompt

    def encode_batch(self, piece: Piece) -> Encoded:
        number, texts = piece
        tokens: list[int] = []
        vectors = self._encoder.encode_texts(texts, self._prompt, lambda _, some: tokens.append(some))
        return number, vectors, sum(tokens)


@contextmanager
def in_processes(opening: Opening, prompt: str, processes: int) -> Iterator[Run]:
    """Encode in processes of this machine, each with the model in memory and its share of the threads."""
    share = opening.threads or max(1, (os.cpu_count() or 1) // processes)
    make = partial(TextEncoder, replace(opening, threads=share), prompt)
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(EncoderProcess(make))) for _ in range(processes)]
        with _together(opening.model, [worker.encode_batch for worker in workers]) as run:
            yield run


@contextmanager
def on_ray(opening: Opening, prompt: str, address: str, actors: int) -> Iterator[Run]:
    """Encode on a Ray cluster (:func:`.ray_cluster`), where the model must be found under its name on every machine.

    Ray starts actors that die anew, elsewhere if need be; a single one means one for each machine.
    """
    with ray_cluster(address) as ray, ExitStack() as stack:
        actors = actors if actors > 1 else sum(node["Alive"] for node in ray.nodes())
        cores, gpus = ray_share(ray, actors)
        actor = ray.remote(TextEncoder).options(
            num_cpus=cores,
            num_gpus=0 if opening.device == "cpu" else gpus,
            max_restarts=-1,
            max_task_retries=TRIES - 1,
        )
        workers = [actor.remote(replace(opening, threads=opening.threads or cores), prompt) for _ in range(actors)]
        for worker in workers:
            stack.callback(ray.kill, worker)

        def encode(worker: Any, piece: Piece) -> Encoded:
            try:
                found: Encoded = ray.get(worker.encode_batch.remote(piece))
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ModelError(opening.model, f"the workers failed ({lines[-1][:300]})") from error
            return found

        with _together(opening.model, [partial(encode, worker) for worker in workers]) as run:
            yield run


@contextmanager
def _together(model: str, workers: Sequence[Callable[[Piece], Encoded]]) -> Iterator[Run]:
    """Give each piece to a worker that is idle, and again where the worker dies with it.

    Raises:
        ModelError: A worker cannot open the model, fails on some texts, or dies with them for the third time.
    """
    idle: queue.SimpleQueue[Callable[[Piece], Encoded]] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(piece: Piece) -> Encoded:
        died = ""
        for _ in range(TRIES):
            worker = idle.get()
            try:
                return worker(piece)
            except EncoderDied as error:
                died = str(error)
            except RuntimeError as error:
                raise ModelError(model, str(error)) from None
            finally:
                idle.put(worker)
        problem = f"{died}, {TRIES} times on the same {len(piece[1])} texts"
        raise ModelError(model, problem, "too little memory? Fewer --processes need less")

    def run(pieces: Iterable[Piece], on_batch: OnBatch) -> Iterator[tuple[int, Vectors]]:
        running: set[Future[Encoded]] = set()
        for piece in itertools.chain(pieces, itertools.repeat(None)):
            if piece is not None:
                running.add(threads.submit(encode, piece))
                if len(running) < 2 * len(workers):
                    continue
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for number, vectors, tokens in (future.result() for future in finished):
                on_batch(len(vectors), tokens)
                yield number, vectors

    threads = ThreadPoolExecutor(len(workers), thread_name_prefix="worker")
    try:
        yield run
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # what is at work ends with its worker
