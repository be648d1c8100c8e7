"""Scores of a scout: one file for each task and depth, kept as they come, and the rungs that they make together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from secateur.errors import ModelError
from secateur.evaluation.tasks import Task
from secateur.files import read_json, write_text
from secateur.measures.intervals import Array, Interval, interval, limits_of, mean_of
from secateur.profiling.depth_scores import DepthScore
from secateur.provenance import versions_of
from secateur.results import DepthScoreRow, RungRow


def _file(folder: Path, task: Task, depth: int) -> Path:
    identity = f"{task.name}\0{task.source.sha256}\0{task.instruction}"
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{depth}.json"


def keep_score(folder: Path, task: Task, score: DepthScore) -> None:
    """Write a score, whole or not at all."""
    replicates = None if score.replicates is None else score.replicates.tolist()
    content = {"versions": versions_of(), **asdict(score), "replicates": replicates}
    write_text(_file(folder, task, score.depth), json.dumps(content, ensure_ascii=False) + "\n")


def kept_score(folder: Path, task: Task, depth: int) -> DepthScore | None:
    """A score that was kept; None where there is none, or one by other versions of the libraries."""
    file = _file(folder, task, depth)
    content = read_json(file) if file.is_file() else {}
    if content.pop("versions", None) != versions_of():
        return None
    row = None if content["row"] is None else DepthScoreRow(**content["row"])
    replicates = None if content["replicates"] is None else np.asarray(content["replicates"], dtype=np.float64)
    return DepthScore(**(content | {"row": row, "replicates": replicates}))


def rungs(
    scores: Sequence[DepthScore], trained: Sequence[int], full: int, name: str
) -> tuple[tuple[RungRow, ...], list[str]]:
    """The mean over tasks at each depth, and its paired difference to the full depth.

    Args:
        scores: Of the same tasks at each depth.
        trained: Depths that were trained.
        full: The full depth.
        name: What the user calls the model.

    Returns:
        Rows by depth; and a note on depths that have none, because a score there is no number.

    Raises:
        ModelError: That is so at the full depth.
    """
    by_depth: dict[int, list[DepthScore]] = {}
    for score in sorted(scores, key=lambda score: (score.depth, score.task)):
        by_depth.setdefault(score.depth, []).append(score)
    missing = [depth for depth, own in by_depth.items() if any(score.row is None for score in own)]
    if full in missing:
        task = next(score for score in by_depth[full] if score.row is None)
        raise ModelError(name, f"{task.metric} on {task.task} is not a number", "are its vectors all alike?")
    rows, reference = [], by_depth[full]
    least, most = np.mean([limits_of(score.metric) for score in reference], axis=0)
    for depth in sorted(by_depth.keys() - missing):
        own = by_depth[depth]
        mean, low, high = _mean([score.row.score for score in own if score.row], _replicates(own), (least, most))
        pairs = [(a.row.score, b.row.score) for a, b in zip(own, reference, strict=True) if a.row and b.row]
        first, second = _replicates(own), _replicates(reference)
        paired = [a - b for a, b in zip(first, second, strict=True)] if first and second and depth != full else None
        difference = _mean([a - b for a, b in pairs], paired, (least - most, most - least))
        rows.append(RungRow(depth, depth in trained, mean, low, high, *difference))
    told = ", ".join(map(str, missing))
    return tuple(rows), [f"depth {told} has no mean: a score there is no number"] if missing else []


def _replicates(scores: Sequence[DepthScore]) -> list[Array] | None:
    """Those of all scores; None where one has none."""
    found = [score.replicates for score in scores if score.replicates is not None]
    return found if len(found) == len(scores) else None


def _mean(
    values: Sequence[float], replicates: Sequence[Array] | None, limits: tuple[float, float]
) -> tuple[float, float | None, float | None]:
    ends: Interval = (None, None) if replicates is None else interval(mean_of(replicates), limits)
    return (float(np.mean(values)), *ends)
