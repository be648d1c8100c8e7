"""Two or more models side by side on the user's own data: what is lost, what it saves, and where it shows.

The first model is the reference. Differences of scores have paired intervals: both models are scored on the same draws
of rows. Two spaces are compared by neighbours, because vectors of two models have no common axes: for each text, the
share of its k nearest texts by cosine that are the same in both, and how similar the k that a model finds are, by the
vectors of the reference, beside the k nearest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from secateur.data.embedders import identify, open_embedder
from secateur.data.sources import read_texts
from secateur.errors import ConfigError, ModelError
from secateur.evaluation.evaluate import evaluate, vectors_folder
from secateur.evaluation.replicates import read_replicates, score_differences
from secateur.evaluation.task_folder import read_task_folder, texts_of
from secateur.files import make_folder
from secateur.measures.intervals import Array
from secateur.measures.metrics import nearest_rows, similarity_to
from secateur.models import is_endpoint, model_names
from secateur.options import CompareOptions, step
from secateur.progress import Progress, silent
from secateur.provenance import Fingerprint, provenance
from secateur.reporting.cost import cost
from secateur.results import ChangedRow, Comparison, DifferenceRow, OverlapRow, ScoreRow

MOST_CHANGED = 10
"""Texts listed for each model."""
ROUNDING = 1e-6


@step(CompareOptions)
def compare(options: CompareOptions, *, progress: Progress = silent) -> Comparison:
    """Compare models with the first of them.

    Raises:
        ConfigError: An option has an invalid value, there are neither tasks nor texts, or fewer than 3 texts.
        SecateurError: Whatever evaluating, timing or reading raises.
    """
    if not options.tasks and not options.texts:
        raise ConfigError("tasks", options.tasks, "there is nothing to compare on", "give --tasks or --texts")
    names = model_names(options.models, options.names)
    texts, sources = _texts(options)
    if options.out is not None:
        make_folder(options.out)
    rows: tuple[ScoreRow, ...] = ()
    differences: tuple[DifferenceRow, ...] = ()
    if options.tasks:
        with TemporaryDirectory(prefix="secateur-") as scratch:
            out = options.out or Path(scratch)
            shared = {name: getattr(options, name) for name in ("sample", "seed", "batch_size", "cache")}
            scores = evaluate(options.models, options.tasks, names=names, out=out, progress=progress, **shared)
            rows, sources = scores.rows, [*scores.provenance.data, *sources]
            differences = score_differences(rows, names[0], [read_replicates(out, row) for row in rows])
    overlaps, changed = _neighbourhoods(options, names, texts, progress)
    local = {name: given for name, given in zip(names, options.models, strict=True) if not is_endpoint(given)}
    timed = cost([*local.values()], names=[*local], progress=progress).rows if options.timed and local else ()
    result = Comparison(
        provenance=provenance(sources, options.seed),
        reference=names[0],
        models=tuple(names),
        differences=differences,
        overlaps=overlaps,
        changed=changed,
        scores=rows,
        costs=timed,
    )
    if options.out is not None:
        result.save(options.out)
    return result


def _texts(options: CompareOptions) -> tuple[list[str], list[Fingerprint]]:
    """Distinct texts, as many as asked for, and the files that they are from."""
    read = [read_texts(file) for file in options.texts]
    found = dict.fromkeys(text for part in read for text in part.rows)
    if not options.texts:
        folders = [read_task_folder(t) for t in options.tasks if isinstance(t, str) and Path(t).exists()]
        found = dict.fromkeys(text for folder in folders for text in texts_of(folder))
    elif len(found) < 3:
        problem = f"{len(found)} distinct texts have no neighbours to compare"
        raise ConfigError("texts", options.texts, problem, "3 or more")
    texts = list(found)
    if len(texts) > options.max_texts:
        drawn = random.Random(options.seed).sample(range(len(texts)), options.max_texts)  # noqa: S311
        texts = [texts[i] for i in sorted(drawn)]
    return texts, [part.source for part in read]


def _neighbourhoods(
    options: CompareOptions, names: Sequence[str], texts: Sequence[str], progress: Progress
) -> tuple[tuple[OverlapRow, ...], tuple[ChangedRow, ...]]:
    """How alike each model's neighbours are to the reference's, and the texts whose neighbours changed most."""
    if len(texts) < 3:
        return (), ()
    k = min(options.neighbours, (len(texts) - 1) // 2)  # all models share the nearest, where these are all there are
    nearest = []
    for i, model in enumerate(options.models):
        progress("neighbours", i, len(names))
        vectors = _encode(model, texts, options.batch_size, vectors_folder(options, model))
        nearest.append(nearest_rows(vectors, k))
        if i == 0:
            reference = vectors
    progress("neighbours", len(names), len(names))
    overlaps, changed = [], []
    for name, own in zip(names[1:], nearest[1:], strict=True):
        shares = overlap(own, nearest[0])
        found, best = (similarity_to(rows, reference).mean(axis=1) for rows in (own, nearest[0]))
        # Where the reference has one vector for all texts, any text is as similar as another.
        similarity = np.divide(found, best, out=np.ones_like(best), where=best > ROUNDING)
        overlaps.append(OverlapRow(name, names[0], float(shares.mean()), k, len(texts), float(similarity.mean())))
        for i in np.argsort(shares, kind="stable")[:MOST_CHANGED]:
            if shares[i] < 1:
                lost = tuple(texts[j] for j in nearest[0][i] if j not in own[i])
                gained = tuple(texts[j] for j in own[i] if j not in nearest[0][i])
                changed.append(ChangedRow(name, names[0], texts[i], float(shares[i]), lost, gained))
    return tuple(overlaps), tuple(changed)


def _encode(model: str | Path, texts: Sequence[str], batch_size: int, folder: Path | None) -> NDArray[np.float32]:
    opened = open_embedder(model)
    _, cache = identify(opened, folder)

    def encode(some: list[str]) -> NDArray[np.float32]:
        vectors = np.asarray(opened.encode(some, batch_size=batch_size, show_progress_bar=False), dtype=np.float32)
        if not (finite := np.isfinite(vectors).all(axis=1)).all():  # such a text would have any neighbours
            text = " ".join(some[int(finite.argmin())].split())
            raise ModelError(model, f'gives a vector with NaN or infinity for "{text:.60}"')
        return vectors

    if cache is None:
        return encode(list(texts))
    default = opened.prompts.get(opened.default_prompt_name or "") or ""
    return cache.encode(texts, f"plain {default}", encode)


def overlap(first: NDArray[np.int64], second: NDArray[np.int64]) -> Array:
    """The share of each text's neighbours that are the same in both: (rows, k) each → (rows,)."""
    shared = [len(set(one) & set(two)) for one, two in zip(first.tolist(), second.tolist(), strict=True)]
    return np.asarray(shared, dtype=np.float64) / first.shape[1]
