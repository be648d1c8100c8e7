"""A teacher's vectors: each text encoded once and kept on disk (:mod:`.vectors`), so that a killed run loses little.

A teacher is any model that this package opens, or a server that speaks the OpenAI embeddings API.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.util import get_rank
from sentence_transformers.util.distributed import get_world_size

from secateur.data.vectors import VectorCache, fingerprint_model, folder_of
from secateur.errors import ConfigError, MissingPackage, ModelError, OutputError
from secateur.files import lock, output_errors
from secateur.healing.processes import barrier
from secateur.healing.recipes import TrainingConfig
from secateur.healing.training_data import TrainingSet, used_rows
from secateur.models.open_model import open_model
from secateur.options import HealOptions
from secateur.progress import Progress, quiet, silent

if TYPE_CHECKING:
    from openai import OpenAI

LABEL = "label"
"""The column of a teacher's row numbers, one for each text of a row; -1 where no batch holds the row."""

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
REQUEST_TEXTS = 128
LOOKS = 120
"""How often, once a second, a process looks for what the others have written: a shared disk may show it late."""
TIMEOUT = 60.0
"""Seconds without a sign of life."""
RETRIES = 8
HINTS = {
    0: "with --cache, what it gave is kept, and the same command continues",
    401: f"set {KEY}",
    403: f"set {KEY}",
    404: "the address ends with /v1; --teacher-model names the model",
}


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


def open_teacher(options: HealOptions, max_length: int | None = None) -> Teacher:
    """Open the ``teacher`` of some options: a model, or a server that is called ``http(s)://host/v1``.

    Args:
        options: Those of the teacher, and ``device`` and ``trust_remote_code`` of a model.
        max_length: Tokens to which a model cuts texts, where its own limit is not lower. A server cuts as it does.

    Raises:
        ModelError, ConfigError: It cannot be opened or reached.
        MissingPackage: A server, without the package openai.
    """
    name, model = str(options.teacher), options.teacher_model
    if name.startswith(("http://", "https://")):
        client = connect(name)
        model = model or _only_model(client)
        identity = hashlib.sha256(f"{name.rstrip('/')}\0{model}".encode()).hexdigest()
        return Teacher(name, identity, lambda texts, prompt: embed(client, model, [prompt + text for text in texts]))
    if model is not None:
        raise ConfigError("teacher_model", model, f"names a server's model, and {name} is no server", "leave it out")
    opened = open_model(name, device=options.device, trust_remote_code=options.trust_remote_code)
    fingerprint = fingerprint_model(opened)  # before its length is changed, which is part of the context
    opened.max_seq_length = min((n for n in (max_length, opened.max_seq_length) if n), default=None)

    def encode(texts: list[str], prompt: str) -> NDArray[np.float32]:
        """Without a prompt of the data, the model's own default prompt goes before the texts, if it has one."""
        with quiet():
            return np.asarray(opened.encode(texts, prompt=prompt or None, show_progress_bar=False), dtype=np.float32)

    return Teacher(name, fingerprint, encode, opened.max_seq_length)


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
    private = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
    key = os.environ.get(KEY) or (os.environ.get(COMMON_KEY) if private else None)
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
        raise _server_error(client, error) from None
    if len(names) != 1:
        some = ", ".join(names[:10]) or "none that it tells"
        raise ConfigError("teacher_model", None, f"the server has {len(names)} models ({some})", "name one")
    return names[0]


def embed(client: OpenAI, model: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of texts, (texts, dimension), in requests that are as small as the server wants them.

    Raises:
        ModelError: The server refuses, does not answer in all attempts, or its answer is not what was asked for.
    """
    url, most = str(client.base_url).rstrip("/"), REQUEST_TEXTS
    try:
        if len(texts) <= most:
            answer: Any = client.embeddings.create(model=model, input=list(texts), encoding_format="float")
    except Exception as error:
        if getattr(error, "status_code", 0) != 413 or len(texts) == 1:
            raise _server_error(client, error) from None
        most = -(-len(texts) // 2)
    if len(texts) > most:
        starts = range(0, len(texts), most)
        return np.concatenate([embed(client, model, texts[start : start + most]) for start in starts])
    if isinstance(answer, str):
        said = f'answers with no JSON ("{" ".join(answer.split()):.60}")'
        raise ModelError(url, said, "the address ends with /v1")
    try:
        rows = {int(row.index): row.embedding for row in answer.data}
        vectors = np.array([rows[i] for i in range(len(texts))], dtype=np.float32)
        if len(answer.data) != len(texts) or vectors.ndim != 2:
            raise ValueError(f"{len(answer.data)} vectors")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"does not answer with one vector for each of {len(texts)} texts ({error!r})"
        raise ModelError(url, problem) from None
    return vectors


def _server_error(client: OpenAI, error: Exception) -> ModelError:
    """What the openai client raised, as one line about the server."""
    status = getattr(error, "status_code", 0)
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else getattr(error, "message", None)
    said = " ".join(str(message or error or type(error).__name__).split())[:300]
    told = f"answers {status} ({said})" if status else f"gives no valid answer ({said})"
    wait = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
    told += f", and wants to be asked again in or at {wait}" if wait else ""
    return ModelError(str(client.base_url).rstrip("/"), told, HINTS.get(status, ""))


def teach(
    sets: Sequence[TrainingSet], config: TrainingConfig, teacher: Teacher, folder: Path, progress: Progress = silent
) -> tuple[list[TrainingSet], VectorCache]:
    """Let a teacher encode the texts that will be in a batch of a training, with the prompts of their columns.

    Returns:
        The sets with the column :data:`LABEL`, the numbers of the vectors of each row's texts, and the vectors, which
        are kept in ``folder``.
    """
    texts: dict[str, list[str]] = {}
    places = used_rows(sets, config)
    used = [item.rows.select(rows) for item, rows in zip(sets, places, strict=True)]
    for item, chosen in zip(sets, used, strict=True):
        for column in chosen.column_names:
            texts.setdefault(item.prompts.get(column, ""), []).extend(chosen[column])
    vectors = keep_vectors(teacher, texts, folder, progress)
    labelled = []
    for item, rows, chosen in zip(sets, places, used, strict=True):
        labels = np.full((len(item.rows), len(chosen.column_names)), -1, dtype=np.int64)
        for i, column in enumerate(chosen.column_names):
            labels[rows, i] = vectors.rows(list(chosen[column]), teacher.context(item.prompts.get(column, "")))
        labelled.append(replace(item, rows=item.rows.add_column(LABEL, labels.tolist())))
    return labelled, vectors


def keep_vectors(
    teacher: Teacher, texts: Mapping[str, Sequence[str]], folder: str | Path, progress: Progress = silent
) -> VectorCache:
    """Encode what is not kept yet; of several processes that train one model, each encodes its share.

    Runs that keep vectors of one teacher in one folder encode one after another, so that none does what another has
    done.

    Args:
        teacher: From :func:`open_teacher`.
        texts: By the prompt before them; a text may repeat.
        folder: Of the vectors of all models, as for :func:`.evaluate`.
        progress: Called after each chunk.

    Returns:
        All vectors of the teacher, found by text and :meth:`Teacher.context`.

    Raises:
        ModelError: A vector is not finite, or zero, or of another size; the teacher gives one vector for different
            texts, or is not the one that the vectors in ``folder`` are of.
        OutputError: The folder cannot be written; or the processes do not share it.
    """
    own_folder, first = folder_of(folder, teacher.fingerprint), get_rank() == 0
    with output_errors(own_folder):
        own_folder.mkdir(parents=True, exist_ok=True)
    with lock(own_folder, wait=True) if first else nullcontext():
        barrier()
        cache = VectorCache(folder, teacher.fingerprint)
        _check_probes(teacher, cache)
        shares = {prompt: list(dict.fromkeys(own))[get_rank() :: get_world_size()] for prompt, own in texts.items()}
        todo = [(prompt, cache.missing(own, teacher.context(prompt))) for prompt, own in shares.items()]
        done, total = 0, sum(len(own) for _, own in todo)
        tell = progress if first else silent
        for prompt, own in todo:
            for start in range(0, len(own), CHUNK):
                tell("teacher", done, total)
                chunk = own[start : start + CHUNK]
                cache.encode(chunk, teacher.context(prompt), partial(_checked, teacher, prompt, cache.dimension))
                done += len(chunk)
        if total:
            tell("teacher", total, total)
        barrier()
    if get_world_size() == 1:
        return cache
    for _ in range(LOOKS):
        cache = VectorCache(folder, teacher.fingerprint)
        if not any(cache.missing(own, teacher.context(prompt)) for prompt, own in texts.items()):
            return cache
        time.sleep(1)
    problem = "does not hold the vectors that the other processes have written"
    raise OutputError(own_folder, problem, "name a folder that all machines share with --cache")


def _checked(teacher: Teacher, prompt: str, dimension: int, texts: list[str]) -> NDArray[np.float32]:
    """A teacher's vectors of texts, if they can be learned from."""
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
    known = [text not in cache.missing(PROBES, teacher.context("")) for text in PROBES]
    now = _checked(teacher, "", cache.dimension, list(PROBES))
    kept = cache.encode(PROBES, teacher.context(""), lambda texts: now[[PROBES.index(text) for text in texts]])
    cosines = ((kept * now).sum(axis=1) / np.linalg.norm(kept, axis=1) / np.linalg.norm(now, axis=1))[known]
    if len(cosines) and cosines.min() < SAME:
        problem = f"is not the model that the vectors in {cache.folder} are of (cosine {cosines.min():.3f} on one text)"
        raise ModelError(teacher.name, problem, "name another folder with --cache")
