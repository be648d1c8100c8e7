"""Who encodes: this process, several processes of this machine, or a Ray cluster; all asked in the same way.

A pool takes pieces of work (some texts) and gives futures of vectors. A worker that dies is replaced and its piece is
given to another one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from secateur import runtime
from secateur.clusters import ray_cluster
from secateur.data.vectors import fingerprint_model
from secateur.errors import ModelError
from secateur.inference.arithmetic import AUTO, STORED, use_arithmetic, weights_dtype
from secateur.inference.encoders import EncoderDied, EncoderProcess, Vectors, batch_budget
from secateur.inference.engine import WINDOW, Engine, Told
from secateur.inference.exported import check_opening, is_export
from secateur.inference.memory import keep_freed_memory
from secateur.models.open_model import open_model
from secateur.options import SavedPooling
from secateur.provenance import fingerprint

TRIES = 3
"""How often a piece is given to a worker before the run fails."""


@dataclass(frozen=True)
class Opening:
    """All that a worker needs: the options of ``open_model`` (with the names of :func:`.use_arithmetic` as ``dtype``,
    and ``auto`` for what :meth:`Worker.settle` measures), what goes before each text, and its share of the threads.
    """

    model: str
    prompt: str = ""
    dtype: str = "auto"
    batch_tokens: int | None = None
    pooling: SavedPooling | None = None
    max_length: int = 512
    device: str | None = None
    trust_remote_code: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Facts:
    """What a run wants to know of an opened model; ``fingerprint`` changes with anything that its vectors depend on."""

    dimension: int
    fingerprint: str
    prompts: Mapping[str, str]
    default_prompt: str | None


class Worker(Protocol):
    """A model in memory."""

    def facts(self) -> Facts:
        """What the run wants to know of it."""

    def settle(self, prompt: str, texts: Sequence[str], /) -> str:
        """Say in what it multiplies, which it has measured on these texts if that is ``auto``; called first."""

    def encode(self, texts: Sequence[str], prompt: str, told: Told, /) -> Vectors:
        """Vectors (texts, dimension), a prompt before each text; tells of its work as it goes on."""


class _ModelWorker:
    """A ``SentenceTransformer`` on an :class:`Engine`."""

    def __init__(self, opening: Opening) -> None:
        if opening.threads:
            torch.set_num_threads(opening.threads)
        self._dtype = opening.dtype
        self._model = open_model(
            opening.model,
            dtype=weights_dtype(opening.dtype),
            pooling=opening.pooling,
            max_length=opening.max_length,
            device=opening.device,
            trust_remote_code=opening.trust_remote_code,
        )
        self._engine = Engine(self._model, batch_tokens=opening.batch_tokens, name=opening.model)

    def facts(self) -> Facts:
        model = self._model
        fingerprint = fingerprint_model(model)
        return Facts(self._engine.dimension, fingerprint, dict(model.prompts), model.default_prompt_name)

    def settle(self, prompt: str, texts: Sequence[str], /) -> str:
        return use_arithmetic(self._model, self._dtype, texts, prompt)

    def encode(self, texts: Sequence[str], prompt: str, told: Told, /) -> Vectors:
        return self._engine.encode(texts, prompt, told)


class _ExportWorker:
    """An export on its runtime, which has its own batches."""

    def __init__(self, opening: Opening) -> None:
        self._folder = Path(opening.model)
        self._batch_tokens = opening.batch_tokens or batch_budget("cpu")
        self._encoder = runtime.load(self._folder, threads=opening.threads)
        own = (STORED, self._encoder.settings.precision)
        check_opening(vars(opening) | ({"dtype": AUTO} if opening.dtype in own else {}))

    def facts(self) -> Facts:
        settings = self._encoder.settings
        digest = hashlib.sha256()
        for file in sorted(self._folder.rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(self._folder)} {fingerprint(file, 0).sha256}".encode())
        prompts, default = dict(settings.prompts), settings.default_prompt_name
        return Facts(settings.dimension, digest.hexdigest(), prompts, default)

    def settle(self, prompt: str, texts: Sequence[str], /) -> str:
        precision: str = self._encoder.settings.precision
        return precision

    def encode(self, texts: Sequence[str], prompt: str, told: Told, /) -> Vectors:
        encoder, pieces = self._encoder, []
        for start in range(0, len(texts), WINDOW):
            tokens = encoder.tokenize(texts[start : start + WINDOW], prompt)
            length = encoder.prompt_length(prompt)
            pieces.append(encoder.encode_tokens(tokens, length, batch_tokens=self._batch_tokens))
            told(len(tokens), sum(map(len, tokens)))
        return np.concatenate(pieces)


def open_worker(opening: Opening) -> Worker:
    """Open a model folder, a Hub id or an export.

    Raises:
        ConfigError: There is no such device or number format; or an export has decided what was chosen.
        ModelError: It cannot be opened.
    """
    return _ExportWorker(opening) if is_export(opening.model) else _ModelWorker(opening)


class _PromptedWorker:
    """A worker elsewhere, which gets texts alone; opened where it works, whatever machine that is."""

    def __init__(self, opening: Opening) -> None:
        self._prompt = opening.prompt
        self._worker = open_worker(opening)
        self._worker.settle(opening.prompt, ())

    def encode(self, texts: Sequence[str]) -> Answer:
        done: list[tuple[int, int]] = []
        vectors = self._worker.encode(texts, self._prompt, lambda *some: done.append(some))
        return Answer(vectors, sum(tokens for _, tokens in done))


@dataclass(frozen=True, eq=False)
class Answer:
    """What a worker elsewhere gives for a piece: vectors (texts, dimension), and how many tokens it has read."""

    vectors: Vectors
    tokens: int


Run = Callable[[Iterable[Sequence[str]], Told], Iterator[Vectors]]
"""Pieces of work in, their vectors out, in the same order; pieces are taken as they are needed.

A worker elsewhere tells of its work when a piece is done.
"""


@contextmanager
def in_this_process(worker: Worker, prompt: str) -> Iterator[Run]:
    """One piece after the other."""
    yield lambda pieces, told: (worker.encode(piece, prompt, told) for piece in pieces)


@contextmanager
def in_processes(opening: Opening, count: int) -> Iterator[Run]:
    """In ``count`` processes, each with the model in its memory and its share of the processor."""
    threads = max(1, (os.cpu_count() or 1) // count)
    make = partial(_PromptedWorker, replace(opening, threads=opening.threads or threads))
    processes = [EncoderProcess(make) for _ in range(count)]
    idle: queue.SimpleQueue[EncoderProcess[Answer]] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def encode(piece: Sequence[str]) -> Answer:
        process = idle.get()
        try:
            return _try_often(process, piece, opening.model)
        finally:
            idle.put(process)

    with ThreadPoolExecutor(count, thread_name_prefix="process") as executor:
        try:
            yield lambda pieces, told: _in_order(lambda piece: executor.submit(encode, piece), pieces, told, 2 * count)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.close()


def _try_often(process: EncoderProcess[Answer], piece: Sequence[str], model: str) -> Answer:
    for tries in range(1, TRIES + 1):
        try:
            return process.encode(piece)
        except EncoderDied as error:
            if tries == TRIES:
                problem = f"{error}, {TRIES} times on the same {len(piece)} texts"
                raise ModelError(model, problem, "too little memory? Fewer --processes need less") from None
        except RuntimeError as error:
            raise ModelError(model, str(error)) from None
    raise AssertionError


class _RayWorker:
    """What each actor of Ray Data holds: called with a batch of columns, gives a batch of columns."""

    def __init__(self, opening: Opening) -> None:
        keep_freed_memory()
        self._worker = _PromptedWorker(opening)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        answer = self._worker.encode(batch["text"].tolist())
        tokens = np.zeros(len(answer.vectors), dtype=np.int64)
        tokens[0] = answer.tokens
        return {"vector": answer.vectors, "tokens": tokens}


@contextmanager
def on_ray(opening: Opening, address: str, count: int) -> Iterator[Run]:
    """On a Ray cluster, by Ray Data, in ``count`` actors; those that die are started anew, elsewhere if need be.

    The pieces lie in the cluster's object store, which moves what it cannot hold to the disk.

    Args:
        opening: The model must be found under this name on every machine.
        address: As for :func:`.ray_cluster`, and so with its errors.
        count: Actors; 1 means one for each machine.
    """
    with ray_cluster(address) as ray:
        from ray import data  # type: ignore[import-not-found,import-untyped,unused-ignore]

        nodes = sum(node["Alive"] for node in ray.nodes())
        actors = count if count > 1 else nodes
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)) // actors)
        own = replace(opening, threads=opening.threads or cores)

        def run(pieces: Iterable[Sequence[str]], told: Told) -> Iterator[Vectors]:
            sizes, refs = [], []
            for piece in pieces:
                sizes.append(len(piece))
                refs.append(ray.put(pa.table({"text": pa.array(piece, pa.string())})))
            yield from _regroup(_ray_batches(data.from_arrow_refs(refs), own, actors, cores), sizes, told)

        log = logging.getLogger("ray.data")  # its reports would stand between the run's own lines
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield run
        except ray.exceptions.RayError as error:
            raise ModelError(opening.model, f"the workers failed ({_last_line(error)})") from error
        finally:
            log.setLevel(level)


def _ray_batches(texts: Any, opening: Opening, actors: int, cores: int) -> Iterator[dict[str, NDArray[Any]]]:
    """What :class:`_RayWorker` makes of a data set of Ray Data, in its order."""
    from ray import data

    texts.context.execution_options.preserve_order = True
    texts.context.enable_progress_bars = False  # the run has its own
    texts.context.print_on_execution_start = False
    with warnings.catch_warnings():
        # Ray wants named parameters, and has none for how often a piece is tried: by default, for ever.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
        vectors = texts.map_batches(
            _RayWorker,
            fn_constructor_args=(opening,),
            batch_size=None,
            compute=data.ActorPoolStrategy(size=actors),
            num_cpus=cores,
            max_restarts=-1,
            max_task_retries=TRIES - 1,
        )
    found: Iterator[dict[str, NDArray[Any]]] = iter(vectors.iter_batches(batch_size=None, batch_format="numpy"))
    return found


def _regroup(batches: Iterator[dict[str, NDArray[Any]]], sizes: Sequence[int], told: Told) -> Iterator[Vectors]:
    """Vectors in pieces of these sizes: Ray Data may have cut its blocks elsewhere."""
    left = np.zeros((0, 0), dtype=np.float32)
    for size in sizes:
        parts = [left]
        while sum(map(len, parts)) < size:
            batch = next(batches)
            told(len(batch["vector"]), int(batch["tokens"].sum()))
            parts.append(batch["vector"])
        rows = np.concatenate([part for part in parts if len(part)])
        left = rows[size:]
        yield rows[:size]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__


def _in_order(
    submit: Callable[[Sequence[str]], Future[Answer]], pieces: Iterable[Sequence[str]], told: Told, ahead: int
) -> Iterator[Vectors]:
    """Give pieces away, at most ``ahead`` at a time, and yield what they become in order."""
    waiting: deque[Future[Answer]] = deque()

    def next_vectors() -> Vectors:
        answer = waiting.popleft().result()
        told(len(answer.vectors), answer.tokens)
        return answer.vectors

    for piece in pieces:
        waiting.append(submit(piece))
        if len(waiting) >= ahead:
            yield next_vectors()
    while waiting:
        yield next_vectors()
