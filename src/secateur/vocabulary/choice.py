"""Which tokens stay: those that a size or a coverage of the user's texts asks for, and those that every text needs.

The promise: a text whose tokens all stay is tokenized as before. It holds for

- WordPiece, which takes the longest piece that fits, and Unigram, which takes the likeliest split: with fewer tokens to
  take, what was best and is still there is still the best;
- BPE, if every token on the way to one that stays, stays too. The merges inside of a token do not depend on what
  stands beside it, so that the way is found by merging the token alone.
"""

from __future__ import annotations

import heapq
import itertools
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.sources import prompts_of, stream_texts
from secateur.errors import ConfigError, UnsupportedArchitecture
from secateur.models.blocks import text_config
from secateur.options import VocabularyOptions
from secateur.progress import Progress, silent
from secateur.results import VocabularyCut, VocabularyRow
from secateur.vocabulary import trim

COVERAGE = 0.995
"""Share of the tokens of held-out texts that stay, where nobody says."""
ROUND_SIZES = (64000, 32000, 16000, 8000, 4000, 2000)
HELD_OUT = 10
"""One text of so many is held out."""
SAMPLE = 2000
"""Held-out texts that are kept, to be tokenized again with a smaller vocabulary."""
FEWEST = 20
"""Texts without which nothing can be said of others."""
BATCH = 1024
"""Texts that are tokenized at once."""
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""What a tokenizer with byte fallback makes of characters that it does not know."""


# ---- the tokens, and which of them must stay


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a ``tokenizer.json``, of which ``rules`` is the content."""

    rules: Mapping[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return trim.plain_tokenizer(self.rules)

    @property
    def model(self) -> Mapping[str, Any]:
        return self.rules["model"]

    @cached_property
    def in_model(self) -> dict[str, int]:
        """Token → id, of those that the model makes of texts."""
        vocab = self.model["vocab"]
        return {item[0]: i for i, item in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token → id, of all: the added ones too."""
        return self.in_model | {token["content"]: token["id"] for token in self.rules["added_tokens"]}

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self.in_model.items()}

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {(left, right): rank for rank, (left, right) in enumerate(self.model.get("merges", ()))}

    @property
    def unknown(self) -> int | None:
        """Id of the unknown token; None where there is none."""
        unknown: int | None = self.model.get("unk_id")
        return self.ids.get(self.model.get("unk_token") or "") if unknown is None else unknown

    def needed(self, frequency: NDArray[np.float64], named: Iterable[int] = ()) -> list[int]:
        """Ids that stay in any case: special and added tokens, those named, and all that a rare word falls back to.

        ``frequency`` (ids,) is that of the tokens in the texts, which tell the characters that they are made of.
        """
        wanted = {token["id"] for token in self.rules["added_tokens"]} | set(trim.written_ids(self.rules))
        wanted |= {self.in_model[token] for token in self._fallback(frequency)}
        wanted |= {self.unknown, *named}.intersection(self.ids.values())
        return sorted(wanted.union(*(self.on_the_way(i) for i in wanted)))

    def order(self, frequency: NDArray[np.float64], needed: Sequence[int]) -> Iterator[int]:
        """All ids, the needed ones first and then the most useful; what is on the way to a token precedes it.

        So the first of them, however many, are a vocabulary.
        """
        given = set(needed)
        yield from needed
        for token in self._by_use(frequency):
            if token not in given:
                fresh = [i for i in self.on_the_way(token) if i not in given]
                given.update(fresh, (token,))
                yield from (*fresh, token)

    def _by_use(self, frequency: NDArray[np.float64]) -> list[int]:
        """All ids by frequency ÷ rank: that in the texts or that in the vocabulary, whichever is better.

        Tokenizers list their tokens by how frequent these were in the texts that they were made from. Of two tokens
        that are as rare in the user's texts, the one that is common elsewhere is likelier to be in the next text.
        Single characters are listed in another order.
        """
        there = np.array(sorted(set(self.ids.values())))
        longer = self.of_several_characters()
        listed = np.full(len(frequency), np.inf)
        listed[longer] = np.arange(1, len(longer) + 1)
        counted = np.empty(len(frequency))
        counted[np.argsort(-frequency, kind="stable")] = np.arange(1, len(frequency) + 1)
        use = frequency / np.minimum(listed, counted)
        return there[np.lexsort((listed[there], -use[there]))].tolist()

    def of_several_characters(self) -> list[int]:
        """Ids, ascending, of the tokens of several characters that a text can have: BERT's [unused1] is none."""
        longer = {token: i for token, i in self.in_model.items() if len(self._pieces(token)) > 1}
        if self.model["type"] == "WordPiece":
            words = [token for token in longer if not token.startswith(self.model["continuing_subword_prefix"])]
            for word, ids in zip(words, trim.token_ids(self.tokenizer, words), strict=True):
                if longer[word] not in ids:
                    del longer[word]
        return sorted(longer.values())

    def on_the_way(self, token: int) -> list[int]:
        """Ids of what BPE merges into a token, in the order in which they come to be; of other models none."""
        text = self._tokens.get(token)
        if text is None or self.model["type"] != "BPE":
            return []
        prefix = self.model.get("continuing_subword_prefix") or ""
        symbols = self._pieces(text)
        made = list(symbols)
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            best = min(range(len(pairs)), key=lambda place: self._ranks.get(pairs[place], len(self._ranks)))
            if pairs[best] not in self._ranks:
                return []  # no text is tokenized to it, but for one that is looked up whole (ignore_merges)
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1].removeprefix(prefix)]
            made.append(symbols[best])
        return [self.in_model[symbol] for symbol in dict.fromkeys(made) if symbol in self.in_model and symbol != text]

    def _pieces(self, token: str) -> list[str]:
        """The smallest pieces that a token can be split into."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        suffix = self.model.get("end_of_word_suffix") or ""
        continues = bool(prefix) and token.startswith(prefix) and token != prefix
        bare = token.removeprefix(prefix) if continues else token
        ends = bool(suffix) and bare.endswith(suffix) and bare != suffix
        characters = list(bare.removesuffix(suffix) if ends else bare)
        if ends:
            characters[-1] += suffix
        return [piece if i == 0 and not continues else prefix + piece for i, piece in enumerate(characters)]

    def _fallback(self, frequency: NDArray[np.float64]) -> set[str]:
        """What a word is made of whose tokens do not stay: bytes; else single characters, those of the texts and ASCII.

        Other characters become unknown: all of them, in all scripts, would take a quarter of a small vocabulary. (Of
        byte-level BPE, the single characters stand for bytes; all stay.)
        """
        tokens = self.in_model
        pieces = {token: self._pieces(token) for token in tokens}
        smallest = {token for token, own in pieces.items() if own == [token]}
        if self.model.get("byte_fallback") and tokens.keys() >= BYTES:
            smallest = set(BYTES)
        elif self.model["type"] != "BPE":
            in_texts = "".join(token for token, i in tokens.items() if frequency[i] > 0)
            characters = {*in_texts, *map(chr, range(128))}
            # Those with a character that has no token of its own cannot be split either.
            smallest |= {token for token, own in pieces.items() if not tokens.keys() >= set(own)}
            smallest = {token for token in smallest if characters.issuperset(token)}
        if self.model["type"] == "Unigram":
            # What an unknown character costs depends on the least likely token.
            smallest.add(min(self.model["vocab"], key=lambda item: item[1])[0])
        return smallest


def read_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase | None) -> Vocabulary:
    """The tokens of a model's tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedArchitecture(name, f"its {type(tokenizer).__name__} has no list of tokens that could be cut")
    rules = json.loads(backend.to_str())
    if (kind := rules["model"]["type"]) not in ("BPE", "WordPiece", "Unigram"):
        problem = f"its tokenizer is of the kind {kind}, of which no token can be spared"
        raise UnsupportedArchitecture(name, problem, "vocabularies of BPE, WordPiece and Unigram can be cut")
    return Vocabulary(rules)


# ---- how frequent they are in the user's texts


@dataclass(frozen=True)
class TokenCounts:
    """How frequent each token is, by its id: its share of the tokens of a file, averaged over the files.

    ``counted`` (ids,) is that in the texts by which tokens are chosen, ``held_out`` (ids,) in the others, ``texts`` the
    number of all texts, each copy counted, ``sample`` some of those held out, about as many of each file.
    """

    counted: NDArray[np.float64]
    held_out: NDArray[np.float64]
    texts: int
    sample: list[str]


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace"))


def count_tokens(tokenizer: Tokenizer, files: Sequence[Iterable[str]], *, progress: Progress = silent) -> TokenCounts:
    """Count the tokens of texts in full length, special tokens left out; only a piece of the texts is in memory.

    Each of the files has the same weight, as in a profile. Which texts are held out is told by a hash of each, so that
    all copies of a text are on one side.
    """
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    shares, seen, sample = np.zeros((2, size)), 0, list[str]()
    most = max(1, SAMPLE // len(files))
    for texts in map(iter, files):
        counts, own = np.zeros((2, size), np.int64), list[str]()
        while batch := list(itertools.islice(texts, BATCH)):
            sides: tuple[list[str], list[str]] = ([], [])
            for text in batch:
                sides[_hash(text) % HELD_OUT == 0].append(text)
            for side, part in enumerate(sides):
                ids = itertools.chain.from_iterable(trim.token_ids(tokenizer, part))
                counts[side] += np.bincount(np.fromiter(ids, np.int64), minlength=size)
            own = heapq.nsmallest(most, [*own, *sides[1]], key=_hash)
            seen += len(batch)
            progress("count tokens, texts", seen, 0)
        shares += counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        sample += own
    progress("count tokens, texts", seen, seen)
    if seen < FEWEST or not shares.any(axis=1).all():
        problem = f"{seen} texts are too few, or too much alike, to tell which tokens others need"
        raise ConfigError("vocab", seen, problem, f"at least {FEWEST} different ones, better thousands")
    counted, held_out = shares / shares.sum(axis=1, keepdims=True)
    return TokenCounts(counted, held_out, seen, sample)


@dataclass(frozen=True)
class CountedVocabulary:
    """The vocabulary of the tokenizer of ``model``, with what the texts of some files need of it.

    ``needed`` are the ids that stay in any case, ascending; ``itemsize`` is bytes of a number in a table.
    """

    model: str
    vocabulary: Vocabulary
    counts: TokenCounts
    needed: tuple[int, ...]
    files: tuple[str, ...]
    tables: tuple[trim.TokenTable, ...]
    itemsize: int

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """All ids; the first of them, however many from ``needed`` on, are a vocabulary."""
        return np.array(list(self.vocabulary.order(self.counts.counted, self.needed)))

    @cached_property
    def coverage(self) -> NDArray[np.float64]:
        """Share of the tokens of held-out texts that stay with the first n + 1 tokens of the order."""
        found = np.cumsum(self.counts.held_out[self.order])
        return found / found[-1]  # all tokens cover exactly 1

    def kept(self, size: int) -> tuple[int, ...]:
        """Ids of the tokens of a vocabulary of that size, ascending."""
        return tuple(sorted(self.order[:size].tolist()))

    def size_of(self, options: VocabularyOptions) -> int:
        """The size that is asked for."""
        size, fewest, most = options.vocab_size, len(self.needed), len(self.order)
        if size is None:
            asked = COVERAGE if options.vocab_coverage is None else options.vocab_coverage
            enough = int(np.searchsorted(self.coverage, asked - 1e-12)) + 1
            return min(max(enough, fewest), most)
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
        gone = [table.width * table.rows - left for table, left in zip(self.tables, self.parameters(size), strict=True)]
        packed = sum(number for table, number in zip(self.tables, gone, strict=True) if table.packed)
        return sum(gone) - packed, packed

    @cached_property
    def _before(self) -> list[array[int]]:
        return trim.token_ids(self.vocabulary.tokenizer, self.counts.sample)

    def coverage_of(self, texts: Sequence[str], size: int) -> float:
        """Share of the tokens of some texts that stay in a vocabulary of that size."""
        kept, found = set(self.kept(size)), trim.token_ids(self.vocabulary.tokenizer, list(texts))
        return sum(i in kept for ids in found for i in ids) / max(1, sum(map(len, found)))

    @property
    def tokens_per_text(self) -> float:
        """Of the held-out texts with all tokens."""
        return float(np.mean([len(ids) for ids in self._before]))

    def row(self, size: int) -> VocabularyRow:
        """What a vocabulary of that size does to the held-out texts."""
        kept = self.kept(size)
        there = set(kept)
        cut = trim.plain_tokenizer(trim.keep_tokens(self.vocabulary.rules, kept))
        before, after = self._before, trim.token_ids(cut, self.counts.sample)
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
        removed, told = self.removed(size), (self.tokens_per_text, self.counts.texts, self.files)
        return VocabularyCut(self.row(size), len(self.order), *told, removed=removed)

    def sizes(self) -> list[int]:
        """Round sizes that are possible, and the whole, the largest first."""
        whole = len(self.order)
        return [whole, *(size for size in ROUND_SIZES if len(self.needed) <= size < whole)]

    def allowed(self, options: VocabularyOptions) -> list[int]:
        """The sizes that a budget may take, the largest first: a size that is named, or all from a coverage on."""
        least = self.size_of(options)
        larger = [] if options.vocab_size is not None else [size for size in self.sizes() if size > least]
        return [*larger, least]


def count_vocabulary(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    transformer: PreTrainedModel,
    options: VocabularyOptions,
    *,
    prompts: Iterable[str] = (),
    progress: Progress = silent,
) -> CountedVocabulary:
    """Count the tokens of the texts that ``options.vocab`` names, for a transformer that needs no weights.

    The tokens of ``prompts``, the model's, stay, as do those of the prompts that come with the texts.
    """
    vocabulary = read_vocabulary(name, tokenizer)
    tables = trim.token_tables(name, transformer)
    counts = count_tokens(vocabulary.tokenizer, stream_texts(options.vocab, options.columns), progress=progress)
    in_prompts = trim.token_ids(vocabulary.tokenizer, sorted({*prompts, *prompts_of(options.vocab, options.columns)}))
    needed = vocabulary.needed(counts.counted, trim.named_ids(transformer).union(*in_prompts))
    size = (text_config(transformer).dtype or torch.float32).itemsize
    return CountedVocabulary(name, vocabulary, counts, tuple(needed), tuple(map(str, options.vocab)), tables, size)
