"""From the user's texts, and a size or a coverage, to the tokens that stay; and what that does to texts held out."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.sources import prompts_of, stream_texts
from secateur.errors import ConfigError
from secateur.models.blocks import text_config
from secateur.options import VocabularyOptions
from secateur.progress import Progress, silent
from secateur.results import VocabularyCut, VocabularyRow
from secateur.vocabulary.tokens import Vocabulary, keep_tokens, plain_tokenizer, read_vocabulary, token_ids
from secateur.vocabulary.trim import TokenTable, named_ids, token_tables

COVERAGE = 0.995
"""Share of the tokens of held-out texts that stay, where nobody says."""
ROUND_SIZES = (64000, 32000, 16000, 8000, 4000, 2000)
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

    ``counted`` (ids,) is that in the texts by which tokens are chosen, ``held_out`` (ids,) in the others, ``texts`` the
    number of all texts, each copy counted, ``sample`` some of those held out, about as many of each file.
    """

    counted: NDArray[np.float64]
    held_out: NDArray[np.float64]
    texts: int
    sample: tuple[str, ...]


def count_tokens(tokenizer: Tokenizer, files: Sequence[Iterable[str]], *, progress: Progress = silent) -> TokenCounts:
    """Count the tokens of texts in full length, special tokens left out; only a piece of the texts is in memory.

    Each of the files has the same weight, as in a profile. Which texts are held out is told by a hash of each, so that
    all copies of a text are on one side.

    Raises:
        ConfigError: There are too few texts.
    """
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    shares = np.zeros((2, size))
    sample: list[str] = []
    seen = [0, 0]
    most = max(1, SAMPLE // len(files))
    for texts in files:
        counts = np.zeros((2, size), np.int64)
        own: list[str] = []
        passed, drawn = 0, random.Random(0)  # noqa: S311 - not for secrets
        for batch in _batches(texts):
            sides: tuple[list[str], list[str]] = ([], [])
            for text in batch:
                sides[zlib.crc32(text.encode("utf-8", "replace")) % HELD_OUT == 0].append(text)
            for side, part in enumerate(sides):
                ids = itertools.chain.from_iterable(token_ids(tokenizer, part))
                counts[side] += np.bincount(np.fromiter(ids, np.int64), minlength=size)
                seen[side] += len(part)
            for text in sides[1]:  # each with the same chance to be in the sample (algorithm R)
                passed += 1
                if len(own) < most:
                    own.append(text)
                elif (place := drawn.randrange(passed)) < most:
                    own[place] = text
            progress("count tokens, texts", sum(seen), 0)
        shares += counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        sample += own
    progress("count tokens, texts", sum(seen), sum(seen))
    if sum(seen) < FEWEST or not sample:
        problem = f"{sum(seen)} texts are too few to tell which tokens others need"
        raise ConfigError("vocab", sum(seen), problem, f"at least {FEWEST}, better thousands")
    counted, held_out = shares / shares.sum(axis=1, keepdims=True)
    return TokenCounts(counted, held_out, sum(seen), tuple(sample))


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


@dataclass(frozen=True)
class CountedVocabulary:
    """A vocabulary with what the user's texts need of it.

    Attributes:
        vocabulary: Of the model's tokenizer.
        counts: Of the texts.
        needed: Ids that stay in any case, ascending.
        files: That the texts are from.
        tables: Of the model.
        itemsize: Bytes of a number in them.
    """

    vocabulary: Vocabulary
    counts: TokenCounts
    needed: tuple[int, ...]
    files: tuple[str, ...]
    tables: tuple[TokenTable, ...]
    itemsize: int

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """All ids; the first of them, however many from ``needed`` on, are a vocabulary."""
        return np.array(list(self.vocabulary.order(self.counts.counted, self.needed)))

    @cached_property
    def coverage(self) -> NDArray[np.float64]:
        """Share of the tokens of held-out texts that stay with the first n + 1 tokens of the order."""
        found = self.counts.held_out[self.order]
        covered: NDArray[np.float64] = np.cumsum(found) / np.cumsum(found)[-1]  # all tokens cover exactly 1
        return covered

    def kept(self, size: int) -> tuple[int, ...]:
        """Ids of the tokens of a vocabulary of that size, ascending."""
        return tuple(sorted(self.order[:size].tolist()))

    def size_of(self, options: VocabularyOptions) -> int:
        """The size that is asked for.

        Raises:
            ConfigError: It is larger than the vocabulary, or smaller than what every vocabulary needs.
        """
        if options.vocab_size is None:
            asked = COVERAGE if options.vocab_coverage is None else options.vocab_coverage
            enough = int(np.searchsorted(self.coverage, asked - 1e-12)) + 1
            return min(max(enough, len(self.needed)), len(self.order))
        size, fewest, most = options.vocab_size, len(self.needed), len(self.order)
        if size > most:
            raise ConfigError("vocab_size", size, f"the vocabulary has {most:,} tokens", f"at most {most:,}")
        if size < fewest:
            problem = f"{fewest:,} tokens are special, or what rare words fall back to"
            raise ConfigError("vocab_size", size, problem, f"at least {fewest:,}")
        return size

    def parameters(self, size: int) -> list[int]:
        """Parameters that each table has with a vocabulary of that size."""
        ids = self.order[:size]
        return [table.width * int((ids < table.rows).sum()) for table in self.tables]

    def removed(self, size: int) -> tuple[int, int]:
        """Parameters that go with a vocabulary of that size: of tables, and of those with a slice for each layer."""
        gone = [table.width * table.rows for table in self.tables]
        gone = [whole - left for whole, left in zip(gone, self.parameters(size), strict=True)]
        packed = sum(number for table, number in zip(self.tables, gone, strict=True) if table.packed)
        return sum(gone) - packed, packed

    @cached_property
    def _before(self) -> list[list[int]]:
        return token_ids(self.vocabulary.tokenizer, list(self.counts.sample))

    def coverage_of(self, texts: Sequence[str], size: int) -> float:
        """Share of the tokens of some texts that stay in a vocabulary of that size."""
        kept = set(self.kept(size))
        ids = list(itertools.chain.from_iterable(token_ids(self.vocabulary.tokenizer, list(texts))))
        return sum(i in kept for i in ids) / max(1, len(ids))

    @property
    def tokens_per_text(self) -> float:
        """Of the held-out texts with all tokens."""
        return float(np.mean([len(ids) for ids in self._before]))

    def row(self, size: int) -> VocabularyRow:
        """What a vocabulary of that size does to the held-out texts."""
        kept = self.kept(size)
        there = set(kept)
        cut = plain_tokenizer(keep_tokens(self.vocabulary.rules, kept))
        before, after = self._before, token_ids(cut, list(self.counts.sample))
        parameters = sum(self.parameters(size))
        unknown, fresh = self.vocabulary.unknown, 0
        if unknown is not None:
            place = kept.index(unknown)
            fresh = sum(ids.count(place) for ids in after) - sum(ids.count(unknown) for ids in before)
        return VocabularyRow(
            tokens=len(kept),
            coverage=float(self.coverage[size - 1]),
            changed=float(np.mean([not there.issuperset(ids) for ids in before])),
            tokens_per_text=float(np.mean([len(ids) for ids in after])),
            unknown=max(0, fresh) / max(1, sum(map(len, after))),
            parameters=parameters,
            bytes=parameters * self.itemsize,
        )

    def cut(self, size: int) -> VocabularyCut:
        """The record of a cut to that size."""
        row, texts = self.row(size), self.counts.texts
        return VocabularyCut(row, len(self.order), self.tokens_per_text, texts, self.files, removed=self.removed(size))

    def sizes(self) -> list[int]:
        """Round sizes that are possible, and the whole, the largest first."""
        whole = len(self.order)
        return [whole, *(size for size in ROUND_SIZES if len(self.needed) <= size < whole)]


def count_vocabulary(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    transformer: PreTrainedModel,
    options: VocabularyOptions,
    *,
    prompts: Iterable[str] = (),
    progress: Progress = silent,
) -> CountedVocabulary:
    """Count the tokens of the texts that ``options.vocab`` names.

    Args:
        name: Of the model, for errors.
        tokenizer: Of the model.
        transformer: Of the model; it needs no weights.
        options: Name the texts.
        prompts: Of the model; their tokens stay, as do those of the prompts that come with the texts.
        progress: Told the number of texts.

    Raises:
        UnsupportedArchitecture: The tokenizer is not one of which tokens can be spared, or the model has no table.
        ConfigError, DataError: The texts are too few, or cannot be read.
    """
    vocabulary = read_vocabulary(name, tokenizer)
    tables = token_tables(name, transformer)
    counts = count_tokens(vocabulary.tokenizer, stream_texts(options.vocab, options.columns), progress=progress)
    told = sorted({*prompts, *prompts_of(options.vocab)})
    in_prompts = itertools.chain.from_iterable(token_ids(vocabulary.tokenizer, told))
    needed = vocabulary.needed(counts.counted, {*named_ids(transformer), *in_prompts})
    size = (text_config(transformer).dtype or torch.float32).itemsize
    return CountedVocabulary(vocabulary, counts, tuple(needed), tuple(map(str, options.vocab)), tables, size)
