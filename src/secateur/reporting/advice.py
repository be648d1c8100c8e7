"""What a scout found and what the cut of a vocabulary did, in sentences to act on."""

from __future__ import annotations

from collections.abc import Callable

from secateur.choosing.budgets import cost_limits
from secateur.choosing.evidence import TOLERANCE, choose_rung
from secateur.document import interval, percent, plural, score, shorten, signed
from secateur.errors import SecateurError
from secateur.options import Budget
from secateur.reporting.findings import Estimate, GroupComparison, Summary
from secateur.reporting.run import TRIMMED, Scouted
from secateur.results import RungRow, VocabularyCut

# Scouts ---------------------------------------------------------------------------------------------------------------


def scout_sentences(summary: Summary) -> list[list[str]]:
    """For each base model with a scout: what was chosen and why."""
    found, run = [], summary.run
    for base in dict.fromkeys(scout.base for scout in run.scouts):
        scouts = [scout for scout in run.scouts if scout.base == base]
        decisive = [scout for scout in scouts if scout.chosen is not None] or scouts[:1]
        sentences = [f"{shorten(scout.name)}: {_choice(scout, run.budget)}" for scout in decisive]
        first = decisive[0]
        others = [row for scout in scouts if scout not in decisive for row in scout.table.rows]
        same = [row for row in others if row.depth == first.chosen != first.table.depth and row.difference is not None]
        if same:
            told = " and ".join(signed(row.difference) for row in same)
            sentences.append(f"At this depth, scouts with other seeds find a difference of {told} points.")
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


def _choice(scouted: Scouted, budget: Budget) -> str:
    """The chosen depth beside the full one of the same training."""
    scout, chosen, depth = scouted.table, scouted.chosen, scouted.table.depth
    rungs = [row for row in scout.rows if row.score is not None and row.difference is not None]
    row = next((row for row in rungs if row.depth == chosen), None)
    if chosen is None:
        return f"the scout scored {plural(len(rungs), 'depth')} of {depth}; none is chosen yet."
    if row is None:
        return f"{chosen} of {depth} layers are chosen, a depth that the scout did not score."

    def loses(row: RungRow) -> str:
        lost = f"{'gain' if row.difference > 0 else 'lose'} {score(abs(row.difference))} points"
        ends = interval(row.difference_low, row.difference_high)
        return f"{lost} ({ends}) against all {depth} in the same training"

    on, within, how = f"on {scouted.judge},", f"within {_tolerance(budget)}", _why(scouted, budget)
    if row.depth < depth:
        return f"{on} {row.depth} of {depth} layers {loses(row)}{f', {within}' if how is None else how}."
    smaller = [row for row in rungs if row.depth < depth]
    if not smaller:
        return f"all {depth} layers are chosen; no smaller depth was scored."
    if how is not None:
        best = max(smaller, key=lambda row: row.difference)
        rest = f"of the smaller depths, {best.depth} layers come nearest, and {loses(best)}"
        return f"{on} all {depth} layers are chosen{how}; {rest}."
    nearest = max(smaller, key=lambda row: row.difference if row.difference_low is None else row.difference_low)
    said = f"{nearest.depth} layers come nearest, and"
    if nearest.difference_low is not None and -100 * nearest.difference_low <= points_of(budget):  # by itself
        nearest = max(smaller, key=lambda row: (row.trained, row.depth))
        said = f"depths are tried from the deepest down, and {nearest.depth} layers"
    return f"{on} nothing smaller than all {depth} layers is shown to be {within}: {said} {loses(nearest)}."


def _why(scouted: Scouted, budget: Budget) -> str | None:
    """Why the depth is chosen; None where it is the smallest one within the tolerance."""
    try:
        recommended = choose_rung(budget, scouted.table)
    except SecateurError:  # of a budget, or a table, that was edited since
        return ""
    if len(recommended.blocks) != scouted.chosen:
        return f"; by these scores it would be {len(recommended.blocks)}"
    if budget.best or recommended.warning:
        warning = f"; {recommended.warning}" if recommended.warning else ""
        return f", the highest score{' within the budget' if cost_limits(budget) else ''}{warning}"
    return None


def points_of(budget: Budget) -> float:
    """Points of average score that may be lost, of 100."""
    return TOLERANCE if budget.tolerance is None else budget.tolerance


def _tolerance(budget: Budget) -> str:
    points = f"{points_of(budget):g} {'point' if points_of(budget) == 1 else 'points'}"
    return f"{'the' if budget.tolerance is None else 'your'} tolerance of {points}"


def apart(difference: Estimate) -> str:
    """A difference in words, with its interval."""
    none = "" if difference.low is None or difference.sign else ", no significant difference"
    more = f"{score(abs(difference.value))} points {'less' if difference.value < 0 else 'more'}"
    return f"{more} ({interval(difference.low, difference.high)}{none})"


# Vocabularies ---------------------------------------------------------------------------------------------------------


def vocabulary_sentences(summary: Summary) -> list[str]:
    """For each base model with a cut vocabulary: how many tokens stay, and what all its layers are worth with them."""
    told = []
    for base, cut in summary.run.vocabularies.items():
        full = [item for item in summary.originals.values() if item.group.first.base == base]
        # Those of a scout have sentences of their own.
        full = [item for item in full if item.group.first.is_full and item.group.first.scout is None]
        worth = map(_loss, sorted(full, key=lambda item: item.group.first.recipe != TRIMMED))
        told.append(
            f"{shorten(base)}: the vocabulary is cut to {cut.row.tokens:,} of {cut.tokens:,} tokens, which are "
            f"{percent(cut.row.coverage)} of those of held-out texts{''.join(worth)}."
        )
    return told


def _loss(item: GroupComparison) -> str:
    """What a model of full depth loses against all tokens."""
    recipe, cost, whole = item.group.first.recipe, item.group.cost, item.reference.cost
    said = f"scores {apart(item.difference)} than as it came" if item.is_known else ""
    if recipe != TRIMMED:
        return f"; {recipe}, it {said}" if said else ""
    has = f"has {percent(cost.parameters / whole.parameters, 0)} of the parameters" if cost and whole else ""
    parts = " and ".join(part for part in (has, said) if part)
    return f"; untrained, the model of full depth {parts}" if parts else ""


def vocabulary_facts(cut: VocabularyCut, publish: Callable[[str], str] = str) -> list[str]:
    """What was cut, by which texts, and what that does to texts like these; ``publish`` shows the name of a file."""
    row = cut.row
    facts = [
        f"Vocabulary: {row.tokens:,} of {cut.tokens:,} tokens, chosen by {cut.texts:,} texts of "
        f"{', '.join(map(publish, cut.files))}.",
        f"Of texts like these that were held out, {percent(row.coverage)} of the tokens stay, and "
        f"{percent(row.changed)} of the texts have one that does not; a text has {row.tokens_per_text:.1f} tokens on "
        f"average, {cut.tokens_per_text:.1f} before.",
    ]
    return facts + ([f"Newly unknown tokens: {percent(row.unknown, 2)}."] if row.unknown else [])


def coverage_notes(name: str, cut: VocabularyCut) -> list[str]:
    """Warnings that tasks have texts of another kind than those that the vocabulary was cut by."""
    return [
        f"{name}: the vocabulary has {percent(share)} of the tokens of the task {task}, of texts that were held out "
        f"{percent(cut.row.coverage)}: it was cut by texts of another language or kind"
        for task, share in cut.uncovered.items()
    ]
