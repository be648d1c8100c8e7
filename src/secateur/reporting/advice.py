"""What a scout found, in sentences to act on: which depth, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from secateur.choosing.budgets import cost_limits
from secateur.choosing.evidence import TOLERANCE, choose_rung
from secateur.document import plural, score, shorten, signed, span
from secateur.errors import SecateurError
from secateur.options import Budget
from secateur.reporting.findings import Estimate, Summary
from secateur.reporting.run import Scouted
from secateur.results import RungRow


def scout_sentences(summary: Summary) -> list[list[str]]:
    """For each base model with a scout: what was chosen and why."""
    found, run = [], summary.run
    for base in dict.fromkeys(scout.base for scout in run.scouts):
        scouts = [scout for scout in run.scouts if scout.base == base]
        decisive = [scout for scout in scouts if scout.chosen is not None] or scouts[:1]
        sentences = [f"{shorten(scout.name)}: {_choice(scout, run.budget)}" for scout in decisive]
        sentences += _other_seeds(decisive[0], [scout for scout in scouts if scout not in decisive])
        found.append(sentences)
    return found


def scout_note(summary: Summary) -> str:
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


# The choice -----------------------------------------------------------------------------------------------------------


def _choice(scouted: Scouted, budget: Budget) -> str:
    """The chosen depth beside the full one of the same training."""
    scout, chosen = scouted.table, scouted.chosen
    rungs = [row for row in scout.rows if row.score is not None and row.difference is not None]
    row = next((row for row in rungs if row.depth == chosen), None)
    if chosen is None:
        return f"the scout scored {plural(len(rungs), 'depth')} of {scout.depth}; none is chosen yet."
    if row is None:
        return f"{chosen} of {scout.depth} layers are chosen, a depth that the scout did not score."
    against, depth, on = f"against all {scout.depth} in the same training", scout.depth, f"on {scouted.judge},"
    how, is_within = _why(scouted, budget)
    if row.depth < depth:
        return f"{on} {row.depth} of {depth} layers {_loses(row, against)}{how}."
    smaller = [row for row in rungs if row.depth < depth]
    if not smaller:
        return f"all {depth} layers are chosen; no smaller depth was scored."
    if is_within:
        return f"{on} nothing smaller than all {depth} layers is {_not_within(smaller, against, budget)}."
    best = max(smaller, key=lambda row: row.difference)
    rest = f"of the smaller depths, {best.depth} layers come nearest, and {_loses(best, against)}"
    return f"{on} all {depth} layers are chosen{how}; {rest}."


def _why(scouted: Scouted, budget: Budget) -> tuple[str, bool]:
    """Why the depth is chosen, and whether it is the smallest one within the tolerance."""
    try:
        recommended = choose_rung(budget, scouted.table)
    except SecateurError:  # of a budget, or a table, that was edited since
        return "", False
    if len(recommended.blocks) != scouted.chosen:
        return f"; by these scores it would be {len(recommended.blocks)}", False
    if budget.best or recommended.warning:
        limits = " within the budget" if cost_limits(budget) else ""
        warning = f"; {recommended.warning}" if recommended.warning else ""
        return f", the highest score{limits}{warning}", False
    return f", within {_tolerance(budget)}", True


def _not_within(smaller: Sequence[RungRow], against: str, budget: Budget) -> str:
    """Which depth comes nearest to the tolerance, and what it loses."""
    nearest = max(smaller, key=lambda row: row.difference if row.difference_low is None else row.difference_low)
    how = f"{nearest.depth} layers come nearest, and"
    if nearest.difference_low is not None and -100 * nearest.difference_low <= points_of(budget):  # by itself
        nearest = max(smaller, key=lambda row: (row.trained, row.depth))
        how = f"depths are tried from the deepest down, and {nearest.depth} layers"
    return f"shown to be within {_tolerance(budget)}: {how} {_loses(nearest, against)}"


def points_of(budget: Budget) -> float:
    """Points of average score that may be lost, of 100."""
    return TOLERANCE if budget.tolerance is None else budget.tolerance


def _tolerance(budget: Budget) -> str:
    points = f"{points_of(budget):g} {'point' if points_of(budget) == 1 else 'points'}"
    return f"{'the' if budget.tolerance is None else 'your'} tolerance of {points}"


def _loses(row: RungRow, against: str) -> str:
    verb = "gain" if row.difference > 0 else "lose"
    return (
        f"{verb} {score(abs(row.difference))} points ({_interval(row.difference_low, row.difference_high)}) {against}"
    )


def _interval(low: float | None, high: float | None) -> str:
    return f"95 % interval {span(low, high, signed)}" if low is not None else "no interval"


def _other_seeds(decisive: Scouted, others: Sequence[Scouted]) -> Iterator[str]:
    """What scouts that did not decide say of the chosen depth."""
    rows = [row for scout in others for row in scout.table.rows if row.depth == decisive.chosen != scout.table.depth]
    told = [signed(row.difference) for row in rows if row.difference is not None]
    if told:
        yield f"At this depth, scouts with other seeds find a difference of {' and '.join(told)} points."


def apart(difference: Estimate) -> str:
    """A difference in words, with its interval."""
    none = "" if difference.low is None or difference.sign else ", no significant difference"
    more = f"{score(abs(difference.value))} points {'less' if difference.value < 0 else 'more'}"
    return f"{more} ({_interval(difference.low, difference.high)}{none})"
