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

from secateur.data.vectors import VectorCache, fingerprint_model
from secateur.errors import ConfigError, ModelError
from secateur.files import held, writing
from secateur.healing.remote import connect, embed, is_url
from secateur.loading.models import open_model
from secateur.progress import Progress, quiet, silent

CHUNK = 1024
"""Texts encoded between two files: what a kill costs."""

PROBE = "The gardener cut the hedge back to half its height."
UNUSED = -1
"""The row number of a text that no vector is asked for."""

SAME = 0.999
"""Least cosine between what a teacher makes of the probe now and what is kept."""


@dataclass(frozen=True)
class Teacher:
    """Who teaches.

    Attributes:
        name: What the user calls it: a path, a Hub id, or an address.
        fingerprint: Of its weights; of a server, of its address and model name.
        encode: Texts and the prompt before each → vectors (texts, dimension).
    """

    name: str
    fingerprint: str
    encode: Callable[[list[str], str], NDArray[np.float32]]


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
        max_length: Tokens of a text that a model reads, at most; a server reads the whole text.
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
    if max_length is not None:
        opened.max_seq_length = min(max_length, opened.max_seq_length or max_length)
    return Teacher(str(name), fingerprint_model(opened), partial(_encode, opened))


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
        return self._cache.rows(texts, prompt)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors by row number, (rows, dimension).

        Raises:
            ValueError: A row is :data:`UNUSED`.
        """
        if (rows == UNUSED).any():
            raise ValueError("a text is trained on that the teacher was not asked for")
        return self._cache.read(rows)


def keep_vectors(
    teacher: Teacher, texts: Mapping[str, Sequence[str]], folder: str | Path, progress: Progress = silent
) -> TeacherVectors:
    """Encode what is not kept yet. Of several processes at one folder, one encodes and the others wait for it.

    Args:
        teacher: From :func:`open_teacher`.
        texts: By the prompt before them; a text may repeat.
        folder: Of the vectors of all models, as for :func:`.evaluate`.
        progress: Called after each chunk.

    Raises:
        ModelError: A vector is not finite, or zero, or of another size; or the teacher is not the one that the vectors
            in ``folder`` are of.
        OutputError: The folder cannot be written.
    """
    place = VectorCache(folder, teacher.fingerprint).folder
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    with held(place, wait=True):
        return _keep(teacher, texts, VectorCache(folder, teacher.fingerprint), progress)


def _keep(
    teacher: Teacher, texts: Mapping[str, Sequence[str]], cache: VectorCache, progress: Progress
) -> TeacherVectors:
    _check_same(teacher, cache)
    todo = [(prompt, cache.missing(own, prompt)) for prompt, own in texts.items()]
    total = sum(len(own) for _, own in todo)
    done = 0
    for prompt, own in todo:
        for start in range(0, len(own), CHUNK):
            progress("teacher", done, total)
            chunk = own[start : start + CHUNK]
            cache.encode(chunk, prompt, partial(_checked, teacher, prompt, cache.dimension))
            done += len(chunk)
    if total:
        progress("teacher", total, total)
    return TeacherVectors(teacher, cache)


def _checked(teacher: Teacher, prompt: str, dimension: int, texts: list[str]) -> NDArray[np.float32]:
    vectors = teacher.encode(texts, prompt)
    if dimension and vectors.shape[1] != dimension:
        raise ModelError(teacher.name, f"gives vectors of {vectors.shape[1]} numbers, and earlier of {dimension}")
    bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
    if bad.any():
        text = " ".join(texts[int(bad.argmax())].split())
        raise ModelError(teacher.name, f'gives a vector of NaN, infinity, or all zeros for "{text:.60}"')
    if len(texts) > 1 and np.allclose(vectors, vectors[0], rtol=1e-5, atol=0):
        raise ModelError(teacher.name, f"gives the same vector for {len(texts)} different texts: it teaches nothing")
    return vectors


def _check_same(teacher: Teacher, cache: VectorCache) -> None:
    """A server may have got another model under the same name since the vectors were kept."""
    known = not cache.missing([PROBE], "")
    kept = cache.encode([PROBE], "", partial(_checked, teacher, "", 0))[0]
    if not known:
        return
    now = _checked(teacher, "", cache.dimension, [PROBE])[0]
    cosine = float(kept @ now / np.linalg.norm(kept) / np.linalg.norm(now))
    if cosine < SAME:
        problem = f"is not the model that the vectors in {cache.folder} are of (cosine {cosine:.3f} on the same text)"
        raise ModelError(teacher.name, problem, "name another folder with --cache")
