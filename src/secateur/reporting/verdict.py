"""What to ship, or what to do first, in words that claim no more than the intervals support.

A cut is as good as the full model where its interval excludes a loss of more than the margin: the study's tolerance,
where it has one, else :data:`.MARGIN`. The full model is the best that the run has with all layers, however trained.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secateur.choosing.budgets import cost_limits
from secateur.document import SPACE, byte_size, count, duration, number, percent, plural, score, shorten, signed, span
from secateur.reporting.advice import coverage_notes, scout_sentences
from secateur.reporting.findings import MARGIN, GroupComparison, RunGroup, Summary
from secateur.results import CostRow

MOST_NAMED = 3
"""Profiles, averages or baselines that are named; tables hold the others."""


@dataclass(frozen=True)
class Recommendation:
    """What a run recommends.

    Attributes:
        headline: The model to ship, what it loses and what it saves; where there is none, what to do.
        ship: It, beside the full model.
        runner_up: The best model for half its cost; for half that of the full model where none is to be shipped.
        reasons: Sentences: what is compared and how surely, what the runner-up loses, what baselines do.
        folder: Where it is, in the run folder; empty where it is not there.
        compared: Name → comparison with the full model, of all models that could be shipped.
    """

    headline: str
    ship: GroupComparison | None = None
    runner_up: GroupComparison | None = None
    reasons: tuple[str, ...] = ()
    folder: str = ""
    compared: Mapping[str, GroupComparison] = field(default_factory=dict)

    def command(self, run: Path = Path()) -> str:
        """One that uses the model, with the run folder as seen from where it is given; empty without a model."""
        return f"secateur serve {shlex.quote(str(run / self.folder))}" if self.folder else ""

    def kind(self, group: RunGroup) -> str:
        """``baseline``, ``rejected`` (significantly worse than the full model), ``cut`` or ``full``."""
        item = self.compared.get(group.name)
        if group.first.is_baseline:
            return "baseline"
        if item is not None:
            return "rejected" if item.outcome == "worse" and not item.is_as_good(MARGIN) else "cut"
        return "full" if group.first.is_full else "cut"


def recommend(summary: Summary) -> Recommendation:
    """The smallest model that is as good as the full one and keeps to the study's budget, or what to do to find one."""
    compared = _beside_full(summary)
    cuts = [item for item in compared.values() if not item.group.first.is_baseline]
    if not cuts:
        headline, known = _nothing_to_compare(summary)
        return Recommendation(headline, reasons=known, compared=compared)
    budget = summary.run.budget
    limits, margin = cost_limits(budget), _margin(summary)
    fitting = [item for item in cuts if _fits(item.group.cost, limits)]
    tested = _by_series(cuts)
    good = [item for own in tested if (item := smallest_as_good(own, margin)) in fitting]
    ship: GroupComparison | None = None
    if budget.best or (limits and not good):
        ship = max(fitting, key=lambda item: item.difference.value, default=None)
        within = f"within {_limits_in_words(limits)}" if limits else "of those scored"
        headline = f"Ship {_named(ship)}, the best {within}: {_facts(ship)}." if ship else _too_large(cuts, limits)
    elif good:
        ship = min(good, key=lambda item: (_size(item.group), -item.difference.value))
        headline = f"Ship {_named(ship)}: {_facts(ship)}."
    else:
        headline = _not_yet([max(own, key=_depth) for own in tested] or cuts, margin)
    baselines = [item for item in compared.values() if item.group.first.is_baseline]
    beside = [summary.compare(item.group, ship.group) for item in baselines] if ship else baselines
    better = [item for item in beside if _fits(item.group.cost, limits) and _replaces(item, margin)]
    if better:
        taken = max(better, key=lambda item: item.difference.value)
        cut = ", the best cut" if ship else ", the full model"
        headline = (
            f"Use {_named(taken)}, which needs no cut: {_facts(taken)}, compared with {_named(taken, True)}{cut}."
        )
        ship = compared[taken.group.name]
    whole = ship.group if ship else min(cuts, key=lambda item: -_depth(item)).reference
    cheap = [
        item for item in (*fitting, *baselines) if item is not ship and _is_cheap(summary.compare(item.group, whole))
    ]
    runner_up = max(cheap, key=lambda item: item.difference.value, default=None)
    reasons = [_what_is_compared(ship or cuts[0])]
    if runner_up:
        of = "" if ship else " of the full model"
        reasons.append(f"For half the cost{of}: {_named(runner_up)}, {_facts(runner_up)}.")
    elif ship:
        reasons.append("No model of half its cost was scored.")
    told = [*better, *(item for item in beside if runner_up and item.group is runner_up.group)]
    reasons += [_baseline(item) for item in beside if item not in told][:MOST_NAMED]
    place = ship.group.first.folder if ship else None
    folder = place.relative_to(summary.run.folder).as_posix() if place else ""
    return Recommendation(headline, ship, runner_up, tuple(reasons), folder, compared)


def smallest_as_good(comparisons: Sequence[GroupComparison], margin: float = MARGIN) -> GroupComparison | None:
    """The smallest cut of a series that does not lose more than the margin; None where the largest may already.

    Fixed-sequence testing: cuts are tested from the largest down, and the first whose interval reaches such a loss ends
    the search, whatever is said of smaller ones. In this fixed order each test has the level of a single one, and the
    whole search errs no more often than one interval does on that side: once in forty.
    """
    found = None
    for item in sorted(comparisons, key=_depth, reverse=True):
        if not item.is_as_good(margin):
            break
        found = item
    return found


# What is compared -----------------------------------------------------------------------------------------------------


def _beside_full(summary: Summary) -> dict[str, GroupComparison]:
    """Every model that could be shipped beside the best full model that was scored on the same tasks.

    A full model could be shipped in place of a larger one: of another base, or with all tokens.
    """
    scored = [
        group
        for group in summary.groups
        if group.average and (group.first.depth is not None or group.first.is_baseline)
    ]
    full = [group for group in scored if group.first.is_full and not group.first.is_baseline]
    found: dict[str, GroupComparison] = {}
    for group in scored:
        others = [other for other in full if other is not group and other.scores.keys() == group.scores.keys()]
        if group in full:
            others = [other for other in others if _is_larger(other, group)]
        if others:
            item = summary.compare(group, max(others, key=lambda other: other.average.value if other.average else 0.0))
            found |= {group.name: item} if item.is_known else {}
    return found


def _is_larger(other: RunGroup, group: RunGroup) -> bool:
    if other.first.base == group.first.base and other.first.vocabulary == group.first.vocabulary:
        return False
    return _size(other) > _size(group) or (other.cost is None and other.first.vocabulary is None)


def _by_series(cuts: Sequence[GroupComparison]) -> list[list[GroupComparison]]:
    """Cuts to be tested in their order: those to the first layers, or of the one way in which layers were selected.

    The best of many selections is better than it will be again: none is said to be as good as the full model.
    """
    ways = {item.group.first.selection for item in cuts}
    way = "" if "" in ways or len(ways) > 1 else ways.pop()
    series: dict[str, list[GroupComparison]] = {}
    for item in cuts:
        if item.group.first.selection == way:
            series.setdefault(item.group.first.series, []).append(item)
    return list(series.values())


def _margin(summary: Summary) -> float:
    tolerance = summary.run.budget.tolerance
    return MARGIN if tolerance is None else tolerance / 100


def _replaces(item: GroupComparison, margin: float) -> bool:
    """Whether a baseline is as good as the other, and costs no more by all that was measured."""
    ratio = _share_of_size(item)
    is_slower = item.speed is not None and item.speed[1] and item.speed[0] < 1
    return item.is_as_good(margin) and ratio is not None and ratio <= 1 and not is_slower


def _is_cheap(item: GroupComparison) -> bool:
    """Whether a model is half the size of the other, or twice as fast and no larger."""
    ratio = _share_of_size(item)
    is_fast = item.speed is not None and item.speed[1] and item.speed[0] >= 2
    return ratio is not None and (ratio <= 0.5 or (ratio < 1 and is_fast))


def _depth(item: GroupComparison) -> int:
    return item.group.first.depth or 0


def _size(group: RunGroup) -> int:
    return group.cost.parameters if group.cost else group.first.depth or 0


def _share_of_size(item: GroupComparison) -> float | None:
    """Of bytes on disk, or of parameters; of layers where costs were not measured; None where nothing is known."""
    own, full = item.group.cost, item.reference.cost
    if own and full:
        pairs = ((own.bytes, full.bytes), (own.parameters, full.parameters))
        return next((mine / other for mine, other in pairs if mine and other), None)
    is_alike = not (own or full) and item.group.first.base == item.reference.first.base
    return _depth(item) / item.reference.first.depth if is_alike and item.reference.first.depth else None


_LIMITS: dict[str, tuple[str, float, Callable[[float], str]]] = {
    "max_params": ("parameters", 1, lambda value: f"{count(value)} parameters"),
    "max_bytes": ("bytes", 1, byte_size),
    "max_latency_ms": ("latency_p50", 1000, lambda value: f"{duration(value / 1000)} for one text"),
}
"""Limit → the cost that it limits, how many of its units a unit of that cost is, and how it is said."""


def _fits(cost: CostRow | None, limits: Mapping[str, float]) -> bool:
    """Whether all costs that are limited were measured, and are within their limits."""
    known = {key: getattr(cost, _LIMITS[key][0], 0) or 0 for key in limits}
    return all(0 < known[key] * _LIMITS[key][1] <= limit for key, limit in limits.items())


# What is said ---------------------------------------------------------------------------------------------------------


def difference_in_words(item: GroupComparison) -> str:
    """A difference with its interval, and whether it is significant."""
    own, said = item.difference, {1: "significantly better", 0: "no significant difference", -1: "significantly worse"}
    within = f"{span(own.low, own.high, signed)}, {said[own.sign]}" if own.low is not None else "no interval"
    return f"{signed(own.value)} points ({within})"


def _facts(item: GroupComparison) -> str:
    """What a model loses and saves beside another."""
    facts, speed, ratio = [difference_in_words(item)], item.speed, _share_of_size(item)
    if speed is not None:
        times = number(speed[0], ".2f" if speed[0] < 2 else ".1f" if speed[0] < 20 else ",.0f")
        facts.append(f"{times}{SPACE}×{SPACE}as fast" if speed[1] else "no measurable difference in speed")
    if ratio is not None:
        facts.append(f"{percent(ratio, 0)} of the {'size' if item.group.cost else 'layers'}")
    return ", ".join(facts)


def _named(item: GroupComparison, reference: bool = False) -> str:
    return shorten((item.reference if reference else item.group).name)


def _limits_in_words(limits: Mapping[str, float]) -> str:
    return f"your budget of {' and '.join(_LIMITS[key][2](limit) for key, limit in limits.items())}"


def _too_large(cuts: Sequence[GroupComparison], limits: Mapping[str, float]) -> str:
    smallest = min(cuts, key=lambda item: _size(item.group))
    cost = smallest.group.cost
    has = f"{count(cost.parameters)} parameters and {byte_size(cost.bytes)}" if cost else "costs that were not measured"
    return (
        f"Ship nothing yet: no model here fits {_limits_in_words(limits)}; {_named(smallest)}, the smallest, has "
        f"{has}. Cut deeper, or trim the vocabulary."
    )


def _not_yet(largest: Sequence[GroupComparison], margin: float) -> str:
    """What to do where nothing is as good; ``largest`` are the cuts at which each search ended."""
    if open_ones := [item for item in largest if item.outcome == "undecided"]:
        item = max(open_ones, key=lambda item: item.difference.low or 0.0)
        value, low = item.difference.value, item.difference.low or 0.0
        more = ((value - low) / (value + margin)) ** 2 if value > -margin else math.inf
        seeds = " and train more seeds" if item.difference.seed_error else ""
        data = "more" if seeds else f"about {math.ceil(more)} × as many" if more <= 20 else "many more"
        return (
            f"Not decided yet: {_named(item)} shows no significant difference ({signed(value)} points, "
            f"{span(low, item.difference.high, signed)}), but up to {score(-low)} points may be lost. "
            f"Score it on {data} test queries or pairs{seeds} before you ship it."
        )
    if known := [item for item in largest if item.outcome != "unknown"]:
        item = max(known, key=lambda item: item.difference.value)
        train = "Train it for more steps, or on more data," if item.group.first.training else "Train it after the cut,"
        nearest = f"{_named(item)} comes nearest, with {difference_in_words(item)}"
        return f"Keep {_named(item, True)}: {nearest}. {train} and score it again."
    item = max(largest, key=lambda item: item.difference.value)
    return (
        f"Not decided yet: {_named(item)} scores {signed(item.difference.value)} points beside {_named(item, True)}, "
        "but without intervals that may be chance. Evaluate both again to get them."
    )


def _what_is_compared(item: GroupComparison) -> str:
    """What the points are a difference to, and what their interval covers."""
    tasks = "your task" if len(item.tasks) == 1 else f"your {len(item.tasks)} tasks"
    said = f"Points, speed and size are relative to {_named(item, True)}, the full model, on {tasks}"
    if item.difference.low is None:
        return f"{said}."
    covers = "texts"
    if item.difference.seed_error is not None:
        covers = "texts and training seeds"
    elif item.group.first.training or item.reference.first.training:
        covers = "texts, with one training seed"
    more = " It had only the scout’s training; trained further in the same way, it might score higher."
    return f"{said}; ranges are 95 % intervals over {covers}.{more if item.is_polished_more else ''}"


def _baseline(item: GroupComparison) -> str:
    """A baseline that is not recommended, beside what is."""
    whole = "the full model" if item.reference.first.is_full else _named(item, True)
    cost = "" if item.group.cost else "; what it costs was not measured"
    return f"Baseline {_named(item)}, compared with {whole}: {_facts(item)}{cost}."


def _nothing_to_compare(summary: Summary) -> tuple[str, tuple[str, ...]]:
    """What to do where no cut stands beside a full model, and what scouts say."""
    run, scored = summary.run, [group for group in summary.groups if group.average is not None]
    if scored:
        missing = "cut" if all(group.first.is_full for group in scored) else "full model"
        return f"Nothing to compare yet: score a {missing} on the same tasks, too.", ()
    if run.scouts or run.profiles:
        headline = "Only depths are scored so far: train and score the chosen ones, and the full model."
        return headline, tuple(scout_sentences(run)[:MOST_NAMED])
    held = plural(len(run.variants), "model")
    return f"The run holds {held}, not yet scored: evaluate the full model and a cut.", ()


# Notes ----------------------------------------------------------------------------------------------------------------


def notes(summary: Summary) -> tuple[str, ...]:
    """What the verdict's intervals cover, and what they do not; and tasks that the vocabulary is not for."""
    cuts = summary.run.vocabularies
    found = [f"{note}." for base, cut in cuts.items() for note in coverage_notes(base, cut)]
    return tuple(note for note in (*found, _scout_note(summary), _interval_note(summary), seed_note(summary)) if note)


def _scout_note(summary: Summary) -> str:
    """How sure a choice by scouts is; empty without scouts."""
    run = summary.run
    if not run.scouts:
        return ""
    if run.budget.best:
        return "The depth has the highest of several scores; measured again, that score is likely to be lower."
    often = "forty" if all(row.trained for scout in run.scouts for row in scout.table.rows) else "twenty"
    return (
        "The depth is sought by the scores of one training, from the deepest down, up to the first that may lose more "
        f"than the tolerance: this errs at most once in {often}."
    )


def seed_note(summary: Summary) -> str:
    """What the number of training seeds allows to be said about differences between models; empty without scores."""
    scored = [variant for variant in summary.run.variants if variant.scores]
    seeds = sorted({variant.seed for variant in scored if variant.training and variant.seed is not None})
    if not scored:
        return ""
    if not seeds:
        return "Scores are those of one evaluation on samples of finite size; small differences may be chance."
    if not any(group.average and group.average.seed_error is not None for group in summary.groups):
        which = f"one seed ({seeds[0]})" if len(seeds) == 1 else "one seed"
        return (
            f"Every model was trained with {which}. How much scores vary between seeds was not measured, so that "
            "small differences between models may be chance."
        )
    used = sorted({len(group.seeds) for group in summary.groups if group.average and group.seeds})
    numbers = f"{used[0]} to {used[-1]}" if len(used) > 1 else f"{used[0]}"
    return f"Each model was trained with {numbers} seeds; scores are means over them."


def _interval_note(summary: Summary) -> str:
    comparisons = [item.difference for item in summary.compared.values() if item.is_known]
    known = [difference for difference in comparisons if difference.low is not None]
    if not known:
        return "No score here has an interval, so differences may be chance." if comparisons else ""
    seeds = any(difference.seed_error is not None for difference in known)
    return (
        "Ranges are 95 % intervals of the difference, paired by text: what other texts of the same kind"
        f"{' (and other seeds, where several were trained)' if seeds else ''} would have given. They hold for "
        "each comparison by itself, and for these tasks. The smallest cut that is as good is sought in each series "
        f"from the largest down, up to the first that may lose more than {100 * _margin(summary):g} points: each "
        "search errs at most once in forty."
    )
