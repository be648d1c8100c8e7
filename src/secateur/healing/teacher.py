"""What a teacher makes of texts: each encoded once, kept on disk, mapped into memory, read row by row.

A teacher is any model that this package opens, or a server that speaks the OpenAI embeddings API. Its vectors are kept
by :mod:`.vectors`, under the model's fingerprint, as they come: a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from secateur.data.vectors import VectorCache, fingerprint_model, folder_of
from secateur.errors import ConfigError, ModelError
from secateur.files import lock, output_errors
from secateur.healing.remote import connect, embed, is_url
from secateur.models.open_model import open_model
from secateur.progress import Progress, quiet, silent

CHUNK = 1024
"""Texts encoded between two files: what a kill costs."""

PROBES = ("The gardener cut the hedge back to half its height.", "42, 7; 1999?", "Interest")
SAME = 0.999
"""Least cosine between what a teacher makes of a probe now and what is kept."""
ALIKE = 1e-6
"""Vectors that all differ by less, as a share of their length, are one vector."""
MANY = 16
"""Texts of which a teacher must tell one from the others; a few may be alike to it, such as emoji."""
UNUSED = -1
"""In the place of the row number of a text that no batch holds."""


@dataclass(frozen=True)
class Teacher:
    """Who teaches.

    Attributes:
        name: What the user calls it: a path, a Hub id, or an address.
        fingerprint: Of its weights; of a server, of its address and model name.
        encode: Texts and the prompt before each → vectors (texts, dimension).
        length: Tokens to which it cuts a text; None where that is the server's business.
    """

    name: str
    fingerprint: str
    encode: Callable[[list[str], str], NDArray[np.float32]]
    length: int | None = None

    def context(self, prompt: str) -> str:
        """What a vector depends on besides the weights and the text."""
        return prompt if self.length is None else f"{self.length} tokens: {prompt}"


def open_teacher(
    name: str | Path,
    *,
    model: str | None = None,
    max_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """Open a model, or connect to a server (:mod:`.remote`).

    Args:
        name: Whatever :func:`.open_model` opens, or ``http(s)://host/v1``.
        model: What a server calls its model.
        max_length: Tokens of its own to which a model cuts texts, where its own limit is not lower. A server cuts as it
            does.
        device: Torch device of a model.
        trust_remote_code: As for ``open_model``.

    Raises:
        ModelError, ConfigError: It cannot be opened or reached.
    """
    if is_url(name):
        server = connect(str(name), model)
        identity = hashlib.sha256(f"{server.url}\0{server.model}".encode()).hexdigest()
        return Teacher(str(name), identity, lambda texts, prompt: embed(server, [prompt + text for text in texts]))
    if model is not None:
        raise ConfigError("teacher_model", model, f"names a server's model, and {name} is no server", "leave it out")
    opened = open_model(name, device=device, trust_remote_code=trust_remote_code)
    fingerprint = fingerprint_model(opened)  # of the model as it came: its length is told beside it
    lengths = [length for length in (max_length, opened.max_seq_length) if length]
    opened.max_seq_length = min(lengths, default=None)
    return Teacher(str(name), fingerprint, partial(_encode, opened), opened.max_seq_length)


def _encode(model: SentenceTransformer, texts: list[str], prompt: str) -> NDArray[np.float32]:
    """Without a prompt of the data, the model puts its own default prompt before the texts, if it has one."""
    with quiet():
        vectors = model.encode(texts, prompt=prompt or None, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)


class TeacherVectors:
    """Kept vectors of one teacher, found by text and read by row; made by :func:`keep_vectors`."""

    def __init__(self, teacher: Teacher, cache: VectorCache) -> None:
        self.name = teacher.name
        self.fingerprint = teacher.fingerprint
        self._context = teacher.context
        self._cache = cache

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        return self._cache.dimension

    def rows(self, texts: Sequence[str], prompt: str = "") -> NDArray[np.int64]:
        """Row numbers of texts, (texts,), in this process.

        Raises:
            KeyError: A text was not among those that the vectors were made of.
        """
        return self._cache.rows(texts, self._context(prompt))

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors by row number, (rows, dimension)."""
        assert (rows != UNUSED).all(), "a batch holds a text that used_rows() did not foresee"
        return self._cache.read(rows)


def keep_vectors(
    teacher: Teacher, texts: Mapping[str, Sequence[str]], folder: str | Path, progress: Progress = silent
) -> TeacherVectors:
    """Encode what is not kept yet.

    Args:
        teacher: From :func:`open_teacher`.
        texts: By the prompt before them; a text may repeat.
        folder: Of the vectors of all models, as for :func:`.evaluate`.
        progress: Called after each chunk.

    Runs that keep vectors of one teacher in one folder encode one after another, so that none does what another has
    done.

    Raises:
        ModelError: A vector is not finite, or zero, or of another size; the teacher gives one vector for different
            texts, or is not the one that the vectors in ``folder`` are of.
        OutputError: The folder cannot be written.
    """
    own_folder = folder_of(folder, teacher.fingerprint)
    with output_errors(own_folder):
        own_folder.mkdir(parents=True, exist_ok=True)
    with lock(own_folder, wait=True):
        cache = VectorCache(folder, teacher.fingerprint)
        _check_probes(teacher, cache)
        _encode_missing(teacher, texts, cache, progress)
    return TeacherVectors(teacher, cache)


def _encode_missing(
    teacher: Teacher, texts: Mapping[str, Sequence[str]], cache: VectorCache, progress: Progress
) -> None:
    todo = [(prompt, cache.missing(own, teacher.context(prompt))) for prompt, own in texts.items()]
    total = sum(len(own) for _, own in todo)
    done = 0
    for prompt, own in todo:
        for start in range(0, len(own), CHUNK):
            progress("teacher", done, total)
            chunk = own[start : start + CHUNK]
            cache.encode(chunk, teacher.context(prompt), partial(_checked, teacher, prompt, cache.dimension))
            done += len(chunk)
    if total:
        progress("teacher", total, total)


def _checked(teacher: Teacher, prompt: str, dimension: int, texts: list[str]) -> NDArray[np.float32]:
    vectors = teacher.encode(texts, prompt)
    if dimension and vectors.shape[1] != dimension:
        raise ModelError(teacher.name, f"gives vectors of {vectors.shape[1]} numbers, and earlier of {dimension}")
    bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
    if bad.any():
        text = " ".join(texts[int(bad.argmax())].split())
        raise ModelError(teacher.name, f'gives a vector of NaN, infinity, or all zeros for "{text:.60}"')
    if len(texts) >= MANY:
        _check_differ(teacher, vectors)
    return vectors


def _check_differ(teacher: Teacher, vectors: NDArray[np.float32]) -> None:
    """Refuse a teacher that gives one vector for all texts: there is nothing to learn from it."""
    if np.abs(vectors - vectors[0]).max() <= ALIKE * np.linalg.norm(vectors[0]):
        raise ModelError(teacher.name, f"gives the same vector for {len(vectors)} different texts")


def _check_probes(teacher: Teacher, cache: VectorCache) -> None:
    """Refuse a teacher of one vector, and a server that has got another model since the vectors were kept."""
    known = [text for text in PROBES if text not in cache.missing(PROBES, teacher.context(""))]
    now = _checked(teacher, "", cache.dimension, list(PROBES))
    _check_differ(teacher, now)
    kept = cache.encode(PROBES, teacher.context(""), lambda texts: now[[PROBES.index(text) for text in texts]])
    cosines = [1.0 if text not in known else _cosine(*pair) for text, *pair in zip(PROBES, kept, now, strict=True)]
    if min(cosines) < SAME:
        problem = f"is not the model that the vectors in {cache.folder} are of (cosine {min(cosines):.3f} on one text)"
        raise ModelError(teacher.name, problem, "name another folder with --cache")


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
