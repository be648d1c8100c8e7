"""Which depth to keep, within limits: by a scout's scores, by a rule that holds its level; or by a profile's losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.choosing.budgets import affordable, cost_limits, cut_cost, layers_at
from secateur.choosing.selectors import Choice, by_rule, losses_of, lowest_in_each_half, prefix
from secateur.document import plural, signed, span
from secateur.errors import ConfigError, DataError
from secateur.measures.intervals import Array
from secateur.options import Budget, ChooseOptions
from secateur.results import Profile, RungRow, Scout

TOLERANCE = 1.0
"""Points of average score, of 100, that may be lost where nothing else is said."""


def choose_rung(options: Budget, scout: Scout, costs: Scout | None = None) -> Choice:
    """Choose a depth of those that a scout scored and the limits of costs allow.

    With ``best`` the highest mean score, of equal ones the shallowest; else the smallest depth that loses no more than
    the tolerance (:func:`smallest_within`). Where that one is too expensive, so are the deeper ones that lose no more;
    then it is the highest score, with a warning. ``costs`` is the same scout with the costs of a smaller vocabulary,
    where the limits are about these. The choice's ``reason`` is a whole sentence.
    """
    rungs = [row for row in scout.depths if row.score is not None and math.isfinite(row.score)]
    if not rungs or rungs[-1].depth != scout.depth:
        raise DataError(scout.file, f"has no score at depth {scout.depth}, the full one", "scout again", field="depths")
    fitting = affordable(options, costs or scout, [row.depth for row in rungs])
    row = max((row for row in rungs if row.depth in fitting), key=lambda row: (row.score, -row.depth))
    why = "the highest score of those that fit" if cost_limits(options) else f"the highest of {len(rungs)} scores"
    warning = ""
    if not options.best:
        tolerance = TOLERANCE if options.tolerance is None else options.tolerance
        within = smallest_within(scout.depths, tolerance)
        points = f"at most {plural(tolerance, 'point', 'g')} at 95 % confidence"
        if within.depth in fitting:
            row, why = within, f"the fewest that lose {points}"
        else:
            why += f" (to lose {points} takes {plural(within.depth, 'layer')})"
            warning = "more may be lost than the tolerance"
    return Choice(layers_at(scout, row.depth), _sentence(scout, row, why), warning)


def smallest_within(rungs: Sequence[RungRow], tolerance: float) -> RungRow:
    """The smallest depth that loses at most the tolerance, in points, against the full depth; else the full depth.

    Fixed-sequence non-inferiority: from the deepest trained depth below the full one down, as long as the lower end of
    the difference's 95 % interval allows no larger loss; the first that may lose more, or has no interval, ends it.
    That some depth passes which really loses more has a chance of at most 2.5 %, however many there are.

    Depths that were asked for without being trained are looked at afterwards, from the last one that passed down to
    the next trained one: to ask for more scores must not end the sequence of the trained ones earlier. That costs at
    most another 2.5 %.
    """

    def passes(row: RungRow) -> bool:
        return row.difference_low is not None and row.difference_low >= -tolerance / 100

    last, below = rungs[-1], 0
    for row in reversed([row for row in rungs[:-1] if row.trained]):
        if not passes(row):
            below = row.depth
            break
        last = row
    for row in reversed([row for row in rungs if not row.trained and below < row.depth < last.depth]):
        if not passes(row):
            break
        last = row
    return last


def within(options: ChooseOptions, table: Profile, costs: Profile | None = None) -> Choice:
    """Choose a depth that the limits allow; ``costs`` is the same profile with those of a smaller vocabulary.

    With a limit of the loss the shallowest such depth. Without one, what L3Prune's rule would call ``large`` if the
    model had no more layers than fit the budget: the lowest loss of the deeper half of them; with a profile of texts
    alone, which has no losses, the deepest of them.
    """
    deepest = affordable(options, costs or table, range(1, table.depth + 1))[-1]
    fitting = f"depth {deepest} is the deepest that fits" + (" with the fewest tokens" if costs else "")
    increase = options.max_loss_increase
    if increase is None and any(row.loss is None for row in table.depths):
        return Choice(prefix(deepest), fitting)
    losses = losses_of(table)
    if increase is None:
        depth, chance = by_rule(table, lambda losses: lowest_in_each_half(losses[..., :deepest])[..., -1])
        told = f"{fitting}; loss {losses[depth - 1]:.4f}, the lowest of depths {deepest // 2 + 1} to {deepest}"
        return Choice(prefix(depth), told, selection_probability=chance)

    def shallowest(losses: Array) -> NDArray[Any]:
        """The first depth whose loss is near enough to the lowest of all; 0 where there is none."""
        near = losses[..., :deepest] <= (1 + increase) * losses.min(axis=-1, keepdims=True)
        return np.where(near.any(axis=-1), near.argmax(axis=-1) + 1, 0)

    depth, chance = by_rule(table, shallowest)
    above = losses / losses.min() - 1
    if not depth:
        best = int(above[:deepest].argmin())
        problem = f"no depth that fits (up to {deepest}) has a loss within {increase:g} of the lowest"
        raise ConfigError("max_loss_increase", increase, problem, f"{above[best]:.4g} allows depth {best + 1}")
    told = f"the shallowest; loss {losses[depth - 1]:.4f}, {100 * above[depth - 1]:.1f} % above the lowest of all"
    return Choice(prefix(depth), told, selection_probability=chance)


def _sentence(scout: Scout, row: RungRow, why: str) -> str:
    """What is recommended and why, what it and the next smaller depth lose, and what the cut costs."""
    depth, cut = scout.depth, row.depth < scout.depth
    smaller = next((other for other in reversed(scout.depths) if other.depth < row.depth), None)
    name = f"{row.depth} of {plural(depth, 'layer')}" if cut else f"All {plural(depth, 'layer')}"
    own = f"{_difference(row)} against all {depth} in the same training; " if cut else ""
    less = f"with {plural(smaller.depth, 'layer')} {_difference(smaller)}" if smaller else "no smaller depth was scored"
    cost, full = (cut_cost(scout, layers_at(scout, count)) for count in (row.depth, depth))
    costs = ""
    if cut and cost.parameters and full.parameters:
        costs = f" {100 * cost.parameters / full.parameters:.0f} % of the parameters, {cost.speed:.1f} × the speed."
    return f"{name}, {why}: {own}{less}.{costs}"


def _difference(row: RungRow) -> str:
    if row.difference is None:
        return "no score"
    ends = span(row.difference_low, row.difference_high, signed)
    return f"{signed(row.difference)} points ({f'95 % interval {ends}' if ends else 'no interval'})"
