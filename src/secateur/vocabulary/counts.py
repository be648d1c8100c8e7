"""How often the tokens of a model occur in the user's texts, and in a tenth of them that is held out."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

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
    """Occurrences of each token, by its id.

    Attributes:
        counted: (ids,), in the texts by which tokens are chosen.
        held_out: (ids,), in the others.
        texts: Number of all texts, each copy counted.
        sample: Some of the texts that are held out, drawn evenly.
    """

    counted: NDArray[np.int64]
    held_out: NDArray[np.int64]
    texts: int
    sample: tuple[str, ...]


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, progress: Progress = silent
) -> TokenCounts:
    """Count the tokens of texts in full length, special tokens left out; only a piece of the texts is in memory.

    Which texts are held out is told by a hash of each, so that all copies of a text are on one side.

    Raises:
        ConfigError: There are too few texts.
    """
    plain = plain_tokenizer(tokenizer.backend_tokenizer.to_str())
    size = 1 + max(plain.get_vocab(with_added_tokens=True).values())
    counts = np.zeros((2, size), np.int64)
    sample: list[str] = []
    drawn = random.Random(0)  # noqa: S311 - not for secrets
    seen = [0, 0]
    for batch in _batches(texts):
        sides = [zlib.crc32(text.encode("utf-8", "replace")) % HELD_OUT == 0 for text in batch]
        for held_out in (False, True):
            own = [text for text, side in zip(batch, sides, strict=True) if side == held_out]
            ids = itertools.chain.from_iterable(token_ids(plain, own))
            counts[int(held_out)] += np.bincount(np.fromiter(ids, np.int64), minlength=size)
            for text in own:
                seen[held_out] += 1
                if held_out and len(sample) < SAMPLE:
                    sample.append(text)
                elif held_out and (place := drawn.randrange(seen[1])) < SAMPLE:
                    sample[place] = text
        progress("count tokens, texts", sum(seen), 0)
    if sum(seen) < FEWEST or not all(seen):
        problem = f"{sum(seen)} texts are too few to tell which tokens others need"
        raise ConfigError("vocab", sum(seen), problem, f"at least {FEWEST}, better thousands")
    return TokenCounts(counts[0], counts[1], sum(seen), tuple(sample))


def plain_tokenizer(rules: str) -> Tokenizer:
    """A tokenizer from its ``tokenizer.json``, that neither cuts nor pads."""
    tokenizer = Tokenizer.from_str(rules)
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
