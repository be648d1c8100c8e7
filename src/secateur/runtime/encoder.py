"""An exported folder as an encoder: texts in, vectors out, as ``SentenceTransformer.encode`` does it.

All that decides a vector comes from the folder: the tokenizer, the prompts, the length after which a text is cut, the
graph. Batches are made by :mod:`.core`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from secateur.errors import ConfigError, DataError, ModelError
from secateur.runtime.core import CPU_BATCH, Encoder, Tokens, Vectors
from secateur.runtime.sessions import Session, open_session
from secateur.runtime.vectors import FORMATS, VectorFormat, quantize

MANIFEST = "export.json"


@dataclass(frozen=True)
class Settings:
    """What the manifest of an export says of how to encode.

    Attributes:
        vectors: The form in which vectors are given where the caller asks for none.
        ranges: (2, dimension), least and greatest values, for int8 vectors.
        padding: Token id of padding.
        special: Ids of special tokens: one that ends a prompt is not the prompt's.
    """

    backend: str
    precision: str
    dimension: int
    max_length: int
    truncation_side: str
    vectors: VectorFormat
    ranges: NDArray[np.float32]
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    padding: int
    special: frozenset[int]


def load(folder: str | Path, *, threads: int | None = None) -> ExportEncoder:
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
        known = {name: manifest[name] for name in Settings.__dataclass_fields__}
        known |= {"ranges": np.asarray(known["ranges"], np.float32), "special": frozenset(known["special"])}
        settings = Settings(**known)
        file, dynamic = folder / manifest["graph"], manifest["quantization"] == "dynamic"
    except KeyError as error:
        raise ModelError(folder, f"{MANIFEST} has no {error}", "export again") from error
    session = open_session(file, settings.backend, settings.precision, dynamic, threads)
    return ExportEncoder(settings, tokenizer, session, str(folder))


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


class ExportEncoder(Encoder):
    """An exported model in memory; :func:`load` makes it. One thread at a time may use it."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, session: Session, name: str) -> None:
        self.settings, self.name = settings, name
        self.dimension, self.max_length = settings.dimension, settings.max_length
        self.prompts, self.default_prompt = settings.prompts, settings.default_prompt_name
        self.truncation_side, self.dtype = settings.truncation_side, settings.precision
        self.vocabulary = int(tokenizer.get_vocab_size())
        self._tokenizer, self._session = tokenizer, session
        self._tokenizer.no_padding()
        self._prompt_lengths: dict[str, int] = {}

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        batch_tokens: int = CPU_BATCH,
        precision: VectorFormat | None = None,
    ) -> NDArray[Any]:
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
        rows = _rows(texts)
        form = precision or self.settings.vectors
        if form not in FORMATS:
            raise ConfigError("precision", form, f"no such form of vectors as {form!r}", f"one of {', '.join(FORMATS)}")
        for name, size in (("batch_size", 1 if batch_size is None else batch_size), ("batch_tokens", batch_tokens)):
            if not isinstance(size, Integral) or size < 1:
                raise ConfigError(name, size, f"{size!r} is not valid", "a whole number, at least 1")
        self.batch_tokens = batch_tokens
        vectors = self.encode_texts(rows, self._prompt(prompt, prompt_name), batch_size=batch_size)
        result = quantize(vectors, form, self.settings.ranges)
        return result[0] if isinstance(texts, str) else result

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            problem, hint = _no_text(prompt)
            if problem:
                raise ConfigError("prompt", prompt, problem, hint)
            return prompt
        name = name if name is not None else self.default_prompt
        if name is not None and name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ConfigError("prompt_name", name, f"the model has no prompt {name!r}", f"its prompts: {known}")
        return self.prompts[name] if name is not None else ""

    def read(self, texts: Sequence[str], prompt: str, truncate: bool) -> list[Tokens]:
        """See :meth:`Encoder.read`."""
        if truncate:
            self._tokenizer.enable_truncation(self.max_length, direction=self.truncation_side)
        else:
            self._tokenizer.no_truncation()
        if prompt and prompt not in self._prompt_lengths:
            # Counted as sentence-transformers does: alone, without a special token at its end.
            ids = self._tokenizer.encode(prompt).ids
            self._prompt_lengths[prompt] = len(ids) - (bool(ids) and ids[-1] in self.settings.special)
        length = self._prompt_lengths.get(prompt, 0)
        found = self._tokenizer.encode_batch([prompt + text for text in texts])
        return [Tokens(np.asarray(encoding.ids, dtype=np.int32), length) for encoding in found]

    def run(self, batch: Sequence[Tokens]) -> Vectors:
        """See :meth:`Encoder.run`."""
        return self._session(*self.pad(batch, self.settings.padding), batch[0].prompt_length)


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
