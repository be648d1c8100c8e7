"""Encoders in processes of their own, here or on Ray; those that die are replaced, and those of a server that hang."""

from __future__ import annotations

import ctypes
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import torch

from secateur.clusters import ray_cluster, ray_share
from secateur.errors import ModelError, SecateurError
from secateur.inference.backends import open_encoder
from secateur.inference.encoders import Opening
from secateur.runtime.core import OnBatch, Vectors, is_out_of_memory

TRIES = 3
"""How often some texts are given to a worker before the run fails."""
OPENING_SECONDS = 900.0
"""A process that has not opened its model by then hangs."""
LEAVING_SECONDS = 2.0
"""What a process has to end by itself before it is killed."""

Encode = Callable[[Sequence[str]], tuple[Vectors, int]]
"""Texts in; their vectors out, and how many tokens they had."""
Read = Callable[[int], Sequence[str]]
"""The texts of a piece, by its number."""
Pieces = Generator[tuple[int, Vectors], None, None]
Run = Callable[[Sequence[int], Read, OnBatch], Pieces]
"""Numbers of pieces in; their numbers and vectors out, in any order."""


def keep_freed_memory() -> None:
    """Have this process, which does nothing but encode, keep what it frees for the tensors of the next batch.

    Else glibc gives them back after each use, and the kernel clears every page anew (a fifth of the time, measured).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that it takes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX


class EncoderDied(RuntimeError):
    """The process of an encoder ended, or was killed because it hung."""


class EncoderProcess:
    """An encoder in a process of its own, killed when it hangs, and replaced at the next batch when it is dead.

    Those of ``concurrent.futures`` live on when this process is killed.

    Args:
        make: Makes the encoder in the new process, which has a method ``encode_batch``; it must be picklable.
        on_restart: Called when a dead process is replaced.
    """

    _process: BaseProcess
    _loaded: bool

    def __init__(self, make: Callable[[], Any], on_restart: Callable[[], None] = lambda: None) -> None:
        self._make, self._on_restart = make, on_restart
        self.closed, self._changing = False, threading.Lock()
        self._start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def ready(self) -> bool:
        """Whether the process lives, and can take a batch."""
        return self._loaded and self._process.is_alive()

    def restart(self) -> None:
        """Replace the process if it is dead, and wait until its encoder has been made; as :meth:`encode_batch`."""
        with self._changing:
            if not self._process.is_alive() and not self.closed:
                self._pipe.close()
                self._start()
                self._on_restart()
        if not self._loaded:
            problem: str | None = self._receive(OPENING_SECONDS)
            if problem is not None:
                self._process.join(LEAVING_SECONDS)
                raise SecateurError(problem)
            self._loaded = True

    def encode_batch(self, batch: Any, timeout: float | None = None) -> Any:
        """What the encoder makes of a batch; for one thread at a time.

        Raises:
            SecateurError: The encoder cannot be made; says why.
            EncoderDied: The process ended, or was killed after ``timeout`` seconds.
            RuntimeError: The encoder failed on this batch.
        """
        self.restart()
        with suppress(OSError):  # of a process that has just died, which is told below
            self._pipe.send(batch)
        answer = self._receive(timeout)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process; a batch in it is lost."""
        with self._changing:  # a process that is being started could not be ended yet
            if not self.closed:
                self.closed = True
                self._process.terminate()
                self._process.join(LEAVING_SECONDS)
                self._process.kill()
                self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._loaded = False
        self._process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        with _no_interrupt(), _without_script():
            self._process.start()
        theirs.close()

    def _receive(self, timeout: float | None) -> Any:
        hung = False
        with suppress(EOFError, OSError):  # the other end of the pipe is closed
            if self._pipe.poll(timeout):
                return self._pipe.recv()
            hung = True
        self._process.kill()
        self._process.join()
        end = "was at work for too long" if hung else f"ended with code {self._process.exitcode}"
        raise EncoderDied(f"an encoder process {end}")


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keep Ctrl-C, which reaches all processes of a terminal, from those started here: they are ended by this one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting the first process would; it lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_script() -> Iterator[None]:
    """Keep multiprocessing from running the user's script in each process that is started: nothing is needed of it.

    One thread at a time: of two, the later would take the other's empty module for the script, and leave it there.
    """
    with _starting:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


_starting = threading.Lock()


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    """The life of an encoder process: what was wrong with the encoder, or None; then batches in, answers out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that it gives back what it holds of the system
    keep_freed_memory()
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
                kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
                answer = str(error) if isinstance(error, SecateurError) else f"{kind}: {error}"
            pipe.send(answer)


class TextEncoder:
    """An encoder elsewhere; ``encode_batch`` is an :data:`Encode`."""

    def __init__(self, opening: Opening, prompt: str) -> None:
        keep_freed_memory()
        self._encoder, self._prompt = open_encoder(opening), prompt

    def encode_batch(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        tokens: list[int] = []
        vectors = self._encoder.encode_texts(texts, self._prompt, lambda _, some: tokens.append(some))
        return vectors, sum(tokens)


@contextmanager
def in_processes(opening: Opening, prompt: str, processes: int) -> Iterator[Run]:
    """Encode in processes of this machine, each with the model in memory and its share of the threads."""
    share = opening.threads or max(1, torch.get_num_threads() // processes)
    make = partial(TextEncoder, replace(opening, threads=share), prompt)
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(EncoderProcess(make))) for _ in range(processes)]
        yield _together(opening.model, [worker.encode_batch for worker in workers])


@contextmanager
def on_ray(opening: Opening, prompt: str, address: str, actors: int) -> Iterator[Run]:
    """Encode on a Ray cluster (:func:`.ray_cluster`), where the model must be found under its name on every machine.

    Ray restarts actors that die, on another machine if need be. ``actors`` of 1 means one on each machine.
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

        def encode(worker: Any, texts: Sequence[str]) -> tuple[Vectors, int]:
            try:
                found: tuple[Vectors, int] = ray.get(worker.encode_batch.remote(texts))
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ModelError(opening.model, f"the workers failed ({lines[-1][:300]})") from error
            return found

        yield _together(opening.model, [partial(encode, worker) for worker in workers])


def _together(model: str, workers: Sequence[Encode]) -> Run:
    """Give each piece to a worker that is idle, and again where the worker dies with it.

    Raises:
        ModelError: A worker cannot open the model, fails on some texts, or dies with them for the third time.
    """
    idle: queue.SimpleQueue[Encode] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(texts: Sequence[str]) -> tuple[Vectors, int]:
        died = ""
        for _ in range(TRIES):
            worker = idle.get()
            try:
                return worker(texts)
            except EncoderDied as error:
                died = str(error)
            except RuntimeError as error:
                raise ModelError(model, str(error).removeprefix(f"model {model}: ")) from None
            finally:
                idle.put(worker)
        problem = f"{died}, {TRIES} times on the same {len(texts)} texts"
        raise ModelError(model, problem, "too little memory? Fewer --processes need less")

    def run(numbers: Sequence[int], read: Read, on_batch: OnBatch) -> Pieces:
        def piece(number: int) -> tuple[int, Vectors, int]:
            return number, *encode(read(number))

        threads = ThreadPoolExecutor(len(workers), thread_name_prefix="worker")
        try:
            for future in as_completed([threads.submit(piece, number) for number in numbers]):
                number, vectors, tokens = future.result()
                on_batch(len(vectors), tokens)
                yield number, vectors
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # what is at work ends with its worker

    return run
