"""An exported folder as an encoder: texts in, vectors out, as ``SentenceTransformer.encode`` does it.

Texts are sorted by length and batched by a budget of tokens; lengths are rounded up, so that a backend meets few
shapes. All that decides a vector comes from the folder: the tokenizer, the prompts, the length after which a text is
cut, the graph.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from secateur.errors import ConfigError, DataError, ModelError
from secateur.runtime.sessions import Ids, Session, open_session
from secateur.runtime.slices import CHARACTERS_PER_TOKEN, cut_characters, slices
from secateur.runtime.vectors import FORMATS, VectorFormat, quantize

MANIFEST = "export.json"
LENGTH_STEP = 8  # as serving.encoders; what runs without torch imports nothing of it
BATCH_TOKENS = 1024
"""Tokens in a batch, padding included: what lies between two layers then stays in the processor's cache."""


def load(folder: str | Path, *, threads: int | None = None) -> Encoder:
    """Open an exported folder.

    Args:
        folder: What ``secateur export`` wrote.
        threads: Threads of the backend; default: all cores.

    Raises:
        ModelError: The folder is no export, or not whole.
        MissingPackage: Its backend is not installed.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(folder, f"has no readable tokenizer.json ({error})") from error
    try:
        settings = Settings(
            backend=manifest["backend"],
            precision=manifest["precision"],
            dimension=manifest["dimension"],
            max_length=manifest["max_length"],
            truncation_side=manifest["truncation_side"],
            vectors=manifest["vectors"],
            ranges=np.asarray(manifest["ranges"], np.float32),
            prompts=manifest["prompts"],
            default_prompt_name=manifest["default_prompt_name"],
            padding=manifest["padding"],
            special=frozenset(manifest["special"]),
        )
        file, dynamic = folder / manifest["graph"], manifest["quantization"] == "dynamic"
    except KeyError as error:
        raise ModelError(folder, f"{MANIFEST} has no {error}", "export again") from error
    session = open_session(file, settings.backend, settings.precision, dynamic, threads)
    return Encoder(settings, tokenizer, session, str(folder))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(folder, f"has no {MANIFEST}", "give a folder that secateur export wrote") from None
    except (OSError, ValueError) as error:
        raise ModelError(folder, f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != "export":
        raise ModelError(folder, f"{MANIFEST} is no manifest of an export", "give a folder that secateur export wrote")
    return manifest


@dataclass(frozen=True)
class Settings:
    """What the manifest of an export says of how to encode.

    Attributes:
        dimension: Numbers in a vector.
        max_length: Tokens after which a text is cut, special ones and the prompt's included, on ``truncation_side``.
        vectors: The form in which vectors are given where the caller asks for none.
        ranges: (2, dimension), least and greatest values, for int8 vectors.
        prompts: Name → what goes before a text.
        padding: Token id of padding.
        special: Ids of special tokens: one that ends a prompt is not the prompt's.
    """

    backend: str
    precision: str
    dimension: int
    max_length: int
    truncation_side: str
    vectors: VectorFormat
    ranges: npt.NDArray[np.float32]
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    padding: int
    special: frozenset[int]


class Encoder:
    """An exported model in memory; :func:`load` makes it. One thread at a time may use it."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, session: Session, name: str) -> None:
        self.settings = settings
        self._name = name
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._session = session
        self._prompt_lengths: dict[str, int] = {}

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        precision: VectorFormat | None = None,
    ) -> npt.NDArray[Any]:
        """Encode texts.

        Args:
            texts: One text or several.
            prompt_name: A name of the model's prompts; the default is the model's own default.
            prompt: Goes before each text, in place of a named one.
            batch_size: Texts in a batch, at most.
            batch_tokens: Tokens in a batch, padding included; a longer text goes alone.
            precision: Form of the vectors: ``float32``, ``int8``, ``uint8``, ``binary`` or ``ubinary``.

        Returns:
            (texts, dimension), one row for each text in their order; for one text, its row alone. A text that has no
            tokens gets a vector of zeros.

        Raises:
            DataError: A text is not a text.
            ConfigError: There is no such prompt or precision, or a batch has no room.
            ModelError: A vector is not finite.
        """
        single = isinstance(texts, str)
        rows = _rows(texts)
        form = precision or self.settings.vectors
        if form not in FORMATS:
            raise ConfigError("precision", form, f"no such form of vectors as {form!r}", f"one of {', '.join(FORMATS)}")
        _check_sizes(batch_size, batch_tokens)
        vectors = self._vectors(rows, self._prompt(prompt, prompt_name), batch_size, batch_tokens)
        result = quantize(vectors, form, self.settings.ranges)
        return result[0] if single else result

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            problem, hint = _no_text(prompt)
            if problem:
                raise ConfigError("prompt", prompt, problem, hint)
            return prompt
        name = name if name is not None else self.settings.default_prompt_name
        if name is None:
            return ""
        if name not in self.settings.prompts:
            known = ", ".join(self.settings.prompts) or "none"
            raise ConfigError("prompt_name", name, f"the model has no prompt {name!r}", f"its prompts: {known}")
        return self.settings.prompts[name]

    def _vectors(
        self, texts: Sequence[str], prompt: str, batch_size: int | None, batch_tokens: int
    ) -> npt.NDArray[np.float32]:
        return self.encode_tokens(
            self.tokenize(texts, prompt), self.prompt_length(prompt), batch_size=batch_size, batch_tokens=batch_tokens
        )

    def encode_tokens(
        self,
        tokens: Sequence[Sequence[int]],
        prompt_length: int = 0,
        *,
        batch_size: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> npt.NDArray[np.float32]:
        """Vectors (texts, dimension) of tokenized texts under one prompt; the options are those of :meth:`encode`.

        Raises:
            ModelError: A vector is not finite.
        """
        vectors = np.zeros((len(tokens), self.settings.dimension), np.float32)
        for batch in _batches([len(ids) for ids in tokens], batch_size, batch_tokens, self.settings.max_length):
            vectors[batch] = self.run([tokens[i] for i in batch], prompt_length)
        if not np.isfinite(vectors).all():
            hint = "its weights hold NaN, or overflow; or it pools nothing of an empty text"
            raise ModelError(self._name, "gives vectors that are not finite", hint)
        return vectors

    def tokenize(self, texts: Sequence[str], prompt: str = "", *, truncate: bool = True) -> list[list[int]]:
        """Token ids of each text with a prompt before it; without ``truncate`` also of what is too long."""
        longest = self.settings.max_length * CHARACTERS_PER_TOKEN if truncate else sys.maxsize
        if truncate:
            self._tokenizer.enable_truncation(self.settings.max_length, direction=self.settings.truncation_side)
        else:
            self._tokenizer.no_truncation()
        return [ids for some in slices(texts, longest) for ids in self._read(some, prompt, longest)]

    def _read(self, texts: Sequence[str], prompt: str, longest: int) -> list[list[int]]:
        """Token ids from so many characters of each text, or from more where the tokenizer would not have to cut."""
        cut = [cut_characters(text, longest, self.settings.truncation_side) for text in texts]
        found = self._tokenizer.encode_batch([prompt + part for part in cut])
        tokens: list[list[int]] = []
        for text, part, encoding in zip(texts, cut, found, strict=True):
            enough = len(part) == len(text) or encoding.overflowing
            tokens += [encoding.ids] if enough else self._read([text], prompt, 2 * longest)
        return tokens

    def run(self, tokens: Sequence[Sequence[int]], prompt_length: int = 0) -> npt.NDArray[np.float32]:
        """Vectors (texts, dimension) of texts that start with as many tokens of a prompt, in one pass of the graph."""
        return self._session(*self._padded(tokens), prompt_length)

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self._tokenizer.get_vocab_size())

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt, counted as sentence-transformers does: alone, without a special token at its end."""
        if not prompt:
            return 0
        if prompt not in self._prompt_lengths:
            ids = self._tokenizer.encode(prompt).ids
            self._prompt_lengths[prompt] = len(ids) - (bool(ids) and ids[-1] in self.settings.special)
        return self._prompt_lengths[prompt]

    def _padded(self, tokens: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
        """Arrays (batch, length), padded on the right: there a text has the positions that it has alone."""
        length = _rounded(max(map(len, tokens)), self.settings.max_length)
        ids = np.full((len(tokens), length), self.settings.padding, np.int64)
        mask = np.zeros((len(tokens), length), np.int64)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        return ids, mask


def _rows(texts: object) -> list[str]:
    """The texts, which may be one; refuses what is none."""
    if isinstance(texts, (Mapping, Set, bytes)) or not isinstance(texts, Iterable):
        raise DataError("texts", f"is a {type(texts).__name__}, not texts", "give one text, or a list of them")
    rows = [texts] if isinstance(texts, str) else list(texts)
    for place, text in enumerate(rows):
        problem, hint = _no_text(text)
        if problem:
            raise DataError("texts", f"number {place} {problem}", hint)
    return rows


def _no_text(value: object) -> tuple[str, str]:
    """Why a value cannot be tokenized, and what would be right; empty where it can."""
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, not a text", ""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"holds half of a surrogate pair, at character {error.start}"
        return problem, "decode it as UTF-8 with errors='replace'"
    return "", ""


def _check_sizes(batch_size: int | None, batch_tokens: int) -> None:
    for name, size in (("batch_size", 1 if batch_size is None else batch_size), ("batch_tokens", batch_tokens)):
        if not isinstance(size, Integral) or size < 1:
            raise ConfigError(name, size, f"{size!r} is not valid", "a whole number, at least 1")


def _rounded(length: int, longest: int) -> int:
    return min(-(-length // LENGTH_STEP) * LENGTH_STEP, max(longest, length))


def _batches(lengths: Sequence[int], size: int | None, budget: int, longest: int) -> Iterator[list[int]]:
    """Places of texts that go through the model together, longest first; texts without tokens go nowhere."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        fitting = max(1, budget // _rounded(lengths[order[start]], longest))
        end = start + min(fitting, size or fitting)
        yield order[start:end]
        start = end
