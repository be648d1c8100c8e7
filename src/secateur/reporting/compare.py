"""Two or more models side by side on somebody's own data: what is lost, what it saves, and where it shows.

The first model is the reference. Differences of scores have paired intervals: both models are scored on the same draws
of rows. Two spaces are compared by neighbours, because vectors of two models have no common axes: for each text, the
share of its k nearest texts by cosine that are the same in both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from secateur.data.texts import read_texts
from secateur.data.vectors import VectorCache, fingerprint_model
from secateur.errors import ConfigError
from secateur.evaluation.differences import read_draws, score_differences
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.task_folder import read_task_folder, texts_of
from secateur.measures.intervals import Array
from secateur.models import model_label
from secateur.models.open_model import open_model
from secateur.options import CompareOptions, check
from secateur.progress import Progress, silent
from secateur.provenance import ENCODING, Fingerprint, provenance, versions_of
from secateur.reporting.cost import cost
from secateur.results import ChangedRow, Comparison, DifferenceRow, OverlapRow, Scores

MOST_CHANGED = 10
"""Texts listed for each model."""
_ROWS_AT_ONCE = 1024


def compare(
    models: Sequence[str | Path],
    *,
    tasks: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (),
    neighbours: int = 10,
    max_texts: int = 2000,
    sample: int | None = None,
    seed: int = 42,
    batch_size: int = 32,
    timed: bool = True,
    names: Sequence[str] | None = None,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare models with the first of them.

    Args:
        models: Two or more of what :func:`.open_model` opens.
        tasks: Task folders or names of mteb's tasks and benchmarks, to score the models on.
        texts: Files of texts (:func:`.read_texts`) to find neighbours among. Default: the texts of the
            task folders. Texts are encoded with the default prompt of a model that has one, and no other.
        neighbours: Nearest texts compared for each text; fewer where there are not so many.
        max_texts: Draw at most so many texts, by ``seed``.
        sample: As in :func:`.evaluate`.
        seed: Of the samples.
        batch_size: Texts encoded at once.
        timed: Whether to count and time the models, as :func:`.cost` does.
        names: What to call the models. Default: the last part of their paths.
        cache: Folder that keeps vectors.
        out: Folder for ``comparison.json``, and for ``scores.json`` as :func:`.evaluate` writes it.
        progress: Told while it works.

    Raises:
        ConfigError: One model, or neither tasks nor texts, or fewer than 3 texts, or a number that is too small.
        SecateurError: Whatever evaluating, timing or reading raises.
    """
    check(CompareOptions, neighbours=neighbours, max_texts=max_texts, sample=sample, seed=seed, batch_size=batch_size)
    labels = _check(models, names, tasks, texts)
    found, sources = _texts(tasks, texts, max_texts, seed)
    scores = Scores(provenance(), ())
    differences: tuple[DifferenceRow, ...] = ()
    if tasks:
        with TemporaryDirectory(prefix="secateur-") as scratch:
            folder = out if out is not None else scratch
            options = {"sample": sample, "seed": seed, "batch_size": batch_size, "cache": cache}
            scores = evaluate(models, tasks, names=labels, out=folder, progress=progress, **options)  # type: ignore[arg-type]
            differences = score_differences(scores.rows, labels[0], [read_draws(folder, row) for row in scores.rows])
    overlaps, changed = _neighbourhoods(models, labels, found, neighbours, batch_size, cache, progress)
    result = Comparison(
        provenance=provenance([*scores.provenance.data, *sources], seed),
        reference=labels[0],
        models=tuple(labels),
        differences=differences,
        overlaps=overlaps,
        changed=changed,
        scores=scores.rows,
        costs=(),
    )
    if out is not None:
        result.save(out)
    if timed:  # last: should it fail, the rest is there
        result = replace(result, costs=cost(dict(zip(labels, models, strict=True)), progress=progress).rows)
        if out is not None:
            result.save(out)
    return result


def _check(
    models: Sequence[str | Path], names: Sequence[str] | None, tasks: Sequence[str | Path], texts: Sequence[str | Path]
) -> list[str]:
    """The models' names."""
    if len(models) < 2:
        raise ConfigError("models", models, f"{len(models)} cannot be compared", "name two or more")
    if not tasks and not texts:
        raise ConfigError("tasks", tasks, "there is nothing to compare on", "give --tasks or --texts")
    labels = list(names) if names is not None else [model_label(model) for model in models]
    if len(labels) != len(models):
        raise ConfigError("names", names, f"{len(labels)} names for {len(models)} models")
    if len(set(labels)) < len(labels):  # folders of one name, such as a/final and b/final: tell them by their parents
        labels = [str(model) for model in models] if names is None else labels
    if len(set(labels)) < len(labels):
        raise ConfigError("names", labels, "two models have the same name", "give each its own name")
    return labels


def _texts(
    tasks: Sequence[str | Path], files: Sequence[str | Path], most: int, seed: int
) -> tuple[list[str], list[Fingerprint]]:
    """Distinct texts, at most so many, and the files that they are from."""
    read = [read_texts(file) for file in files]
    found = dict.fromkeys(text for part in read for text in part.rows)
    if not files:
        folders = [read_task_folder(task) for task in tasks if Path(task).exists()]
        found = dict.fromkeys(text for folder in folders for text in texts_of(folder))
    if len(found) < 3 and files:
        raise ConfigError("texts", files, f"{len(found)} distinct texts have no neighbours to compare", "3 or more")
    texts = list(found)
    if len(texts) > most:
        texts = [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), most))]  # noqa: S311
    return texts, [part.source for part in read]


# Neighbours -----------------------------------------------------------------------------------------------------------


def _neighbourhoods(
    models: Sequence[str | Path],
    labels: Sequence[str],
    texts: Sequence[str],
    neighbours: int,
    batch_size: int,
    cache: str | Path | None,
    progress: Progress,
) -> tuple[tuple[OverlapRow, ...], tuple[ChangedRow, ...]]:
    if len(texts) < 3:
        return (), ()
    k = min(neighbours, len(texts) - 1)
    nearest = []
    for i, model in enumerate(models):
        progress("neighbours", i, len(models))
        nearest.append(nearest_texts(_encode(model, texts, batch_size, cache), k))
    progress("neighbours", len(models), len(models))
    overlaps, changed = [], []
    for label, own in zip(labels[1:], nearest[1:], strict=True):
        shares = overlap(own, nearest[0])
        overlaps.append(OverlapRow(label, labels[0], float(shares.mean()), k, len(texts)))
        for i in np.argsort(shares, kind="stable")[:MOST_CHANGED]:
            if shares[i] < 1:
                lost, gained = _only(nearest[0][i], own[i]), _only(own[i], nearest[0][i])
                words = tuple(texts[j] for j in lost), tuple(texts[j] for j in gained)
                changed.append(ChangedRow(label, labels[0], texts[i], float(shares[i]), *words))
    return tuple(overlaps), tuple(changed)


def _encode(model: str | Path, texts: Sequence[str], batch_size: int, cache: str | Path | None) -> NDArray[np.float32]:
    opened = open_model(model)

    def encode(some: list[str]) -> NDArray[np.float32]:
        return np.asarray(opened.encode(some, batch_size=batch_size, show_progress_bar=False), dtype=np.float32)

    if cache is None:
        return encode(list(texts))
    default = opened.prompts.get(opened.default_prompt_name or "") or ""
    return VectorCache(cache, fingerprint_model(opened), versions_of(ENCODING)).encode(
        texts, f"plain {default}", encode
    )


def nearest_texts(vectors: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The k nearest other rows of each row by cosine, nearest first: (rows, k)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = []
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        cosine = unit[start : start + _ROWS_AT_ONCE] @ unit.T
        cosine[np.arange(len(cosine)), np.arange(start, start + len(cosine))] = -np.inf
        found.append(np.argsort(-cosine, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)


def overlap(first: NDArray[np.int64], second: NDArray[np.int64]) -> Array:
    """The share of each text's neighbours that are the same in both: (rows, k) each → (rows,)."""
    shared = [len(set(one) & set(two)) for one, two in zip(first.tolist(), second.tolist(), strict=True)]
    shares: Array = np.asarray(shared, dtype=np.float64) / first.shape[1]
    return shares


def _only(first: NDArray[np.int64], second: NDArray[np.int64]) -> list[int]:
    """What is in the first and not in the second, in order."""
    return [int(i) for i in first if i not in second]
