"""A teacher's vectors: each text encoded once, kept on disk, mapped into memory, read row by row.

A teacher is any model that this package opens, or a server that speaks the OpenAI embeddings API. Its vectors are kept
by :mod:`.vectors`, under the model's fingerprint: a run that was killed continues where it was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from secateur.data.vectors import VectorCache, fingerprint_model, folder_of
from secateur.errors import ConfigError, MissingPackage, ModelError
from secateur.files import lock, output_errors
from secateur.healing.training_data import TrainingSet
from secateur.models.open_model import open_model
from secateur.progress import Progress, quiet, silent

if TYPE_CHECKING:
    from openai import OpenAI

LABEL = "label"
"""The column of a teacher's row numbers, one for each text of a row."""
UNUSED = -1
"""In place of the row number of a text that no batch holds."""

CHUNK = 1024
"""Texts encoded between two files: what a kill costs."""
PROBES = ("The gardener cut the hedge back to half its height.", "42, 7; 1999?", "Interest")
SAME = 0.999
"""Least cosine between what a teacher makes of a probe now and what is kept."""
ALIKE = 1e-6
"""Vectors that all differ by less, as a share of their length, are one vector."""
MANY = 16
"""Texts of which a teacher must tell one from the others; a few may be alike to it, such as emoji."""

KEY, COMMON_KEY = "SECATEUR_TEACHER_KEY", "OPENAI_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
REQUEST_TEXTS = 128
TIMEOUT = 60.0
"""Seconds without a sign of life."""
RETRIES = 8


@dataclass(frozen=True)
class Teacher:
    """Who gives the vectors.

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
    """Open a model, or connect to a server.

    Args:
        name: Whatever :func:`.open_model` opens, or ``http(s)://host/v1``.
        model: What a server calls its model; it may be left out where the server has one only.
        max_length: Tokens to which a model cuts texts, where its own limit is not lower. A server cuts as it does.
        device: Torch device of a model.
        trust_remote_code: As for ``open_model``.

    Raises:
        ModelError, ConfigError: It cannot be opened or reached.
        MissingPackage: A server, without the package openai.
    """
    if str(name).startswith(("http://", "https://")):
        client = connect(str(name))
        model = model or _only_model(client)
        identity = hashlib.sha256(f"{str(name).rstrip('/')}\0{model}".encode()).hexdigest()
        return Teacher(str(name), identity, lambda texts, prompt: embed(client, model, [prompt + t for t in texts]))
    if model is not None:
        raise ConfigError("teacher_model", model, f"names a server's model, and {name} is no server", "leave it out")
    opened = open_model(name, device=device, trust_remote_code=trust_remote_code)
    fingerprint = fingerprint_model(opened)  # before its length is changed, which is part of the context
    lengths = [length for length in (max_length, opened.max_seq_length) if length]
    opened.max_seq_length = min(lengths, default=None)

    def encode(texts: list[str], prompt: str) -> NDArray[np.float32]:
        """Without a prompt of the data, the model's own default prompt goes before the texts, if it has one."""
        with quiet():
            return np.asarray(opened.encode(texts, prompt=prompt or None, show_progress_bar=False), dtype=np.float32)

    return Teacher(str(name), fingerprint, encode, opened.max_seq_length)


def connect(url: str) -> OpenAI:
    """A client for a server, with the key from the environment.

    The key is ``SECATEUR_TEACHER_KEY``, else ``OPENAI_API_KEY``; the latter leaves this machine encrypted only.
    Redirects are refused, since they would carry the key elsewhere. Where there is no answer in time, and after 408,
    409, 429 and 5xx, a request is sent again, as late as ``Retry-After`` says (two minutes at most).

    Raises:
        ConfigError: The address is none, or holds a password.
        MissingPackage: The package openai is not installed.
    """
    try:
        import openai
    except ImportError:
        raise MissingPackage("openai", "a teacher behind an address", "pip install 'secateur[torch]'") from None
    parts = urlsplit(url)
    if not parts.hostname or "@" in parts.netloc:
        problem = "an address holds no password" if "@" in parts.netloc else f"{url!r} is no address"
        raise ConfigError("teacher", parts.hostname or url, problem, f"http(s)://host/v1; the key stands in {KEY}")
    private = parts.scheme == "https" or parts.hostname in LOOPBACK
    key = os.environ.get(KEY) or (os.environ.get(COMMON_KEY, "") if private else "")
    return openai.OpenAI(
        base_url=url.rstrip("/"),
        api_key=key or "none",  # without one, the client would take OPENAI_API_KEY by itself
        max_retries=RETRIES,
        http_client=openai.DefaultHttpxClient(follow_redirects=False, timeout=TIMEOUT),
    )


def _only_model(client: OpenAI) -> str:
    try:
        names = [str(model.id) for model in client.models.list().data]
    except Exception as error:
        _raise_error(client, error)
    if len(names) != 1:
        some = ", ".join(names[:10]) or "none that it tells"
        raise ConfigError("teacher_model", None, f"the server has {len(names)} models ({some})", "name one")
    return names[0]


def embed(client: OpenAI, model: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of texts, (texts, dimension), in requests that are as small as the server wants them.

    Raises:
        ModelError: The server refuses, does not answer in all attempts, or its answer is not what was asked for.
    """
    if len(texts) > REQUEST_TEXTS:
        parts = [texts[start : start + REQUEST_TEXTS] for start in range(0, len(texts), REQUEST_TEXTS)]
        return _joined(client, [embed(client, model, part) for part in parts])
    try:
        answer: Any = client.embeddings.create(model=model, input=list(texts), encoding_format="float")
    except Exception as error:
        if getattr(error, "status_code", 0) != 413:
            _raise_error(client, error)
        if len(texts) == 1:
            problem = f"refuses a text of {len(texts[0])} characters ({error})"
            raise ModelError(_url(client), problem) from None
        half = len(texts) // 2
        return _joined(client, [embed(client, model, part) for part in (texts[:half], texts[half:])])
    if isinstance(answer, str):
        said = f'answers with no JSON ("{" ".join(answer.split()):.60}")'
        raise ModelError(_url(client), said, "the address ends with /v1")
    try:
        rows = {int(row.index): row.embedding for row in answer.data}
        vectors = np.array([rows[i] for i in range(len(texts))], dtype=np.float32)
        count = len(answer.data)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"does not answer with one vector for each of {len(texts)} texts ({error!r})"
        raise ModelError(_url(client), problem) from None
    if count != len(texts) or vectors.ndim != 2:
        raise ModelError(_url(client), f"answers with {count} vectors for {len(texts)} texts")
    return vectors


def _url(client: OpenAI) -> str:
    return str(client.base_url).rstrip("/")


def _joined(client: OpenAI, parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    if len({part.shape[1] for part in parts}) > 1:
        raise ModelError(_url(client), "gives vectors of several sizes")
    return np.concatenate(parts)


def _raise_error(client: OpenAI, error: Exception) -> NoReturn:
    """What the openai client raised, as one line about the server."""
    url, status = _url(client), getattr(error, "status_code", None)
    said = " ".join(str(getattr(error, "message", None) or error or type(error).__name__).split())[:300]
    if status is None:
        hint = "with --cache, what it gave is kept, and the same command continues"
        raise ModelError(url, f"gives no valid answer ({said})", hint) from None
    hints = {401: f"set {KEY}", 403: f"set {KEY}", 404: "the address ends with /v1; --teacher-model names the model"}
    wait = getattr(error, "response").headers.get("retry-after")  # noqa: B009 - all errors with a status have it
    later = f", and wants to be asked again in or at {wait}" if wait else ""
    raise ModelError(url, f"answers {status} ({said}){later}", hints.get(status, "")) from None


class TeacherVectors:
    """Kept vectors of one teacher, found by text and read by row; made by :func:`keep_vectors`."""

    def __init__(self, teacher: Teacher, cache: VectorCache) -> None:
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


def teach(
    sets: Sequence[TrainingSet],
    used: Sequence[Sequence[int]],
    teacher: Teacher,
    folder: str | Path,
    progress: Progress = silent,
) -> tuple[list[TrainingSet], TeacherVectors]:
    """Let a teacher encode the texts that will be in a batch, with the prompts of their columns.

    Args:
        sets: The texts.
        used: The rows of each set that will be in a batch (:func:`.used_rows`).
        teacher: The teacher.
        folder: Where its vectors are kept.
        progress: Called after each chunk.

    Returns:
        The sets with the column :data:`LABEL`, the numbers of the vectors of each row's texts (:data:`UNUSED` for rows
        that will be in no batch), and the vectors.
    """
    texts: dict[str, dict[str, None]] = {}
    for item, rows in zip(sets, used, strict=True):
        chosen = item.rows.select(rows)
        for column in chosen.column_names:
            texts.setdefault(item.prompts.get(column, ""), {}).update(dict.fromkeys(chosen[column]))
    vectors = keep_vectors(teacher, {prompt: list(own) for prompt, own in texts.items()}, folder, progress)
    labelled = []
    for item, rows in zip(sets, used, strict=True):
        chosen, columns = item.rows.select(rows), item.rows.column_names
        labels = np.full((len(item.rows), len(columns)), UNUSED, dtype=np.int64)
        for i, column in enumerate(columns):
            labels[rows, i] = vectors.rows(list(chosen[column]), item.prompts.get(column, ""))
        labelled.append(replace(item, rows=item.rows.add_column(LABEL, labels.tolist())))
    return labelled, vectors


def keep_vectors(
    teacher: Teacher, texts: Mapping[str, Sequence[str]], folder: str | Path, progress: Progress = silent
) -> TeacherVectors:
    """Encode what is not kept yet.

    Runs and processes that keep vectors of one teacher in one folder encode one after another, so that none does what
    another has done.

    Args:
        teacher: From :func:`open_teacher`.
        texts: By the prompt before them; a text may repeat.
        folder: Of the vectors of all models, as for :func:`.evaluate`.
        progress: Called after each chunk.

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
    return TeacherVectors(teacher, cache)


def _checked(teacher: Teacher, prompt: str, dimension: int, texts: list[str]) -> NDArray[np.float32]:
    vectors = teacher.encode(texts, prompt)
    if dimension and vectors.shape[1] != dimension:
        raise ModelError(teacher.name, f"gives vectors of {vectors.shape[1]} numbers, and earlier of {dimension}")
    bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
    if bad.any():
        text = " ".join(texts[int(bad.argmax())].split())
        raise ModelError(teacher.name, f'gives a vector of NaN, infinity, or all zeros for "{text:.60}"')
    must_differ = len(texts) >= MANY or tuple(texts) == PROBES
    if must_differ and np.abs(vectors - vectors[0]).max() <= ALIKE * np.linalg.norm(vectors[0]):
        raise ModelError(teacher.name, f"gives the same vector for {len(vectors)} different texts")
    return vectors


def _check_probes(teacher: Teacher, cache: VectorCache) -> None:
    """Refuse a teacher of one vector, and a server that has got another model since the vectors were kept."""
    known = [text for text in PROBES if text not in cache.missing(PROBES, teacher.context(""))]
    now = _checked(teacher, "", cache.dimension, list(PROBES))
    kept = cache.encode(PROBES, teacher.context(""), lambda texts: now[[PROBES.index(text) for text in texts]])
    lengths = np.linalg.norm(kept, axis=1) * np.linalg.norm(now, axis=1)
    cosines = ((kept * now).sum(axis=1) / lengths)[[text in known for text in PROBES]]
    if len(cosines) and cosines.min() < SAME:
        problem = f"is not the model that the vectors in {cache.folder} are of (cosine {cosines.min():.3f} on one text)"
        raise ModelError(teacher.name, problem, "name another folder with --cache")
