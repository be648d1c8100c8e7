"""How often the tokens of a model occur in the user's texts, and in a tenth of them that is held out."""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from secateur.errors import ConfigError
from secateur.progress import Progress, silent

HELD_OUT = 10
"""One text of so many is held out."""
SAMPLE = 2000
"""Held-out texts that are kept, to be tokenized again with a smaller vocabulary."""
FEWEST = 20
"""Texts without which nothing can be said of others."""
BATCH = 1 << 20
"""Characters that are tokenized at once."""


@dataclass(frozen=True)
class TokenCounts:
    """How frequent each token is, by its id: its share of the tokens of a file, averaged over the files.

    Attributes:
        counted: (ids,), in the texts by which tokens are chosen.
        held_out: (ids,), in the others.
        texts: Number of all texts, each copy counted.
        sample: Some of the texts that are held out, drawn evenly, about as many of each file.
    """

    counted: NDArray[np.float64]
    held_out: NDArray[np.float64]
    texts: int
    sample: tuple[str, ...]


def count_tokens(tokenizer: Tokenizer, files: Sequence[Iterable[str]], *, progress: Progress = silent) -> TokenCounts:
    """Count the tokens of texts in full length, special tokens left out; only a piece of the texts is in memory.

    Each file has the same weight, as in a profile. Which texts are held out is told by a hash of each, so that all
    copies of a text are on one side.

    Args:
        tokenizer: From :func:`plain_tokenizer`.
        files: The texts of each.
        progress: Told the number of texts.

    Raises:
        ConfigError: There are too few texts.
    """
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    shares = np.zeros((2, size))
    sample: list[str] = []
    seen = [0, 0]
    for texts in files:
        counts = np.zeros((2, size), np.int64)
        own = _Sample(max(1, SAMPLE // len(files)))
        for batch in _batches(texts):
            sides: tuple[list[str], list[str]] = ([], [])
            for text in batch:
                sides[zlib.crc32(text.encode("utf-8", "replace")) % HELD_OUT == 0].append(text)
            for side, part in enumerate(sides):
                ids = itertools.chain.from_iterable(token_ids(tokenizer, part))
                counts[side] += np.bincount(np.fromiter(ids, np.int64), minlength=size)
                seen[side] += len(part)
            own.draw_from(sides[1])
            progress("count tokens, texts", sum(seen), 0)
        shares += counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        sample += own.texts
    progress("count tokens, texts", sum(seen), sum(seen))
    if sum(seen) < FEWEST or not sample:
        problem = f"{sum(seen)} texts are too few to tell which tokens others need"
        raise ConfigError("vocab", sum(seen), problem, f"at least {FEWEST}, better thousands")
    counted, held_out = shares / shares.sum(axis=1, keepdims=True)
    return TokenCounts(counted, held_out, sum(seen), tuple(sample))


class _Sample:
    """Some of all texts that come by, each with the same chance (algorithm R)."""

    def __init__(self, most: int) -> None:
        self.texts: list[str] = []
        self._most, self._seen, self._drawn = most, 0, random.Random(0)  # noqa: S311 - not for secrets

    def draw_from(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._seen += 1
            if len(self.texts) < self._most:
                self.texts.append(text)
            elif (place := self._drawn.randrange(self._seen)) < self._most:
                self.texts[place] = text


def plain_tokenizer(rules: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from the content of its ``tokenizer.json``, that neither cuts nor pads."""
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of the tokens of each text, special ones left out."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
