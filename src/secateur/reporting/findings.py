"""What a run found: scores of its models over their training seeds, and each cut model against the full one.

A *run group* is what a study decides on: a base model, the layers kept, how they were selected, and the recipe. Its
models differ in the training seed alone, and count as repetitions.

An interval has two parts. That of the rows is the paired bootstrap of :mod:`.intervals`, the draws averaged over the
seeds; without it there is no interval. That of the seeds is the standard error of the mean over them, times the
quantile of Student's t; the variance between seeds is pooled over the groups of a base model and recipe, as in a
one-way analysis of variance, because two or three seeds alone tell it badly. Half-widths are added in quadrature. With
one seed of every group there is no second part, and the interval says nothing of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from scipy.stats import t

from secateur.evaluation.replicates import is_paired, read_replicates
from secateur.measures.intervals import CONFIDENCE, Array, interval, limits_of, mean_of
from secateur.reporting.run import POLISHED, SCOUTED, TRIMMED, UNTRAINED, Run, Variant
from secateur.results import CostRow

MARGIN = 0.02
"""Non-inferiority margin: a cut is as good as the full model where the interval excludes a loss of 2 points."""

Outcome = Literal["better", "same", "undecided", "worse", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, None where it has none, and its standard error over training seeds."""

    value: float
    low: float | None = None
    high: float | None = None
    seed_error: float | None = None

    @property
    def sign(self) -> int:
        """Of a difference: 1 if significantly above zero, -1 if below it, 0 if not significant."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.low > 0 else -1


@dataclass(frozen=True)
class RunGroup:
    """Models that differ in their training seed alone; one, where there are no others.

    Attributes:
        variants: The models, by seed.
        draws: Task → bootstrap replicates of the mean over the models, where there are any.
        scores: Task → mean over the models; tasks that every model was scored on.
        average: Mean over the tasks; None where there are none, or one without a number.
        cost: Its models' costs in one row: means, and the extremes of ranges.
    """

    variants: tuple[Variant, ...]
    draws: Mapping[str, Array] = field(default_factory=dict, compare=False, repr=False)
    scores: Mapping[str, Estimate] = field(default_factory=dict)
    average: Estimate | None = None
    cost: CostRow | None = None

    @property
    def first(self) -> Variant:
        """One of its models."""
        return self.variants[0]

    @property
    def name(self) -> str:
        """That of its model; of several, what their names have in common."""
        return self.first.name if len(self.variants) == 1 else self.first.name.removesuffix(f"-seed{self.first.seed}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its trainings."""
        return tuple(sorted({v.seed for v in self.variants if v.seed is not None and v.training is not None}))

    @property
    def tasks(self) -> list[str]:
        """Tasks that all of its models have."""
        return [task for task in self.first.scores if all(task in variant.scores for variant in self.variants)]

    def means(self, tasks: Sequence[str]) -> list[float] | None:
        """Each model's mean over the tasks; None where a score is missing."""
        rows = [[variant.scores[task].score for task in tasks] for variant in self.variants]
        if not tasks or any(score is None for row in rows for score in row):
            return None
        return [sum(row) / len(row) for row in rows]


@dataclass(frozen=True)
class GroupComparison:
    """A cut model's group beside the full model's: the difference of average scores, and that of each task.

    A difference is no number where the two were scored on different things.
    """

    group: RunGroup
    reference: RunGroup
    difference: Estimate
    tasks: Mapping[str, Estimate]

    @property
    def is_known(self) -> bool:
        """Whether all tasks of the two were the same things, so that their averages have a difference."""
        return not math.isnan(self.difference.value)

    @property
    def is_polished_more(self) -> bool:
        """Whether the cut model was trained on after the scout, and the full model was not."""
        return self.group.first.recipe == POLISHED and self.reference.first.recipe == SCOUTED

    def is_as_good(self, margin: float) -> bool:
        """Whether the interval excludes a loss of more than the margin."""
        return self.difference.low is not None and self.difference.low >= -margin

    @property
    def outcome(self) -> Outcome:
        """``same``: no significant difference, and the interval excludes a loss of more than :data:`MARGIN`.

        ``undecided``: no significant difference, but room for such a loss. ``unknown``: no interval.
        """
        if self.difference.low is None:
            return "unknown"
        if self.difference.sign:
            return "better" if self.difference.sign > 0 else "worse"
        return "same" if self.is_as_good(MARGIN) else "undecided"

    @property
    def speed(self) -> tuple[float, bool] | None:
        """How many times as fast, in short texts per second, and whether the measured ranges do not overlap."""
        own, full = self.group.cost, self.reference.cost
        if own is None or full is None or not (own.texts_per_second and full.texts_per_second):
            return None
        is_apart = own.speed_low > full.speed_high or own.speed_high < full.speed_low
        return own.texts_per_second / full.texts_per_second, is_apart

    def count(self, sign: int) -> int:
        """Tasks that are significantly better (1) or worse (-1)."""
        return sum(difference.sign == sign for difference in self.tasks.values())


_Key = tuple[str, str, str]
_Spreads = Mapping[_Key, tuple[float, int]]
"""(base, recipe, task) → the pooled variance between seeds and its degrees of freedom; the average's task is empty."""


@dataclass(frozen=True)
class Summary:
    """A run's groups; ``compared`` by name, those with a full model of their recipe to compare with.

    ``originals`` by name are those with a cut vocabulary, beside the model as it came, with all layers and tokens.
    """

    run: Run
    groups: tuple[RunGroup, ...]
    spreads: _Spreads = field(repr=False)
    compared: Mapping[str, GroupComparison] = field(default_factory=dict)
    originals: Mapping[str, GroupComparison] = field(default_factory=dict)

    def compare(self, group: RunGroup, reference: RunGroup) -> GroupComparison:
        """Any group beside any other; the difference is no number where they have other tasks."""
        alike = group.scores.keys() == reference.scores.keys()
        sides = [group, reference]
        tasks = {task: _estimate(sides, [task], self.spreads, task) for task in group.scores} if alike else {}
        return GroupComparison(group, reference, _estimate(sides, list(tasks), self.spreads), tasks)


def summarize(run: Run) -> Summary:
    """Average over seeds, and compare each group with its full model.

    Raises:
        DataError: A file of draws that a table names is missing or damaged.
    """
    together: dict[object, list[Variant]] = {}
    for variant in run.variants:
        blocks = variant.origin.kept if variant.origin else variant.depth
        # Without a seed, models that are otherwise alike are not known to be repetitions.
        other = variant.name if variant.seed is None or variant.depth is None else ""
        key = (variant.base, variant.selection, variant.recipe, blocks, other)
        together.setdefault(key, []).append(variant)
    unscored = [RunGroup(tuple(variants)) for variants in together.values()]
    spreads = _seed_spreads(unscored)
    groups = tuple(_scored(group, spreads) for group in unscored)
    summary = Summary(run, groups, spreads)
    compared, originals = {}, {}
    for group in groups:
        own = group.first
        reference = _reference(group, groups)
        if reference is not None and reference is not group:
            compared[group.name] = summary.compare(group, reference)
        for came in groups:
            is_whole = came.first.is_full and came.first.recipe == UNTRAINED and came.first.base == own.base
            if is_whole and own.vocabulary and own.vocabulary != came.first.vocabulary:
                originals[group.name] = summary.compare(group, came)
    return replace(summary, compared=compared, originals=originals)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, score) points that no other beats: cheaper and as good, or better and as cheap."""
    best, kept = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept


def _scored(group: RunGroup, spreads: _Spreads) -> RunGroup:
    """The group with its scores and costs."""
    draws = {}
    for task in group.tasks:
        rows = [variant.scores[task] for variant in group.variants]
        if all(row.draws and is_paired(row, rows[0]) for row in rows):
            read = [read_replicates(v.results[task], row) for v, row in zip(group.variants, rows, strict=True)]
            draws[task] = mean_of([replicates for replicates in read if replicates is not None])
    group = replace(group, draws=draws)
    scores = {task: _estimate([group], [task], spreads, task) for task in group.tasks}
    average = _estimate([group], group.tasks, spreads)
    known = None if math.isnan(average.value) else average
    return replace(group, scores=scores, average=known, cost=_cost(group.variants))


def _reference(group: RunGroup, groups: Sequence[RunGroup]) -> RunGroup | None:
    """The full model to compare with: of the same base and recipe, of a polished one the scout's, else as it came.

    None where the run has none, or where it was not scored on the same tasks: averages would not compare.
    """
    recipe = group.first.recipe
    full = [other for other in groups if other.first.base == group.first.base and other.first.is_full]
    same = [other for other in full if other.first.recipe == recipe]
    if recipe in (POLISHED, TRIMMED):  # the full depth, too, is compared: with the scout's, or with all tokens
        same = [other for other in same if other is not group]
    if recipe == POLISHED:
        same = same or [other for other in full if other.first.recipe == SCOUTED]
    for other in same or [other for other in full if other.first.recipe == UNTRAINED]:
        if other.average is not None and group.average is not None and other.scores.keys() == group.scores.keys():
            return other
    return None


def _cost(variants: Sequence[Variant]) -> CostRow | None:
    """Costs in one row."""
    rows = [variant.cost for variant in variants if variant.cost is not None]
    if len(rows) < 2:
        return rows[0] if rows else None
    together: dict[str, Any] = {}
    for name in (item.name for item in fields(CostRow)):
        values = [getattr(row, name) for row in rows]
        if all(isinstance(value, (int, float)) for value in values):
            combine: Any = min if name.endswith("speed_low") else max if name.endswith("speed_high") else np.mean
            together[name] = round(combine(values)) if isinstance(values[0], int) else float(combine(values))
    return replace(rows[0], **together)


# Estimates ------------------------------------------------------------------------------------------------------------


def _seed_spreads(groups: Sequence[RunGroup]) -> _Spreads:
    squares: dict[_Key, list[tuple[float, int]]] = {}
    for group in groups:
        for task, tasks in (*((task, [task]) for task in group.tasks), ("", group.tasks)):
            values = group.means(tasks)
            if values and len(values) > 1:
                part = float(np.var(values)) * len(values), len(values) - 1
                squares.setdefault((group.first.base, group.first.recipe, task), []).append(part)
    freedom = {key: sum(n for _, n in parts) for key, parts in squares.items()}
    return {key: (sum(square for square, _ in parts) / freedom[key], freedom[key]) for key, parts in squares.items()}


def _estimate(sides: Sequence[RunGroup], tasks: Sequence[str], spreads: _Spreads, task: str = "") -> Estimate:
    """The mean over tasks of a group's score; of two groups, the first minus the second.

    It is no number where a score is missing, or where the two were scored on different things. ``task`` says whose
    variances between seeds to use: those of a task, or of the average.
    """
    means = [side.means(tasks) for side in sides]
    rows = [[variant.scores[name] for side in sides for variant in side.variants] for name in tasks]
    if any(values is None for values in means):
        return Estimate(math.nan)
    if len(sides) > 1 and any(not is_paired(row, own[0]) for own in rows for row in own):
        return Estimate(math.nan)
    first, *second = [float(np.mean(values)) for values in means if values is not None]
    value = first - sum(second)
    error, half = _seed_error(sides, spreads, task)
    if any(name not in side.draws for side in sides for name in tasks):
        return Estimate(value, seed_error=error)
    own, *other = [mean_of([side.draws[name] for name in tasks]) for side in sides]
    low, high = interval(own - sum(other))
    if low is None or high is None:
        return Estimate(value, seed_error=error)
    least, most = np.mean([limits_of(own[0].metric) for own in rows], axis=0)
    limits = (least - most, most - least) if len(sides) > 1 else (least, most)
    ends = np.clip([value - math.hypot(value - low, half), value + math.hypot(high - value, half)], *limits)
    return Estimate(value, float(ends[0]), float(ends[1]), error)


def _seed_error(sides: Sequence[RunGroup], spreads: _Spreads, task: str) -> tuple[float | None, float]:
    """Standard error over seeds, None where it is not known, and the half-width of its interval at 95 %.

    Means that share a pooled variance share its degrees of freedom, as in an analysis of variance; of different ones
    they are put together by Welch and Satterthwaite's formula.
    """
    shares: dict[_Key, float] = {}
    for side in sides:
        key = (side.first.base, side.first.recipe, task)
        if key in spreads:
            shares[key] = shares.get(key, 0.0) + 1 / len(side.variants)
    if not shares:
        return None, 0.0
    variances = [(spreads[key][0] * share, spreads[key][1]) for key, share in shares.items()]
    variance = sum(value for value, _ in variances)
    if variance == 0:
        return 0.0, 0.0
    freedom = variance**2 / sum(value**2 / n for value, n in variances)
    return math.sqrt(variance), float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
