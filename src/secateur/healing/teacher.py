"""A teacher's vectors: each text encoded once and kept on disk (:mod:`.vectors`), so that a killed run loses little.

A teacher is whatever gives vectors (:mod:`.embedders`): a model, or an endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import get_rank
from sentence_transformers.util.distributed import get_world_size

from secateur.data.embedders import open_embedder
from secateur.data.vectors import CHUNK, PROBES, VectorCache, fingerprint_model, folder_of, same_as_kept
from secateur.errors import ModelError, OutputError
from secateur.files import lock, output_errors
from secateur.healing.processes import barrier
from secateur.healing.recipes import TrainingConfig
from secateur.healing.training_data import TrainingSet, used_rows
from secateur.options import HealOptions
from secateur.progress import Progress, quiet, silent

LABEL = "label"
"""The column of a teacher's row numbers, one for each text of a row; -1 where no batch holds the row."""

ALIKE = 1e-6
"""Vectors that all differ by less, as a share of their length, are one vector."""
MANY = 16
"""Texts of which a teacher must tell one from the others; a few may be alike to it, such as emoji."""


@dataclass(frozen=True)
class Teacher:
    """Who gives the vectors: ``encode`` takes texts and the prompt before each.

    ``fingerprint`` is of its weights, or of an endpoint's address and model name; ``length`` is the number of tokens to
    which it cuts a text, None where that is the server's business.
    """

    name: str
    fingerprint: str
    encode: Callable[[list[str], str], NDArray[np.float32]]
    length: int | None = None

    def context(self, prompt: str) -> str:
        """What a vector depends on besides the weights and the text."""
        return prompt if self.length is None else f"{self.length} tokens: {prompt}"


def open_teacher(options: HealOptions, max_length: int | None = None) -> Teacher:
    """Open the ``teacher`` of some options, as :func:`.open_embedder` does.

    A transformer cuts texts to ``max_length`` tokens, where its own limit is not lower. Others cut as they do.
    """
    name = str(options.teacher)
    opened = open_embedder(name, device=options.device, trust_remote_code=options.trust_remote_code)
    fingerprint = fingerprint_model(opened)  # before its length is changed, which is part of the context
    is_transformer = isinstance(opened[0], Transformer)
    if is_transformer:
        opened.max_seq_length = min((n for n in (max_length, opened.max_seq_length) if n), default=None)

    def encode(texts: list[str], prompt: str) -> NDArray[np.float32]:
        """Without a prompt of the data, the model's own default prompt goes before the texts, if it has one."""
        with quiet():
            return np.asarray(opened.encode(texts, prompt=prompt or None, show_progress_bar=False), dtype=np.float32)

    return Teacher(name, fingerprint, encode, opened.max_seq_length if is_transformer else None)


def teach(
    sets: Sequence[TrainingSet], config: TrainingConfig, teacher: Teacher, folder: Path, progress: Progress = silent
) -> tuple[list[TrainingSet], VectorCache]:
    """Let a teacher encode the texts that will be in a batch of a training, with the prompts of their columns.

    Returns the sets with the column :data:`LABEL`, and the vectors, which are kept in ``folder``.
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
    done. ``texts`` are by the prompt before them. Returns all vectors of the teacher, found by text and
    :meth:`Teacher.context`.

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
        now = _checked(teacher, "", cache.dimension, list(PROBES))
        same_as_kept(teacher.name, cache, teacher.context(""), now)
        shares = {prompt: list(dict.fromkeys(own))[get_rank() :: get_world_size()] for prompt, own in texts.items()}
        todo = [(prompt, cache.missing(own, teacher.context(prompt))) for prompt, own in shares.items()]
        done, total = 0, sum(len(own) for _, own in todo)
        tell = progress if first and total else silent
        for prompt, own in todo:
            for start in range(0, len(own), CHUNK):
                tell("teacher", done, total)
                chunk = own[start : start + CHUNK]
                cache.encode(chunk, teacher.context(prompt), partial(_checked, teacher, prompt, cache.dimension))
                done += len(chunk)
        tell("teacher", total, total)
        barrier()
    if get_world_size() > 1:
        cache = VectorCache(folder, teacher.fingerprint)
        if any(cache.missing(own, teacher.context(prompt)) for prompt, own in texts.items()):
            problem = "does not hold the vectors that the other processes have written"
            hint = "name a folder that all machines share with --cache; if they do, start again: the disk was late"
            raise OutputError(own_folder, problem, hint)
    return cache


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
