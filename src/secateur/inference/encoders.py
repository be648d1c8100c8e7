"""What the server asks of a model: texts to tokens, and batches of tokens to vectors.

:class:`ModelEncoder` asks a ``SentenceTransformer``; :class:`EncoderProcess` keeps one in a process of its own and
replaces it when it dies. Whatever else has the methods of :class:`Encoder` can be served as well.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from secateur.errors import ModelError, SecateurError
from secateur.inference.memory import keep_freed_memory
from secateur.measures.metrics import paired_cosines
from secateur.models.forward import is_out_of_memory, padded_length
from secateur.models.save import PROBES
from secateur.progress import quiet
from secateur.runtime.slices import CHARACTERS_PER_TOKEN, cut_characters, slices

LENGTH_STEP = 8
"""Texts are padded to a multiple of this: few shapes, of which each costs a new kernel once, and little padding."""

LEAST_COSINE = 0.999

LEAVING_SECONDS = 2.0
"""What an encoder process has to give back what it holds of the system, before it is ended."""

BEAT_SECONDS = 0.5
"""How often an encoder process shows that it runs, and how often that is looked at."""

SILENT_SECONDS = 10.0
"""An encoder process of a server that shows no sign of life for so long hangs."""

LONG_SILENCE = 120.0
"""The same where no client waits, and before the encoder has been made: while Python imports a large library, no other
thread of the process runs."""

CPU_BATCH = 1024
"""Tokens in a batch, padding included: enough for a processor's full rate, few enough to stay in its caches."""

GPU_BATCH = 8192
"""The same: enough that a small model's kernels last longer than it takes to launch them."""

Vectors = npt.NDArray[np.float32]


def batch_budget(device: str | torch.device) -> int:
    """Tokens in a batch, padding included, where nobody says how many."""
    return CPU_BATCH if torch.device(device).type == "cpu" else GPU_BATCH


class TextRefused(SecateurError):
    """A text that the model cannot encode. ``place`` is its index in the request, None where it is all of them."""

    def __init__(self, place: int | None, problem: str, hint: str = "") -> None:
        self.place = place
        super().__init__(problem, hint)


class EncoderDied(RuntimeError):
    """The process of an encoder ended in the middle of a batch, or before it could take one."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """One text as the model reads it: token ids, special ones included, the first ``prompt_length`` of a prompt."""

    ids: npt.NDArray[np.int32]
    prompt_length: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class Encoder(Protocol):
    """A model, as the server sees it.

    Attributes:
        dimension: Numbers in a vector.
        max_length: Tokens in a text, special ones included.
        vocabulary: Token ids are below this.
        prompts: Texts that can go before a text, by name.
        default_prompt: The name of the one that goes before it where none is named, or None.
        truncation_side: Where a text that is too long loses tokens: ``left`` or ``right``.
        dtype: In what it multiplies.
    """

    dimension: int
    max_length: int
    vocabulary: int
    prompts: Mapping[str, str]
    default_prompt: str | None
    truncation_side: str
    dtype: str

    def tokenize(self, texts: Sequence[str], prompt: str | None, *, truncate: bool, limit: int) -> list[Tokens]:
        """Texts as tokens; never called by two threads at once.

        Args:
            texts: Texts that are not empty.
            prompt: A name of ``prompts``, or None.
            truncate: Cut texts that are too long; else they are refused.
            limit: Tokens of all texts together.

        Raises:
            TextRefused: A text is too long, has no tokens, or all together have more than ``limit``.
        """

    def encode(self, batch: Sequence[Tokens]) -> Vectors:
        """Vectors (batch, dimension) of texts that share a prompt length, in one pass of the model."""


Read = Callable[[list[str]], list[Tokens]]


def read_slices(
    read: Read, texts: Sequence[str], max_length: int, side: str, *, truncate: bool, limit: int
) -> list[Tokens]:
    """Tokenize by slices, so that a request that is far too long is refused before all of it is tokenized.

    Args:
        read: Tokenizes some texts.
        texts: As for :meth:`Encoder.tokenize`, and so with its errors.
        max_length: Tokens that the model reads of a text.
        side: Where a text that is too long is cut.
        truncate: As for :meth:`Encoder.tokenize`.
        limit: As for :meth:`Encoder.tokenize`.
    """
    longest = max_length * CHARACTERS_PER_TOKEN
    tokens: list[Tokens] = []
    total = 0
    for some in slices(texts, longest):
        for place, text in enumerate(some, start=len(tokens)):
            if len(text) > longest and not truncate:
                raise TextRefused(place, f"{len(text)} characters are too many", f"at most {longest}")
        for found in read_cut(read, some, max_length, side, longest):
            _check(found, len(tokens), max_length)
            tokens.append(found)
            total += len(found)
        if total > limit:
            raise TextRefused(None, f"more than {limit} tokens in one request", "send fewer texts at once")
    return tokens


def read_cut(read: Read, texts: Sequence[str], max_length: int, side: str, characters: int) -> list[Tokens]:
    """Tokenize so many characters of each text, and more of those that have fewer tokens than the model reads.

    Args:
        read: Tokenizes some texts, and cuts what is too long for the model.
        texts: The texts.
        max_length: Tokens that the model reads of a text.
        side: Where it is cut: ``left`` or ``right``.
        characters: How many are looked at first.
    """
    found = read([cut_characters(text, characters, side) for text in texts])
    for place, text in enumerate(texts):
        if len(text) > characters and len(found[place]) < max_length:
            (found[place],) = read_cut(read, [text], max_length, side, 2 * characters)
    return found


def _check(tokens: Tokens, place: int, max_length: int) -> None:
    if len(tokens) > max_length:
        raise TextRefused(place, f"{len(tokens)} tokens are too many", f"the model reads at most {max_length}")
    if len(tokens) <= tokens.prompt_length:
        raise TextRefused(place, "the text has no tokens")


class ModelEncoder:
    """A ``SentenceTransformer`` as an :class:`Encoder`, compared with the model's own ``encode`` when it is made.

    Padding is always on the right: there a text gets the positions that it has alone, whatever it is batched with.

    Args:
        model: The model; its first module must be a transformer.
        name: What errors call it.
        dtype: What it multiplies in, where that is not its weights' number format.

    Raises:
        ModelError: The model is no transformer, or its own ``encode`` gives other vectors.
    """

    def __init__(self, model: SentenceTransformer, name: str = "model", dtype: str | None = None) -> None:
        if not isinstance(model[0], Transformer) or model.tokenizer is None:
            raise ModelError(name, "is not a transformer with a tokenizer", "other kinds cannot be served")
        self.model = model.eval()
        self.dimension = int(model.get_embedding_dimension() or 0)
        config = model[0].auto_model.config.get_text_config()
        self.max_length = int(model.max_seq_length or getattr(config, "max_position_embeddings", 512))
        self.vocabulary = int(model[0].auto_model.get_input_embeddings().num_embeddings)
        self.prompts: Mapping[str, str] = dict(model.prompts)
        self.default_prompt: str | None = model.default_prompt_name
        self.truncation_side: str = model.tokenizer.truncation_side
        self.dtype = dtype or str(model.dtype).removeprefix("torch.")
        self._modality = model.preprocess(["a"])["modality"]
        self._compare(name)

    def tokenize(self, texts: Sequence[str], prompt: str | None, *, truncate: bool, limit: int) -> list[Tokens]:
        """See :meth:`Encoder.tokenize`."""
        before = self.prompts[prompt] if prompt else ""

        def read(some: list[str]) -> list[Tokens]:
            return self.read(some, before, truncate=truncate)

        return read_slices(read, texts, self.max_length, self.truncation_side, truncate=truncate, limit=limit)

    def read(self, texts: Sequence[str], prompt: str, *, truncate: bool) -> list[Tokens]:
        """Token ids of each text after a prompt; a text may have none."""
        text_options = {"padding": False, "truncation": truncate, "verbose": False}
        read = self.model.preprocess(
            list(texts),
            prompt=prompt or None,
            processing_kwargs={"text": text_options, "common": {"return_tensors": None}},
        )
        length = int(read.get("prompt_length") or 0)
        return [Tokens(np.asarray(ids, dtype=np.int32), length) for ids in read["input_ids"]]

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tokens], width: int | None = None) -> Vectors:
        """See :meth:`Encoder.encode`; ``width`` is the length that texts are padded to."""
        width = width or padded_length(max(map(len, batch)), self.max_length, LENGTH_STEP)
        return self.vectors(self.model(self.features(batch, width))["sentence_embedding"])

    def features(self, batch: Sequence[Tokens], width: int) -> dict[str, Any]:
        """What the model's modules take: tensors (batch, width), padded on the right."""
        padding = self.model.tokenizer.pad_token_id or 0
        ids = np.full((len(batch), width), padding, dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens.ids
            mask[row, : len(tokens)] = 1
        device = self.model.device
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
            "modality": self._modality,
        }
        if batch[0].prompt_length:
            features["prompt_length"] = batch[0].prompt_length
        return features

    def vectors(self, found: torch.Tensor) -> Vectors:
        """What the model gave, as an array; refuses numbers that are not finite."""
        vectors: Vectors = found[:, : self.dimension].float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise FloatingPointError("the model gave a vector that is not finite")
        return vectors

    def _compare(self, name: str) -> None:
        """Compare with the model's own ``encode``: a module may want more than tokens and a mask."""
        texts = list(PROBES)
        with quiet():
            expected = self.model.encode(texts, prompt_name=self.default_prompt, show_progress_bar=False)
        tokens = self.tokenize(texts, self.default_prompt, truncate=True, limit=len(texts) * self.max_length)
        found = self.encode(tokens)
        cosine = float(paired_cosines(found, expected).min())
        if not cosine >= LEAST_COSINE:
            raise ModelError(name, f"gives other vectors in batches than alone (cosine {cosine:.4f})")


Answer = TypeVar("Answer")
AnswerOf = TypeVar("AnswerOf", covariant=True)


class Encoding(Protocol[AnswerOf]):
    """What a process can do: batches of whatever it understands to vectors, maybe with more about them."""

    def encode(self, batch: Sequence[Any], /) -> AnswerOf:
        """Vectors (batch, dimension), or what holds them."""


class EncoderProcess(Generic[Answer]):
    """The encoding of an :class:`Encoder` in a process of its own, replaced when it dies or hangs.

    Args:
        make: Makes the encoder in the new process; a function that can be pickled.
        on_restart: Called when a dead process is replaced.
        silence: Seconds without a sign of life after which the process is ended, once its encoder has been made.
    """

    def __init__(
        self,
        make: Callable[[], Encoding[Answer]],
        on_restart: Callable[[], None] = lambda: None,
        silence: float = LONG_SILENCE,
    ) -> None:
        self._make = make
        self._on_restart = on_restart
        self._silence = silence
        self.closed = False
        self._talks = False
        self._deadline = math.inf
        self._fault = ""
        self._start()

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    def ready(self) -> bool:
        """Whether the process lives, and its encoder has been made."""
        return self._loaded and self._process.is_alive()

    def revive(self) -> None:
        """Replace the process if it is dead, and wait until its encoder has been made; by the thread of :meth:`encode`.

        Raises:
            SecateurError: The encoder cannot be made; says why.
            EncoderDied: The process ended before it was; a new one has been started.
        """
        if not self._process.is_alive():
            self._replace()
        with self._talking():
            self._wait()

    def encode(self, batch: Sequence[Any], patience: float = math.inf) -> Answer:
        """See :meth:`Encoder.encode`; used by one thread.

        Args:
            batch: What the process's encoder understands.
            patience: Seconds after which the process is ended.

        Raises:
            SecateurError: The encoder cannot be made; says why.
            EncoderDied: The process ended, or hung and was ended; a new one has been started.
        """
        with self._talking():
            self._wait()
            self._deadline = time.monotonic() + patience
            self._pipe.send(batch)
            answer: Answer | str = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process; a batch in it is lost."""
        if self.closed:
            return
        self.closed = True
        self._process.terminate()
        if self._talks:  # then another thread hears of its end
            self._process.join(LEAVING_SECONDS)
        else:
            with suppress(OSError):
                self._pipe.poll(LEAVING_SECONDS)
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._loaded = False
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        beats = context.RawValue("Q", 0)
        process = context.Process(target=_answer, args=(theirs, self._make, beats), daemon=True)
        with _no_interrupt():
            process.start()
        theirs.close()
        self._pipe, self._process = ours, process
        threading.Thread(target=self._watch, args=(process, beats), name="watch", daemon=True).start()

    def _watch(self, process: SpawnProcess, beats: Any) -> None:
        """End a process that shows no sign of life, or is at one batch for too long; its :meth:`encode` hears of it.

        Silence is counted in looks, not by the clock: when all of the server was stopped (Ctrl-Z) nobody hung.
        """
        last, silent = 0, 0.0
        while process.is_alive():
            process.join(BEAT_SECONDS)
            last, silent = beats.value, silent + BEAT_SECONDS if beats.value == last else 0.0
            if silent > (self._silence if self._loaded else LONG_SILENCE):
                self._fault = f"showed no sign of life for {silent:g} s"
            elif time.monotonic() > self._deadline:
                self._fault = "was at one batch for too long"
            else:
                continue
            process.kill()

    def _replace(self) -> str:
        """Start a new process in place of one that is dead, or as good as; says what became of that."""
        self._process.kill()
        self._process.join()
        self._pipe.close()
        end = self._fault or f"ended with code {self._process.exitcode}"
        self._deadline, self._fault = math.inf, ""
        if not self.closed:
            self._start()
            self._on_restart()
        if self.closed:  # by another thread, maybe just now
            self._process.kill()
        return end

    def _wait(self) -> None:
        if not self._loaded:
            problem: str | None = self._pipe.recv()
            if problem is not None:
                self._process.join(LEAVING_SECONDS)
                raise SecateurError(problem)
            self._loaded = True

    @contextmanager
    def _talking(self) -> Iterator[None]:
        self._talks = True
        try:
            yield
        except (EOFError, OSError):
            raise EncoderDied(f"an encoder process {self._replace()}") from None
        finally:
            self._talks, self._deadline = False, math.inf


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


def _answer(pipe: Connection, make: Callable[[], Encoding[Any]], beats: Any) -> None:
    """The life of an encoder process: what was wrong with the encoder, or None; then batches in, vectors out.

    It ends when the other end is closed, or at SIGTERM, when it gives back what it holds of the system.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    Finalize(None, pipe.close, exitpriority=-1)  # all else is given back; libraries, slow to end, wait
    keep_freed_memory()
    threading.Thread(target=_beat, args=(beats,), name="beat", daemon=True).start()
    with suppress(EOFError, OSError):
        try:
            encoder = make()
        except Exception as error:
            pipe.send(str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}")
            return
        pipe.send(None)
        while True:
            pipe.send(_vectors_or_problem(encoder, pipe.recv()))


def _beat(beats: Any) -> None:
    """Show the process that started this one that it runs."""
    for beats.value in count(1):
        time.sleep(BEAT_SECONDS / 2)


def _vectors_or_problem(encoder: Encoding[Any], batch: Sequence[Any]) -> Any:
    try:
        return encoder.encode(batch)
    except Exception as error:
        # So that it is known for what it is on the other side, where it is but a text.
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        return f"{kind}: {error}"
