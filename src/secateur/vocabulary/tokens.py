"""Which tokens must stay, in which order the others are worth it, and a ``tokenizer.json`` without the rest.

The promise: a text whose tokens all stay is tokenized as before. It holds for

- WordPiece, which takes the longest piece that fits, and Unigram, which takes the likeliest split: with fewer tokens to
  take, what was best and is still there is still the best;
- BPE, if every token on the way to one that stays, stays too. The merges inside of a token do not depend on what
  stands beside it, so that the way is found by merging the token alone.

``skeletoken`` edits this format, too. It refuses MiniLM's published file (a truncation without direction), takes twenty
seconds for Gemma 3's, and does not know what is on the way to a token; what is left of it is :func:`keep_tokens`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from secateur.errors import UnsupportedArchitecture

KINDS = ("BPE", "WordPiece", "Unigram")
WRITERS = ("post_processor", "padding")
"""Parts of a ``tokenizer.json`` that put tokens into texts, by their ids."""
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""What a tokenizer with byte fallback makes of characters that it does not know."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a ``tokenizer.json``, of which ``rules`` is the content."""

    rules: Mapping[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return plain_tokenizer(self.rules)

    @property
    def model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.rules["model"]
        return model

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
        special = {token["id"] for token in self.rules["added_tokens"]}
        special |= set() if self.unknown is None else {self.unknown}
        written: list[int] = []  # into texts, by the post-processor and the padding
        for key in WRITERS:
            _each_id(self.rules.get(key), written.append)
        fallback = {self.in_model[token] for token in self._fallback(frequency)}
        there = set(self.ids.values())
        wanted = special.union(written, fallback, (i for i in named if i in there))
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

        Tokenizers list their tokens by how frequent these were in the texts that they were made from (BPE by its
        merges, Unigram by its scores). Of two tokens that are as rare in the user's texts, the one that is common
        elsewhere is likelier to be in the next text. Single characters are listed in another order.
        """
        there = np.array(sorted(set(self.ids.values())))
        longer = self.of_several_characters()
        listed = np.full(len(frequency), np.inf)
        listed[longer] = np.arange(1, len(longer) + 1)
        counted = np.empty(len(frequency))
        counted[np.argsort(-frequency, kind="stable")] = np.arange(1, len(frequency) + 1)
        use = frequency / np.minimum(listed, counted)
        ids: list[int] = there[np.lexsort((listed[there], -use[there]))].tolist()
        return ids

    def of_several_characters(self) -> list[int]:
        """Ids, ascending, of the tokens of several characters that a text can have: BERT's [unused1] is none."""
        longer = {token: i for token, i in self.in_model.items() if len(self._pieces(token)) > 1}
        if self.model["type"] == "WordPiece":
            words = [token for token in longer if not token.startswith(self.model["continuing_subword_prefix"])]
            for word, ids in zip(words, token_ids(self.tokenizer, words), strict=True):
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


def plain_tokenizer(rules: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from the content of its ``tokenizer.json``, that neither cuts nor pads."""
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of the tokens of each text, special ones left out."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def read_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase | None) -> Vocabulary:
    """The tokens of a model's tokenizer.

    Raises:
        UnsupportedArchitecture: Its ids do not stand for the tokens of a list: characters, bytes, hashes, whole words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__
    if backend is None:
        raise UnsupportedArchitecture(name, f"its {kind} has no list of tokens that could be cut")
    rules = json.loads(backend.to_str())
    if rules["model"]["type"] not in KINDS:
        problem = f"its tokenizer is of the kind {rules['model']['type']}, of which no token can be spared"
        raise UnsupportedArchitecture(name, problem, f"vocabularies of {', '.join(KINDS)} can be cut")
    return Vocabulary(rules)


def keep_tokens(rules: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A ``tokenizer.json`` with some of its tokens; ``kept`` are their ids, and the new id of each is its place."""
    place = {old: new for new, old in enumerate(kept)}
    model = dict(rules["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [item for i, item in enumerate(model["vocab"]) if i in place]
        model["unk_id"] = place.get(model["unk_id"])
    else:
        model["vocab"] = {token: place[i] for token, i in model["vocab"].items() if i in place}
    if "merges" in model:
        prefix, there = model.get("continuing_subword_prefix") or "", model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in there and right in there and left + right.removeprefix(prefix) in there
        ]
    added = [token | {"id": place[token["id"]]} for token in rules["added_tokens"] if token["id"] in place]
    renumbered = {key: _each_id(rules.get(key), place.__getitem__) for key in WRITERS}
    return {**rules, "model": model, "added_tokens": added, **renumbered}


def _each_id(part: Any, change: Callable[[int], Any]) -> Any:
    """A post-processor or a padding with other ids."""
    if isinstance(part, list):
        return [_each_id(item, change) for item in part]
    if not isinstance(part, dict):
        return part
    changed = {key: _each_id(value, change) for key, value in part.items()}
    for key, value in part.items():
        if key == "ids" and isinstance(value, list):
            changed[key] = [change(i) for i in value]
        elif key in ("sep", "cls") and isinstance(value, list):
            changed[key] = [value[0], change(value[1])]
        elif key == "pad_id" and isinstance(value, int):
            changed[key] = change(value)
    return changed
