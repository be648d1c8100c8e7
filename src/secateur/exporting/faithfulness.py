"""How near an export is to the model it was made from: the same texts through both, and the same tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from secateur import runtime
from secateur.errors import ModelError
from secateur.evaluation.evaluate import evaluate
from secateur.measures.metrics import paired_cosines
from secateur.progress import quiet
from secateur.results import Scores
from secateur.runtime.vectors import VectorFormat


def reference_vectors(
    model: SentenceTransformer, texts: Sequence[str], dimensions: int | None, prompt: str = ""
) -> npt.NDArray[np.float32]:
    """The original's vectors (texts, dimension)."""
    with quiet():
        vectors = np.asarray(model.encode(list(texts), prompt=prompt, show_progress_bar=False), dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise ModelError(type(model[0].auto_model).__name__, "gives vectors with NaN or infinity")
    if dimensions is None:
        return vectors
    short = vectors[:, :dimensions]
    lengths = np.linalg.norm(short, axis=1, keepdims=True)
    return np.asarray(short / np.maximum(lengths, 1e-12), dtype=np.float32)


def cosines(
    model: SentenceTransformer,
    encoder: runtime.Encoder,
    texts: Sequence[str],
    expected: npt.NDArray[np.float32],
    dimensions: int | None,
) -> npt.NDArray[np.float64]:
    """Cosine of each text's two vectors: without a prompt and with each of the model's."""
    found = [paired_cosines(expected, encoder.encode(texts, prompt="", precision="float32"))]
    for prompt in sorted({prompt for prompt in model.prompts.values() if prompt}):
        vectors = encoder.encode(texts, prompt=prompt, precision="float32")
        found.append(paired_cosines(reference_vectors(model, texts, dimensions, prompt), vectors))
    return np.concatenate(found)


def score_both(
    model: SentenceTransformer,
    encoder: runtime.Encoder,
    tasks: Sequence[str | Path],
    sample: int | None,
    seed: int,
    dimensions: int | None,
) -> dict[str, dict[str, float]]:
    """Task → the scores of the original, with vectors of the same dimension, and of the export."""
    if not tasks:
        return {}
    with _truncated(model, dimensions):
        original = evaluate([model], tasks, sample=sample, seed=seed, names=["original"])
    with _encoding_by(model, encoder):
        exported = evaluate([model], tasks, sample=sample, seed=seed, names=["exported"])
    return {task: {"original": _of(original, task), "exported": _of(exported, task)} for task in _names(original)}


def _names(scores: Scores) -> list[str]:
    return [row.task for row in scores.rows]


def _of(scores: Scores, task: str) -> float:
    return float(next(row.score for row in scores.rows if row.task == task))


@contextmanager
def _truncated(model: SentenceTransformer, dimensions: int | None) -> Iterator[None]:
    before = model.truncate_dim
    try:
        model.truncate_dim = dimensions if dimensions is not None else before
        yield
    finally:
        model.truncate_dim = before


@contextmanager
def _encoding_by(model: SentenceTransformer, encoder: runtime.Encoder) -> Iterator[None]:
    """The model with all texts encoded by the export, so that it is scored as the original is, prompts included.

    Bytes and bits are scored as the numbers that they stand for.
    """

    def encode(inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **_: Any) -> Any:
        found = encoder.encode(inputs, prompt_name=prompt_name, prompt=prompt)
        return as_numbers(found, encoder.settings.vectors, encoder.settings.dimension)

    try:
        model.encode = encode
        yield
    finally:
        del model.encode


def as_numbers(vectors: npt.NDArray[Any], form: VectorFormat, dimension: int) -> npt.NDArray[np.float32]:
    """Vectors as they are compared: bytes as numbers around 0, bits as -1 and 1."""
    if form in ("binary", "ubinary"):
        packed = (vectors.astype(np.int16) + 128).astype(np.uint8) if form == "binary" else vectors
        return np.unpackbits(packed, axis=-1, count=dimension).astype(np.float32) * 2 - 1
    numbers = vectors.astype(np.float32)
    return numbers - 128 if form == "uint8" else numbers
