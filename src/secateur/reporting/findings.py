"""What a run found: scores of its models over their training seeds, and each beside the best model with all layers.

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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.stats import t

from secateur.evaluation.replicates import is_paired, read_replicates
from secateur.measures.intervals import CONFIDENCE, Array, interval, limits_of
from secateur.reporting.run import Run, Variant
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
    """Models that differ in their training seed alone, by seed; one, where there are no others.

    ``family``: all groups of its base model and recipe, over which the variance between seeds is pooled.
    """

    variants: tuple[Variant, ...]
    family: list[RunGroup] = field(compare=False, repr=False)

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
        if not tasks or any(task not in self.tasks for task in tasks):
            return None
        rows = [[variant.scores[task].score for task in tasks] for variant in self.variants]
        return None if any(None in row for row in rows) else [sum(row) / len(row) for row in rows]

    @cached_property
    def draws(self) -> Mapping[str, Array]:
        """Task → bootstrap replicates of the mean over the models, where there are any."""
        found = {}
        for task in self.tasks:
            rows = [variant.scores[task] for variant in self.variants]
            if all(row.draws and is_paired(row, rows[0]) for row in rows):
                read = [read_replicates(v.results[task], row) for v, row in zip(self.variants, rows, strict=True)]
                found[task] = np.mean([replicates for replicates in read if replicates is not None], axis=0)
        return found

    @cached_property
    def scores(self) -> Mapping[str, Estimate]:
        """Task → mean over the models."""
        return {task: _estimate([self], [task]) for task in self.tasks}

    @cached_property
    def average(self) -> Estimate | None:
        """Mean over the tasks; None where there are none, or one without a number."""
        found = _estimate([self], self.tasks)
        return None if math.isnan(found.value) else found

    @property
    def cost(self) -> CostRow | None:
        """That of the first of its models that has one: they differ in their weights alone."""
        return next((variant.cost for variant in self.variants if variant.cost), None)


@dataclass(frozen=True)
class GroupComparison:
    """A group beside a full model's, or another: the difference of average scores, and that of each task.

    A difference is no number where the two were scored on different things.
    """

    group: RunGroup
    reference: RunGroup
    difference: Estimate
    tasks: Mapping[str, Estimate]

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
    def speed(self) -> float | None:
        """How many times as fast, in short texts per second; None where the measured ranges overlap, or are none."""
        own, full = self.group.cost, self.reference.cost
        if not own or not full or any(cost.speed_low == cost.speed_high for cost in (own, full)):  # measured once
            return None
        is_apart = own.speed_low > full.speed_high or own.speed_high < full.speed_low
        return own.texts_per_second / full.texts_per_second if is_apart else None

    @property
    def size(self) -> float | None:
        """How many times as large, in bytes on disk."""
        own, full = self.group.cost, self.reference.cost
        return own.bytes / full.bytes if own and full and full.bytes else None

    def count(self, sign: int) -> int:
        """Tasks that are significantly better (1) or worse (-1)."""
        return sum(difference.sign == sign for difference in self.tasks.values())


def compare_groups(group: RunGroup, reference: RunGroup) -> GroupComparison:
    """Any group beside any other; the difference is no number where they have other tasks."""
    alike, sides = group.scores.keys() == reference.scores.keys(), [group, reference]
    tasks = {task: _estimate(sides, [task]) for task in group.scores} if alike else {}
    return GroupComparison(group, reference, _estimate(sides, list(tasks)), tasks)


@dataclass(frozen=True)
class Summary:
    """A run with its groups."""

    run: Run
    groups: tuple[RunGroup, ...]

    @cached_property
    def compared(self) -> Mapping[str, GroupComparison]:
        """Name → comparison with the best full model that was scored on the same things, however it was trained.

        Of cuts and baselines; and of full models that are smaller, which could be shipped in place of a larger one: of
        another base model, or with all tokens.
        """
        found: dict[str, GroupComparison] = {}
        scored = [group for group in self.groups if group.average]
        full = [group for group in scored if group.first.is_full]
        for group in scored:
            others = [other for other in full if _is_scored_alike(group, other)]
            if group in full:
                others = [other for other in others if _is_smaller(group, other)]
            if others and (group.first.depth is not None or group.first.is_baseline):
                best = max(others, key=lambda other: other.average.value if other.average else 0.0)
                item = compare_groups(group, best)
                found |= {} if math.isnan(item.difference.value) else {group.name: item}
        return found

    def kind(self, group: RunGroup) -> str:
        """``baseline``, ``rejected`` (significantly worse than the full model), ``cut`` or ``full``."""
        item = self.compared.get(group.name)
        if group.first.is_baseline:
            return "baseline"
        if item is not None:
            return "rejected" if item.outcome == "worse" and not item.is_as_good(MARGIN) else "cut"
        return "full" if group.first.is_full else "cut"


def _is_scored_alike(group: RunGroup, other: RunGroup) -> bool:
    """Whether two were scored on the same rows: of texts alone, each base model judges those that it is scored on."""
    own, others = group.first.scores, other.first.scores
    return group.scores.keys() == other.scores.keys() and all(is_paired(own[t], others[t]) for t in group.tasks)


def _is_smaller(group: RunGroup, other: RunGroup) -> bool:
    return bool(group.cost and other.cost and group.cost.parameters < other.cost.parameters)


def summarize(run: Run) -> Summary:
    """Put together the models that differ in their seed alone; whatever reads their draws may raise a DataError."""
    together: dict[object, list[Variant]] = {}
    for variant in run.variants:
        blocks = variant.origin.kept if variant.origin else variant.depth
        # Without a seed, models that are otherwise alike are not known to be repetitions.
        other = variant.name if variant.seed is None or variant.depth is None else ""
        key = (variant.base, variant.selection, variant.recipe, blocks, other)
        if any(variant.seed == one.seed for one in together.get(key, [])):  # trained again under another name
            key = (*key[:-1], variant.name)
        together.setdefault(key, []).append(variant)
    families: dict[object, list[RunGroup]] = {}
    groups = []
    for variants in together.values():
        family = families.setdefault((variants[0].base, variants[0].recipe), [])
        groups.append(RunGroup(tuple(variants), family))
        family.append(groups[-1])
    return Summary(run, tuple(groups))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, score) points that no other beats: cheaper and as good, or better and as cheap."""
    best, kept = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept


# Estimates ------------------------------------------------------------------------------------------------------------


def _estimate(sides: Sequence[RunGroup], tasks: Sequence[str]) -> Estimate:
    """The mean over tasks of a group's score; of two groups, the first minus the second.

    It is no number where a score is missing, or where the two were scored on different things.
    """
    means = [float(np.mean(values)) for side in sides if (values := side.means(tasks)) is not None]
    rows = [[variant.scores[name] for side in sides for variant in side.variants] for name in tasks]
    paired = len(sides) == 1 or all(is_paired(row, own[0]) for own in rows for row in own)
    if len(means) < len(sides) or not paired:
        return Estimate(math.nan)
    value = means[0] - sum(means[1:])
    error, half = _seed_error(sides, tasks)
    low = high = None
    least, most = np.mean([limits_of(own[0].metric) for own in rows], axis=0)
    limits = (least - most, most - least) if len(sides) > 1 else (least, most)
    if all(name in side.draws for side in sides for name in tasks):
        own, *other = [np.mean([side.draws[name] for name in tasks], axis=0) for side in sides]
        low, high = interval(own - sum(other), limits, min(row.units for (row, *_) in rows))
    if low is None or high is None:
        return Estimate(value, seed_error=error)
    ends = np.clip([value - math.hypot(value - low, half), value + math.hypot(high - value, half)], *limits)
    return Estimate(value, float(ends[0]), float(ends[1]), error)


def _seed_error(sides: Sequence[RunGroup], tasks: Sequence[str]) -> tuple[float | None, float]:
    """Standard error over seeds, None where it is not known, and the half-width of its interval at 95 %.

    Means that share a pooled variance share its degrees of freedom, as in an analysis of variance; of different ones
    they are put together by Welch and Satterthwaite's formula.
    """
    variances: list[tuple[float, float]] = []
    for family in {id(side.family): side.family for side in sides}.values():
        seeds = [values for group in family if (values := group.means(tasks)) is not None]
        if own := sum(len(values) - 1 for values in seeds):
            pooled = sum(len(values) * float(np.var(values)) for values in seeds) / own
            share = sum(1 / len(side.variants) for side in sides if side.family is family)
            variances.append((pooled * share, own))
    if not variances:
        return None, 0.0
    variance = sum(value for value, _ in variances)
    if variance == 0:
        return 0.0, 0.0
    freedom = variance**2 / sum(value**2 / n for value, n in variances)
    return math.sqrt(variance), float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
