"""The core of all encoding: texts to tokens, tokens to batches, batches to vectors, whatever runs the model.

A subclass of :class:`Encoder` brings a tokenizer and one pass of a model: of an export (:mod:`.encoder`), or in PyTorch
(``secateur.inference.encoders``). Nothing here needs PyTorch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from secateur.errors import ConfigError, ModelError, SecateurError

WINDOW = 512
"""Texts that are tokenized, and cut into batches, together; they come sorted by length."""
CHARACTERS_PER_TOKEN = 64
"""Tokens are shorter than this, or so few that more of a text must be looked at."""
SLICE_CHARACTERS = 1 << 16
"""What is tokenized at once: what a tokenizer returns is many times larger than the ids."""
LENGTH_STEP = 8
"""Lengths are rounded up to a multiple of this where few shapes matter: each new one costs a new kernel once."""
CPU_BATCH = 1024
"""Tokens in a batch, padding included: enough for a processor's full rate, few enough to stay in its caches."""
GPU_BATCH = 8192
"""The same: enough that a small model's kernels last longer than it takes to launch them."""
FULL_RATE = 192
"""Tokens that are enough for a processor to multiply at its full rate."""
PADDING = 1.05
"""How many times its real tokens a batch may have with its padding, where it has enough of them already."""

T = TypeVar("T")
Vectors = NDArray[np.float32]
OnBatch = Callable[[int, int], None]
"""Called as ``on_batch(texts, tokens)`` after each batch; tokens of prompts count."""


class TextRefused(SecateurError):
    """A text that cannot be encoded; ``place`` is its index, None where it is all of them."""

    def __init__(self, place: int | None, problem: str, hint: str = "") -> None:
        self.place = place
        super().__init__(problem, hint)


@dataclass(frozen=True, eq=False)
class Tokens:
    """One text as the model reads it: token ids, special ones included, the first ``prompt_length`` of a prompt."""

    ids: NDArray[np.int32]
    prompt_length: int = 0

    def __len__(self) -> int:
        return len(self.ids)


RunBatch = Callable[[Sequence[Tokens]], Vectors]
"""One pass of a model over texts that share a prompt length: vectors (batch, dimension)."""


def ignore(texts: int, tokens: int) -> None:
    """Report to nobody."""


class Encoder(ABC):
    """A model: texts to vectors. One thread may tokenize while another one runs the model."""

    name: str  # what errors call it
    dimension: int  # length of a vector
    max_length: int  # tokens of a text that the model reads, special ones and the prompt's included
    vocabulary: int  # token ids are below this
    prompts: Mapping[str, str]  # texts that can go before a text, by name
    default_prompt: str | None  # the name of the one that goes before it where none is named
    truncation_side: str  # where a text that is too long loses tokens: left or right
    dtype: str  # in what it multiplies
    batch_tokens: int = CPU_BATCH  # padding included; halved when a batch does not fit into memory
    length_step: int = LENGTH_STEP  # batches are padded to a multiple of this
    padding: float = math.inf  # the most that a batch may be padded, as for plan_batches

    @abstractmethod
    def read(self, texts: Sequence[str], prompt: str, truncate: bool) -> list[Tokens]:
        """Token ids of each text with a prompt before it; a text may have none."""

    @abstractmethod
    def run(self, batch: Sequence[Tokens]) -> Vectors:
        """Vectors (batch, dimension) of texts that share a prompt length, in one pass of the model."""

    def prompt_of(self, name: str | None) -> str:
        """The text of a named prompt; of the default one, where no name is given.

        Raises:
            ConfigError: There is no such prompt.
        """
        name = name if name is not None else self.default_prompt
        if name is not None and name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ConfigError("prompt_name", name, f"the model has no prompt {name!r}", f"its prompts: {known}")
        return self.prompts[name] if name is not None else ""

    def encode_texts(
        self, texts: Sequence[str], prompt: str = "", on_batch: OnBatch = ignore, *, batch_size: int | None = None
    ) -> Vectors:
        """Vectors (texts, dimension) in the order of the texts; each distinct text is run once.

        A text that has no tokens gets a vector of zeros; ``batch_size`` is the most texts in a batch.

        Raises:
            ModelError: A vector is not finite, or a single text is too large for the memory.
        """
        distinct = sorted(dict.fromkeys(texts), key=len, reverse=True)
        vectors = np.zeros((len(distinct), self.dimension), dtype=np.float32)
        with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as thread:
            coming = thread.submit(self.tokenize, distinct[:WINDOW], prompt)
            for start in range(0, len(distinct), WINDOW):
                tokens, end = coming.result(), start + WINDOW
                coming = thread.submit(self.tokenize, distinct[end : end + WINDOW], prompt)
                vectors[start:end] = self.encode_tokens(tokens, on_batch, batch_size=batch_size)
        places = {text: place for place, text in enumerate(distinct)}
        return vectors[[places[text] for text in texts]]

    def tokenize(
        self, texts: Sequence[str], prompt: str = "", *, truncate: bool = True, limit: int | None = None
    ) -> list[Tokens]:
        """Texts as tokens, a slice at a time; of a long text no more is tokenized than the model can read.

        Args:
            texts: The texts.
            prompt: Goes before each.
            truncate: Cut texts that are too long for the model; else they are refused.
            limit: Tokens of all texts together. Where it is given, a text that has no tokens is refused, too.

        Raises:
            TextRefused: A text is too long, or there are too many tokens.
        """
        longest = self.max_length * CHARACTERS_PER_TOKEN
        tokens: list[Tokens] = []
        for some in slices(texts, longest):
            for text, found in zip(some, self._read_start(some, prompt, longest, truncate), strict=True):
                if len(found) > self.max_length:
                    count = f"at least {len(found)}" if len(text) > longest else str(len(found))
                    hint = f"the model reads at most {self.max_length}"
                    raise TextRefused(len(tokens), f"{count} tokens are too many", hint)
                if limit is not None and len(found) <= found.prompt_length:
                    raise TextRefused(len(tokens), "the text has no tokens")
                tokens.append(found)
            if limit is not None and sum(map(len, tokens)) > limit:
                raise TextRefused(None, f"more than {limit} tokens in one request", "send fewer texts at once")
        return tokens

    def _read_start(self, texts: Sequence[str], prompt: str, characters: int, truncate: bool) -> list[Tokens]:
        """Tokens of so many characters of each text, or of more where these are too few tokens: fewer than the model
        reads or, without truncation, not more than it reads.
        """
        right, enough = self.truncation_side == "right", self.max_length + (not truncate)
        found = self.read([text[:characters] if right else text[-characters:] for text in texts], prompt, truncate)
        for place, text in enumerate(texts):
            if len(text) > characters and len(found[place]) < enough:
                (found[place],) = self._read_start([text], prompt, 2 * characters, truncate)
        return found

    def encode_tokens(
        self, tokens: Sequence[Tokens], on_batch: OnBatch = ignore, *, batch_size: int | None = None
    ) -> Vectors:
        """Vectors (texts, dimension) of tokenized texts under one prompt; otherwise as :meth:`encode_texts`."""
        vectors = np.zeros((len(tokens), self.dimension), dtype=np.float32)
        filled = [row for row, text in enumerate(tokens) if len(text)]
        if len(filled) < len(tokens):
            on_batch(len(tokens) - len(filled), 0)
        if not filled:
            return vectors
        run, computed = self.prepare([tokens[row] for row in filled])
        lengths = [self.padded_length(len(tokens[row]) - computed) for row in filled]
        for places in plan_batches(lengths, self.batch_tokens, self.padding, batch_size):
            rows = [filled[place] for place in places]
            batch = [tokens[row] for row in rows]
            vectors[rows] = self.encode_batch(batch, run)
            on_batch(len(batch), sum(map(len, batch)))
        return vectors

    def prepare(self, tokens: Sequence[Tokens]) -> tuple[RunBatch, int]:
        """How these texts are run, in batches, and how many tokens of each have been computed already."""
        return self.run, 0

    def encode_batch(self, batch: Sequence[Tokens], run: RunBatch | None = None) -> Vectors:
        """Vectors of texts that share a prompt length; in halves where they do not fit into memory together."""
        try:
            vectors = (run or self.run)(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                problem = f"a text of {len(batch[0])} tokens does not fit into memory"
                raise ModelError(self.name, problem, "lower --max-length") from error
        else:
            if not np.isfinite(vectors).all():
                hint = "its weights hold NaN, or overflow in this dtype; or it pools nothing of an empty text"
                raise ModelError(self.name, "gives vectors that are not finite", hint)
            return vectors
        # Not while the error is handled: it holds on to what filled the memory.
        self.batch_tokens = max(1, self.batch_tokens // 2)
        return np.concatenate([self.encode_batch(half, run) for half in halves(batch)])

    def padded_length(self, length: int) -> int:
        """The length that a batch with a longest text of so many tokens is padded to."""
        return padded_length(length, self.length_step, self.max_length)

    def pad(self, batch: Sequence[Tokens], padding_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and attention mask (batch, length), padded on the right: there a text has the positions it has alone."""
        length = self.padded_length(max(map(len, batch)))
        ids = np.full((len(batch), length), padding_id, dtype=np.int64)
        mask = np.zeros((len(batch), length), dtype=np.int64)
        for row, text in enumerate(batch):
            ids[row, : len(text)] = text.ids
            mask[row, : len(text)] = 1
        return ids, mask


def slices(texts: Sequence[str], longest: int) -> Iterator[Sequence[str]]:
    """Texts in order, as many together as have :data:`SLICE_CHARACTERS`, if so many count of each as ``longest``."""
    start = characters = 0
    for end, text in enumerate(texts):
        length = min(len(text), longest)
        if end > start and characters + length > SLICE_CHARACTERS:
            yield texts[start:end]
            start, characters = end, 0
        characters += length
    if start < len(texts):
        yield texts[start:]


def padded_length(length: int, step: int, longest: int) -> int:
    """The least multiple of ``step`` that so many tokens fit into, or ``longest`` where that is less but enough."""
    return min(-(-max(1, length) // step) * step, max(longest, length))


def plan_batches(
    lengths: Sequence[int],
    budget: int,
    padding: float = PADDING,
    size: int | None = None,
    full: int = FULL_RATE,
) -> list[list[int]]:
    """Cut texts into batches of about as many tokens, the longest texts first; gives their indices, by batch.

    Args:
        lengths: Tokens of each text.
        budget: Tokens in a batch, padding included; a text longer than that makes a batch alone.
        padding: How many times its real tokens a batch may have with its padding.
        size: Texts in a batch, at most.
        full: Real tokens from which on that holds; fewer are never much work.
    """
    batches: list[list[int]] = []
    longest = real = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = max(1, lengths[row])
        padded = (len(batches[-1]) + 1) * longest if batches else 0
        wasteful = real >= full and padded > padding * (real + length)
        if not batches or padded > budget or wasteful or len(batches[-1]) == size:
            batches.append([])
            longest, real = length, 0
        batches[-1].append(row)
        real += length
    return batches


def halves(rows: Sequence[T]) -> tuple[list[T], list[T]]:
    middle = len(rows) // 2
    return list(rows[:middle]), list(rows[middle:])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a batch was too large for the machine."""
    # PyTorch and the runtimes have no common class for it.
    said = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said
