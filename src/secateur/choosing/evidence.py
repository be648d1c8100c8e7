"""Which depth to keep by a scout's scores: a rule that holds its level, and a sentence that says why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.choosing.budgets import (
    CutCost,
    Vocabularies,
    VocabularyCosts,
    affordable,
    cost_limits,
    cut_cost,
    decide,
    layers_at,
    vocabulary_costs,
)
from secateur.choosing.selectors import Choice
from secateur.document import plural, signed, span
from secateur.errors import ConfigError, DataError
from secateur.options import Budget, ChooseOptions
from secateur.results import RungRow, Scout

TOLERANCE = 1.0
"""Points of average score, of 100, that may be lost where nothing else is said."""
MAY_BE = "up to {} points may be lost"


def choose_rung(options: Budget, scout: Scout, costs: Scout | None = None) -> Choice:
    """Choose a depth of those that a scout scored and the limits of costs allow.

    With ``best`` the highest mean score, of equal ones the shallowest; else the smallest depth that loses no more than
    the tolerance (:func:`smallest_within`). Where that one is too expensive, so are the deeper ones that lose no more;
    then it is the highest score, with a warning.

    ``costs`` is the same scout with the costs of a smaller vocabulary, where the limits are about these.

    Returns:
        The layers of that depth; ``reason`` is a whole sentence.
    """
    if isinstance(options, ChooseOptions) and options.max_loss_increase is not None:
        problem = "applies to a profile's loss, and this is a scout"
        raise ConfigError("max_loss_increase", options.max_loss_increase, problem, "give --tolerance")
    rungs = scored(scout)
    fitting = affordable(options, costs or scout, [row.depth for row in rungs])
    highest = max((row for row in rungs if row.depth in fitting), key=lambda row: (row.score, -row.depth))
    title = "the highest score of those that fit" if cost_limits(options) else f"the highest of {len(rungs)} scores"
    if options.best:
        return Choice(layers_at(scout, highest.depth), _sentence(scout, highest, title, None))
    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    found = smallest_within(scout.depths, tolerance)
    if found.depth in fitting:
        return Choice(layers_at(scout, found.depth), _sentence(scout, found, "", tolerance))
    reason = _sentence(scout, highest, title, tolerance, found)
    return Choice(layers_at(scout, highest.depth), reason, "more may be lost than the tolerance")


def scored(scout: Scout) -> list[RungRow]:
    """The depths whose score is a number, ascending; the full depth is the last (DataError if it has none)."""
    rungs = [row for row in scout.depths if row.score is not None and math.isfinite(row.score)]
    if not rungs or rungs[-1].depth != scout.depth:
        raise DataError(scout.file, f"has no score at depth {scout.depth}, the full one", "scout again", field="depths")
    return rungs


def smallest_within(rungs: Sequence[RungRow], tolerance: float) -> RungRow:
    """The smallest depth that loses at most the tolerance, in points, against the full depth; else the full depth.

    Fixed-sequence non-inferiority: from the deepest trained depth below the full one down, as long as the lower end of
    the difference's 95 % interval allows no larger loss; the first that may lose more, or has no interval, ends it.
    That some depth passes which really loses more has a chance of at most 2.5 %, however many there are.

    Depths that were asked for without being trained are looked at afterwards, from the last one that passed down to
    the next trained one: to ask for more scores must not end the sequence of the trained ones earlier. That costs at
    most another 2.5 %.
    """
    last, below = rungs[-1], 0
    for row in reversed([row for row in rungs[:-1] if row.trained]):
        if not _is_within(row, tolerance):
            below = row.depth
            break
        last = row
    for row in reversed([row for row in rungs if not row.trained and below < row.depth < last.depth]):
        if not _is_within(row, tolerance):
            break
        last = row
    return last


def _is_within(row: RungRow, tolerance: float) -> bool:
    return row.difference_low is not None and row.difference_low >= -tolerance / 100


# What is said ---------------------------------------------------------------------------------------------------------


def _sentence(scout: Scout, row: RungRow, title: str, tolerance: float | None, wanted: RungRow | None = None) -> str:
    """What is recommended and why, what the next smaller depth would lose, and what the cut costs.

    ``title`` is what the depth is chosen for, where not for the tolerance; ``wanted`` the smallest depth within the
    tolerance, where it is too expensive.
    """
    depth = scout.depth
    smaller = next((other for other in reversed(scout.depths) if other.depth < row.depth), None)
    whole = row.depth == depth
    name = f"All {plural(depth, 'layer')}" if whole else f"{row.depth} of {plural(depth, 'layer')}"
    head = f"{name}, {title}" if title else name
    parts = []
    if tolerance is None and not whole:
        # Nothing is promised of the highest score: the interval flatters what was chosen by its score.
        parts.append(_difference(row, f" to all {depth} in the same training"))
    elif not whole:
        loss = _loss(row, tolerance, MAY_BE if wanted else "at most {} points are lost")
        parts.append(f"{loss} against all {depth} in the same training ({_difference(row)})")
    if wanted is not None:
        if _is_within(row, tolerance or 0):  # by itself, but the sequence had ended before
            parts[-1] += f", but a deeper one may lose more than the tolerance of {tolerance:g}"
        elif row.difference_low is not None:
            parts[-1] += f", more than the tolerance of {tolerance:g}"
        parts.append(f"staying within the tolerance takes {'all' if wanted.depth == depth else wanted.depth} layers")
    elif smaller is None:
        parts.append("no smaller depth was scored")
    elif tolerance is not None and smaller.difference_low is None:
        parts.append(f"with {plural(smaller.depth, 'layer')} there is no interval, so the search ended there")
    else:
        own = f" ({_difference(smaller)})" if whole else ""
        limit = f", and {tolerance:g} may be" if whole and tolerance is not None else ""
        may = _loss(smaller, tolerance, MAY_BE)
        parts.append(f"with {plural(smaller.depth, 'layer')} {may}{own}{limit}")
    cost, full = (cut_cost(scout, layers_at(scout, count)) for count in (row.depth, depth))
    costs = ""
    if not whole and cost.parameters and full.parameters:
        costs = f" {100 * cost.parameters / full.parameters:.0f} % of the parameters, {cost.speed:.1f} × the speed."
    return f"{head}: {'; '.join(parts)}.{costs}"


def _loss(row: RungRow, tolerance: float | None, words: str) -> str:
    """The most that is lost, at 95 % confidence."""
    if row.difference_low is None:
        return "how much is lost is not known"
    lost = -100 * row.difference_low
    # So many digits that one sees on which side of the tolerance it is.
    limit = 0.0 if tolerance is None else tolerance
    digits = next((digits for digits in (1, 2, 3) if (round(lost, digits) > limit) == (lost > limit)), 4)
    if not round(lost, digits):
        return "nothing is lost"
    return words.format(f"{lost:.{digits}f}") if lost > 0 else f"at least {-lost:.{digits}f} points are gained"


def _difference(row: RungRow, to: str = "") -> str:
    ends = span(row.difference_low, row.difference_high, signed)
    return f"difference {signed(row.difference)}{to}, {f'95 % interval {ends}' if ends else 'without an interval'}"


# Side by side ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung(CutCost, RungRow):
    """One depth of a scout with what it costs.

    ``fits``: the limits of costs allow it; ``chosen_by`` are the rules that choose it: ``tolerance``, ``best``.
    """

    fits: bool = True
    chosen_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rungs:
    """All depths that a scout of ``model`` scored, as :class:`Rung`; ``chosen`` is one of them, ``reason`` says why.

    ``vocabulary`` has the sizes of the vocabulary at that depth; None where they were not asked for.
    """

    model: str
    depth: int
    judge: str
    tasks: int
    chosen: int
    reason: str
    rows: tuple[Rung, ...]
    vocabulary: VocabularyCosts | None = None

    def to_dict(self) -> dict[str, Any]:
        """The chosen depth, why, and all that were scored; and the vocabulary, where it was asked for."""
        told = {"chosen": self.chosen, "reason": self.reason, "rungs": [asdict(row) for row in self.rows]}
        return told | (self.vocabulary.to_dict() if self.vocabulary else {})


def side_by_side(options: ChooseOptions, scout: Scout, vocabularies: Vocabularies | None = None) -> Rungs:
    """Every depth, and which rule chooses which; arguments and errors as for :func:`choose_rung`."""
    rules = {}
    for name in ("tolerance", "best"):
        rules[name] = decide(options.model_copy(update={"best": name == "best"}), scout, vocabularies, choose_rung)
    decision = rules["best" if options.best else "tolerance"]
    chosen = {name: len(own.choice.blocks) for name, own in rules.items() if not own.choice.warning}
    smallest = scout if vocabularies is None else vocabularies.with_size(scout, vocabularies.allowed(options)[-1])
    fitting = affordable(options, smallest, [row.depth for row in scout.depths])
    rows = [
        Rung(
            **vars(row),
            fits=row.depth in fitting,
            chosen_by=tuple(name for name, depth in chosen.items() if depth == row.depth),
            **vars(cut_cost(scout, layers_at(scout, row.depth))),
        )
        for row in scout.depths
    ]
    return Rungs(
        model=scout.model,
        depth=scout.depth,
        judge=scout.judge,
        tasks=len({row.task for row in scout.task_scores}),
        chosen=len(decision.choice.blocks),
        reason=decision.choice.reason,
        rows=tuple(rows),
        vocabulary=vocabulary_costs(options, scout, vocabularies, decision),
    )
