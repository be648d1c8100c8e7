"""Differences of scores between models, with paired intervals, from the draws that an evaluation left on disk.

Two models that were scored on the same data were resampled by the same draws of its rows, so that their difference is
taken draw by draw (:mod:`.intervals`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from secateur.errors import DataError
from secateur.measures.intervals import Array, interval, limits_of, mean_of
from secateur.results import DifferenceRow, ScoreRow

DRAWS_FOLDER = "draws"


def draws_file(out: Path, name: str) -> Path:
    """Where evaluating into ``out`` keeps the draws that a row names."""
    return out / DRAWS_FOLDER / f"{name}.npy"


def read_draws(out: str | Path, row: ScoreRow) -> Array | None:
    """The score of each bootstrap draw of a row of ``out/scores.json``: (draws,); None where it was not resampled.

    Raises:
        DataError: The file that the row names is missing or damaged.
    """
    if not row.draws:
        return None
    file = draws_file(Path(out), row.draws)
    try:
        draws: Array = np.load(file)
    except (OSError, ValueError, EOFError):
        problem = f"is missing or damaged, the draws of {row.model} on {row.task}"
        raise DataError(file, problem, "evaluate again into the same folder") from None
    return draws


def score_differences(
    rows: Sequence[ScoreRow], reference: str, draws: Sequence[Array | None]
) -> tuple[DifferenceRow, ...]:
    """Each model's scores minus the reference's, by task, and the mean over the tasks that both have.

    Args:
        rows: Scores of some models, the reference among them.
        reference: Name of the model to subtract.
        draws: Of each row, as :func:`read_draws` gives them.
    """
    found = {(row.model, row.task): (row, drawn) for row, drawn in zip(rows, draws, strict=True)}
    differences: list[DifferenceRow] = []
    for model in dict.fromkeys(row.model for row in rows if row.model != reference):
        tasks = [row.task for row in rows if row.model == model and (reference, row.task) in found]
        pairs = [(found[model, task], found[reference, task]) for task in tasks]
        parts = [_paired(*one, *two) for one, two in pairs]
        own = [_difference(one[0], two[0], drawn) for (one, two), drawn in zip(pairs, parts, strict=True)]
        differences += own
        known = [drawn for drawn in parts if drawn is not None]
        if len(own) > 1:
            differences.append(_mean(own, mean_of(known) if len(known) == len(own) else None))
    return tuple(differences)


def _paired(row: ScoreRow, draws: Array | None, reference: ScoreRow, other: Array | None) -> Array | None:
    """The difference on each draw; None where the draws are not of the same things."""
    if draws is None or other is None or not of_the_same_things(row, reference):
        return None
    difference: Array = draws - other
    return difference


def of_the_same_things(row: ScoreRow, reference: ScoreRow) -> bool:
    """Whether two scores were resampled by the same draws of the same rows, so that they can be subtracted by draw."""
    same = ("data", "sample", "metric", "units", "unit")
    if any(getattr(row, name) != getattr(reference, name) for name in same):
        return False
    return row.sample is None or row.seed == reference.seed


def _difference(row: ScoreRow, reference: ScoreRow, draws: Array | None) -> DifferenceRow:
    least, most = limits_of(row.metric)
    low, high = interval(draws, (least - most, most - least)) if draws is not None else (None, None)
    return DifferenceRow(
        model=row.model,
        reference=reference.model,
        task=row.task,
        metric=row.metric,
        score=row.score,
        reference_score=reference.score,
        difference=row.score - reference.score,
        low=low,
        high=high,
        unit=row.unit if draws is not None else "",
        units=row.units if draws is not None else 0,
    )


def _mean(rows: Sequence[DifferenceRow], draws: Array | None) -> DifferenceRow:
    low, high = interval(draws) if draws is not None else (None, None)
    score, reference = (float(np.mean([getattr(row, name) for row in rows])) for name in ("score", "reference_score"))
    return DifferenceRow(
        rows[0].model, rows[0].reference, "", "mean", score, reference, score - reference, low, high, "tasks", len(rows)
    )
