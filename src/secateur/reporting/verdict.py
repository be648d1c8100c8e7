"""What to ship, or what to do first, in words that claim no more than the intervals support.

A cut is as good as the full model where its interval excludes a loss of more than the margin: the study's tolerance,
where it has one, else :data:`.MARGIN`. The full model is the best that the run has with all layers, however trained.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

from secateur.choosing.budgets import choose_rung, cost_limits, tolerance_of
from secateur.document import SPACE, byte_size, count, duration, percent, plural, score, shorten, signed, span, speed
from secateur.errors import SecateurError
from secateur.reporting.findings import MARGIN, GroupComparison, Summary, compare_groups
from secateur.reporting.run import POLISHED, SCOUTED, Run, Scouted, judge_in_words
from secateur.results import CostRow, VocabularyCut

MOST_NAMED = 3
"""Scouts or baselines that are named; tables hold the others."""


@dataclass(frozen=True)
class Recommendation:
    """What a run recommends.

    Attributes:
        headline: The model to ship, what it loses and what it saves; where there is none, what to do.
        ship: It, beside the full model.
        runner_up: The best model for half its cost; for half that of the full model where none is to be shipped.
        reasons: Sentences: what is compared and how surely, what the runner-up loses, what baselines do.
        folder: Where it is, in the run folder; empty where it is not there.
    """

    headline: str
    ship: GroupComparison | None = None
    runner_up: GroupComparison | None = None
    reasons: tuple[str, ...] = ()
    folder: str = ""

    def command(self, run: Path = Path()) -> str:
        """One that uses the model, with the run folder as seen from where it is given; empty without a model."""
        return f"secateur serve {shlex.quote(str(run / self.folder))}" if self.folder else ""


def recommend(summary: Summary) -> Recommendation:
    """The smallest model that is as good as the full one and keeps to the study's budget, or what to do to find one."""
    compared, limits = summary.compared, cost_limits(summary.run.budget)
    cuts = [item for item in compared.values() if not item.group.first.is_baseline]
    if not cuts:
        headline = "Nothing to compare yet: train the chosen cuts, and score them and the full model on the same tasks."
        chosen = [scout for scout in summary.run.scouts if scout.chosen is not None]  # by the first seed's alone
        costs = [group.cost for group in summary.groups if group.cost]
        if costs and not any(_fits(cost, limits) for cost in costs):
            headline = _nothing_fits(limits)
        elif chosen and all(scout.chosen == scout.table.depth for scout in chosen):
            why = "is shown to be as good. Score the depths on more test queries or pairs, allow a larger --tolerance,"
            if summary.run.budget.best:
                why = "has a higher score. Allow a loss (--tolerance in place of --best),"
            headline = f"Keep all layers for now: no smaller depth {why} or train a depth of your choice with --polish."
        return Recommendation(headline, reasons=tuple(scout_sentences(summary.run)[:MOST_NAMED]))
    fitting = [item for item in cuts if _fits(item.group.cost, limits)]
    ship, told, headline = _choose(summary, cuts, fitting)
    baselines = [item for item in compared.values() if item.group.first.is_baseline]
    beside = [compare_groups(item.group, ship.group) for item in baselines] if ship else baselines
    beside = [item for item in beside if not math.isnan(item.difference.value)]  # of another base model's own texts
    better = [item for item in beside if _fits(item.group.cost, limits) and _replaces(item, _margin(summary))]
    if better:
        used = max(better, key=lambda item: item.difference.value)
        name, other = shorten(used.group.name), shorten(used.reference.name)
        headline = f"Use {name}, which needs no cut: {_facts(used)}, compared with {other}."
        ship = told = compared[used.group.name]
    whole = ship.group if ship else told.reference
    others = [item.group for item in (*fitting, *baselines) if item is not ship]
    # Beside the full model that is named, which may not be the one of its own base model.
    cheap = [compare_groups(group, told.reference) for group in others if _is_cheap(compare_groups(group, whole))]
    compared_alike = [item for item in cheap if not math.isnan(item.difference.value)]
    runner_up = max(compared_alike, key=lambda item: item.difference.value, default=None)
    reasons = [_what_is_compared(told)]
    if runner_up:
        of = "" if ship else " of the full model"
        reasons.append(f"For half the cost{of}: {shorten(runner_up.group.name)}, {_facts(runner_up)}.")
    named = [item.group for item in (ship, runner_up) if item]
    reasons += [
        f"Baseline {shorten(item.group.name)}, compared with {shorten(item.reference.name)}: {_facts(item)}."
        for item in [item for item in beside if item.group not in named][:MOST_NAMED]
    ]
    place = ship.group.first.folder if ship else None
    folder = place.relative_to(summary.run.folder).as_posix() if place else ""
    return Recommendation(headline, ship, runner_up, tuple(reasons), folder)


def _choose(
    summary: Summary, cuts: Sequence[GroupComparison], fitting: Sequence[GroupComparison]
) -> tuple[GroupComparison | None, GroupComparison, str]:
    """The cut to ship, if any, that which is told of, and what is said; ``fitting`` are within the limits of costs."""
    budget, margin = summary.run.budget, _margin(summary)
    searches = _by_series(cuts)
    passed = [smallest_as_good(own, margin) for own in searches]
    good = [item for item in passed if item and item in fitting]
    if good and not budget.best:
        ship = min(good, key=lambda item: (_parameters(item), _depth(item), -item.difference.value))
        return ship, ship, f"Ship {shorten(ship.group.name)}: {_facts(ship)}."
    limits = cost_limits(budget)
    within = _limits_in_words(limits)
    if not fitting:
        return None, cuts[0], _nothing_fits(limits, all(item.group.cost for item in cuts))
    ship = max(fitting, key=lambda item: item.difference.value)
    if not _fits(ship.reference.cost, limits) or (budget.best and ship.difference.value >= 0):
        best = f"the best within your budget of {within}" if within else "the best of those scored"
        return ship, ship, f"Ship {shorten(ship.group.name)}, {best}: {_facts(ship)}."
    nearest = ship if budget.best else _nearest([max(own, key=_depth) for own in searches] or cuts)
    is_nearest = not searches or all(item.difference.value <= nearest.difference.value for item in cuts)
    what = "comes nearest" if is_nearest else "is the largest cut of its kind"
    return None, nearest, _not_yet(nearest, margin, what)


def smallest_as_good(comparisons: Sequence[GroupComparison], margin: float = MARGIN) -> GroupComparison | None:
    """The smallest cut of a series that does not lose more than the margin; None where the largest may already.

    Fixed-sequence testing: cuts are tested from the largest down, and the first whose interval reaches such a loss ends
    the search, whatever is said of smaller ones. In this fixed order each test has the level of a single one, and the
    whole search errs no more often than one interval does on that side: once in forty.
    """
    largest_first = sorted(comparisons, key=_depth, reverse=True)
    passed = list(takewhile(lambda item: item.is_as_good(margin), largest_first))
    return passed[-1] if passed else None


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
    budget = summary.run.budget
    by_texts = any(scout.table.judge == "texts" for scout in summary.run.scouts)
    return MARGIN if budget.tolerance is None and not by_texts else tolerance_of(budget, "texts") / 100


def _replaces(item: GroupComparison, margin: float) -> bool:
    """Whether a baseline is as good as the other, and costs no more by all that was measured."""
    return item.is_as_good(margin) and item.size is not None and item.size <= 1 and (item.speed or 1) >= 1


def _is_cheap(item: GroupComparison) -> bool:
    """Whether a model is half the size of the other and no slower, or twice as fast and no larger."""
    speed = item.speed or 1
    return item.size is not None and ((item.size <= 0.5 and speed >= 1) or (item.size < 1 and speed >= 2))


def _depth(item: GroupComparison) -> int:
    return item.group.first.depth or 0


def _parameters(item: GroupComparison) -> float:
    return item.group.cost.parameters if item.group.cost else math.inf


_LIMITS: dict[str, tuple[Callable[[CostRow], float], Callable[[float], str]]] = {
    "max_params": (lambda cost: cost.parameters, lambda limit: f"{count(limit)} parameters"),
    "max_bytes": (lambda cost: cost.memory_bytes or cost.bytes, byte_size),  # of the weights, without the tokenizer
    "max_latency_ms": (lambda cost: 1000 * cost.latency_p50, lambda limit: f"{duration(limit / 1000)} for one text"),
}
"""Limit → the cost that it limits, and how it is said."""


def _fits(cost: CostRow | None, limits: Mapping[str, float]) -> bool:
    """Whether all costs that are limited were measured, and are within their limits."""
    return all(cost is not None and 0 < _LIMITS[key][0](cost) <= limit for key, limit in limits.items())


# What is said ---------------------------------------------------------------------------------------------------------


def _limits_in_words(limits: Mapping[str, float]) -> str:
    return " and ".join(_LIMITS[key][1](limit) for key, limit in limits.items())


def _nothing_fits(limits: Mapping[str, float], are_known: bool = True) -> str:
    fits, advice = "fits", "Cut deeper, or trim the vocabulary."
    if not are_known:
        fits, advice = "is known to fit", "What some of them cost was not measured: resume the study."
    return f"Ship nothing yet: no model here {fits} your budget of {_limits_in_words(limits)}. {advice}"


def difference_in_words(item: GroupComparison) -> str:
    """A difference with its interval, and whether it is significant."""
    own, said = item.difference, {1: "significantly better", 0: "no significant difference", -1: "significantly worse"}
    if own.low is None:
        return f"{signed(own.value)} points (no interval)"
    ends = [signed(own.low), signed(own.high)]
    digits = 2 if own.sign and "0.0" in ends else 1  # what is significant is not shown as nothing
    show = partial(signed, digits=digits)
    return f"{show(own.value)} points ({span(own.low, own.high, show)}, {said[own.sign]})"


def _facts(item: GroupComparison) -> str:
    """What a model loses and saves beside another."""
    facts = [difference_in_words(item)]
    if item.speed is not None:
        facts.append(f"{speed(item.speed)}{SPACE}×{SPACE}as fast")
    if item.size is not None:
        facts.append(f"{percent(item.size, 0)} of the size")
    return ", ".join(facts)


def _nearest(largest: Sequence[GroupComparison]) -> GroupComparison:
    """Of the cuts at which each search ended, that which comes nearest to being as good."""

    def rank(item: GroupComparison) -> tuple[bool, float, float]:
        low = item.difference.low
        return item.outcome in ("same", "undecided"), -math.inf if low is None else low, item.difference.value

    return max(largest, key=rank)


def _not_yet(item: GroupComparison, margin: float, what: str) -> str:
    """What to do where nothing is as good as the full model, and at this, which ``what`` tells, the search ended."""
    name, full, difference = shorten(item.group.name), shorten(item.reference.name), item.difference
    value, low = difference.value, difference.low
    if low is None:
        rows = [row for side in (item.group, item.reference) for v in side.variants for row in v.scores.values()]
        without = [row for row in rows if not row.draws]
        advice = "Score both on more test queries or pairs"  # no sample of these tells the two apart
        if without:
            told = {row.task: row.note[row.note.find("no interval") :] for row in without if "no interval" in row.note}
            advice = "; ".join(f"{task}: {why}" for task, why in told.items()) or "Evaluate both again to get them"
        return (
            f"Not decided yet: {name} scores {signed(value)} points beside {full}, but without intervals that may be "
            f"chance. {advice}."
        )
    if difference.sign or item.is_as_good(margin):  # as good, where the best is asked for
        train = "Train it for more steps, or on more data," if item.group.first.training else "Train it after the cut,"
        return f"Keep {full}: {name} {what}, with {difference_in_words(item)}. {train} and score it again."
    # An interval narrows with the square root of the amount.
    more = ((value - low) / (value + margin)) ** 2 if value > -margin else math.inf
    data = f"about {math.ceil(more)} × as many" if more <= 20 else "many more"
    seeds = " and train more seeds" if difference.seed_error else ""
    return (
        f"Not decided yet: {name} shows no significant difference ({signed(value)} points, "
        f"{span(low, difference.high, signed)}), but up to {score(-low)} points may be lost. "
        f"Score it on {data} test queries or pairs{seeds} before you ship it."
    )


def _what_is_compared(item: GroupComparison) -> str:
    """What the points are a difference to, and what their interval covers."""
    own, full = item.group.first, item.reference.first
    scout = own.scout or full.scout
    judge = judge_in_words(scout.table.judge if scout else "", len(item.tasks))
    said = f"Points, speed and size are relative to {shorten(item.reference.name)}, the full model, on {judge}"
    if item.difference.low is not None:
        seeds = "not over" if item.difference.seed_error is None else "and over"
        said += f"; ranges are 95 % intervals over texts, {seeds} training seeds"
    more = " It had only the scout’s training; trained further in the same way, it might score higher."
    return f"{said}.{more if (own.recipe, full.recipe) == (POLISHED, SCOUTED) else ''}"


def scout_sentences(run: Run) -> list[str]:
    """For each scout that a depth was chosen by, or for all that may yet be: the depth, and why."""
    told = [scout for scout in run.scouts if scout.chosen is not None] or run.scouts
    return [f"{shorten(scout.name)}, on {scout.judge}: {_choice(run, scout)}" for scout in told]


def _choice(run: Run, scout: Scouted) -> str:
    """What the scores recommend, and the depth that is chosen where it is another."""
    chosen = f"{scout.chosen} of {scout.table.depth} layers are chosen" if scout.chosen else "no depth is chosen yet"
    try:
        recommended = choose_rung(run.budget, scout.table)
    except SecateurError as error:  # no depth is within the budget; or that, or the table, was edited since
        return f"{chosen}: {error}."
    reason = recommended.reason + (f" Note: {recommended.warning}." if recommended.warning else "")
    if scout.chosen == len(recommended.blocks):
        return reason
    return f"{chosen}; by these scores it would be this: {reason}"


def vocabulary_facts(cut: VocabularyCut, publish: Callable[[str], str] = str) -> list[str]:
    """What was cut, by which texts, and what that does to texts like these; ``publish`` shows the name of a file."""
    row = cut.row
    facts = [
        f"Vocabulary: {row.tokens:,} of {cut.tokens:,} tokens, chosen by {plural(cut.texts, 'text', ',')} of "
        f"{', '.join(map(publish, cut.files))}.",
        f"Of texts like these that were held out, {percent(row.coverage)} of the tokens stay, and "
        f"{percent(row.changed)} of the texts have one that does not; a text has {row.tokens_per_text:.1f} tokens on "
        f"average, {cut.tokens_per_text:.1f} before.",
    ]
    if row.unknown:
        facts.append(f"Newly unknown tokens: {percent(row.unknown, 2)}.")
    if cut.task_coverage:
        tasks = ", ".join(f"{task} {percent(share)}" for task, share in cut.task_coverage.items())
        facts.append(f"Of the tokens of tasks stay: {tasks}.")
    return facts


# How sure it is -------------------------------------------------------------------------------------------------------


def notes(summary: Summary) -> list[str]:
    """What the verdict's intervals cover, and what they do not; and tasks that the vocabulary is not for."""
    run = summary.run
    found = [f"{note}." for base, cut in run.vocabularies.items() for note in coverage_notes(base, cut)]
    if run.scouts and run.budget.best:
        found.append("The depth has the highest of several scores; measured again, that score is likely to be lower.")
    if any(item.difference.low is not None for item in summary.compared.values()):
        found.append(
            "Ranges are 95 % intervals of the difference, paired by text: what other texts of the same kind (and other "
            "seeds, where several were trained) would have given. They hold for each comparison by itself, and for "
            "these tasks. The smallest cut that is as good is sought in each series from the largest down, up to the "
            f"first that may lose more than {plural(100 * _margin(summary), 'point', 'g')}: each search errs at most "
            "once in forty."
        )
    elif summary.compared:
        found.append("No difference here has an interval, so differences may be chance.")
    return [*found, *filter(None, [seed_note(summary)])]


def coverage_notes(name: str, cut: VocabularyCut) -> list[str]:
    """Warnings that tasks have texts of another kind than those that the vocabulary was cut by."""
    return [
        f"{name}: the vocabulary has {percent(share)} of the tokens of the task {task}, of texts that were held out "
        f"{percent(cut.row.coverage)}: it was cut by texts of another language or kind"
        for task, share in cut.uncovered.items()
    ]


def seed_note(summary: Summary, *, of_one: bool = False) -> str:
    """What the number of training seeds allows to be said about differences between models; empty without trainings.

    ``of_one``: beside the scores of one model, not of all that differ in their seed alone.
    """
    most = max((len(group.seeds) for group in summary.groups if group.average), default=0)
    if most == 0:
        return ""
    if most > 1:
        scores = "scores are of this one, differences are of means" if of_one else "scores are means"
        return f"Models were trained with up to {most} seeds; {scores} over them."
    return (
        "Every model was trained with one seed. How much scores vary between seeds was not measured, so that small "
        "differences between models may be chance."
    )
