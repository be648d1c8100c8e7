"""Which depth to keep, and how many tokens, within limits of cost: by a scout's scores, or by a profile's losses.

The vocabulary is cut before the depth (:func:`decide`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from secateur.choosing.selectors import Choice, by_rule, is_prefix, layers_of, losses_of, lowest_in_each_half, prefix
from secateur.document import plural, signed, span
from secateur.errors import ConfigError, DataError, ModelError, UnsupportedArchitecture
from secateur.measures.intervals import Array
from secateur.options import Budget, ChooseOptions, PruneOptions, command_options, command_words
from secateur.progress import Progress
from secateur.results import Profile, RungRow, Scout, VocabularyRow

if TYPE_CHECKING:
    from secateur.vocabulary.choice import CountedVocabulary

TOLERANCE, BY_TEXTS = 1.0, 5.0
"""Points of average score, of 100, that may be lost where nothing else is said: on tasks and held-out pairs, and on
texts alone, where five points are about one on tasks (docs/explanation/defaults.md)."""
_COSTS: dict[str, tuple[str, int, Callable[[float], str]]] = {
    "max_params": ("parameters", 1, lambda limit: plural(limit, "parameter", ",.0f")),
    "max_bytes": ("bytes", 1, lambda limit: plural(limit, "byte", ",.0f")),
    "max_latency_ms": ("latency", 1000, lambda limit: f"{limit:.3g} ms"),
}
"""Limit → the column of costs that it limits, how many of its units are one of that column, and how that is said."""
SIZE_LIMITS = ("max_params", "max_bytes")
"""Limits that a smaller vocabulary helps to meet; a text takes no less time with it."""
T = TypeVar("T", bound=Profile | Scout)


# Costs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CutCost:
    """What a cut costs (:class:`.LayerCost`); None where the table does not tell.

    ``latency`` is seconds for one text of some 20 tokens, ``speed`` texts per second in a batch, relative to the full
    depth.
    """

    parameters: int | None = None
    bytes: int | None = None
    flops_per_token: float | None = None
    latency: float | None = None
    speed: float | None = None


def cut_cost(table: Profile | Scout, blocks: Sequence[int]) -> CutCost:
    """The costs of the model cut to some of its layers, by index from 0."""
    if not table.layer_costs:
        return CutCost()

    def total(column: str, kept: Sequence[int]) -> Any:
        return sum(getattr(table.layer_costs[part], column) for part in (0, *(index + 1 for index in kept)))

    told = {column: total(column, blocks) for column in ("parameters", "bytes", "flops_per_token", "latency")}
    return CutCost(**told, speed=total("seconds", range(table.depth)) / total("seconds", blocks))


def layers_at(table: Profile | Scout, depth: int) -> tuple[int, ...]:
    """The layers, by index from 0, that a depth of a profile or a scout has."""
    return layers_of(table.layers if isinstance(table, Scout) else "first", depth, table.depth)


def cost_limits(options: Budget) -> dict[str, float]:
    """The limits of costs that are given."""
    return {name: limit for name in _COSTS if (limit := getattr(options, name)) is not None}


def affordable(options: Budget, table: Profile | Scout, depths: Sequence[int]) -> list[int]:
    """Those of the depths (ascending) that are within all limits.

    Raises:
        ConfigError: None is; the message tells what the smallest costs.
        DataError: The table does not tell costs.
    """
    left = [depth for depth in depths if fits(options, table, layers_at(table, depth))]
    for name, limit in cost_limits(options).items() if not left else ():
        if (least := _cost(name, table, layers_at(table, depths[0]))) > limit:
            words = _COSTS[name][2]
            hint = f"the smallest, depth {depths[0]}, has {words(least)}"
            raise ConfigError(name, limit, f"no depth has at most {words(limit)}", hint)
    return left


def fits(options: Budget, table: Profile | Scout, blocks: Sequence[int]) -> bool:
    """Whether a model that keeps these layers is within all limits; DataError if the table does not tell costs."""
    limits = cost_limits(options)
    if limits and not table.layer_costs:
        why = next((note for note in table.notes if note.startswith("no costs")), "it was made by an earlier version")
        raise DataError(table.file, "has no costs of the layers", f"{why}; {table.kind} again", field="layer_costs")
    return all(_cost(name, table, blocks) <= limit for name, limit in limits.items())


def _cost(limit: str, table: Profile | Scout, blocks: Sequence[int]) -> float:
    """What a limit is about, in its unit."""
    column, units, _ = _COSTS[limit]
    return float(units * getattr(cut_cost(table, blocks), column))


# Depths ---------------------------------------------------------------------------------------------------------------


def tolerance_of(budget: Budget, judge: str) -> float:
    """Points that may be lost: as asked for, or by what a scout's scores are of (:attr:`.Scout.judge`)."""
    if budget.tolerance is not None:
        return budget.tolerance
    return BY_TEXTS if judge == "texts" else TOLERANCE


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
        tolerance = tolerance_of(options, scout.judge)
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

    trained = [row for row in reversed(rungs[:-1]) if row.trained]
    passed = [rungs[-1], *takewhile(passes, trained)]
    ended_at = next((row.depth for row in trained if not passes(row)), 0)
    others = [row for row in reversed(rungs) if not row.trained and ended_at < row.depth < passed[-1].depth]
    return [*passed, *takewhile(passes, others)][-1]


def choose_depth(options: ChooseOptions, table: Profile, costs: Profile | None = None) -> Choice:
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


# Vocabularies ---------------------------------------------------------------------------------------------------------


def with_size(table: T, counted: CountedVocabulary, size: int) -> T:
    """The table of the same model with fewer tokens, as far as costs go."""
    return table if size == len(counted.order) else without_parameters(table, counted.removed(size))


def without_parameters(table: T, removed: tuple[int, int]) -> T:
    """The table of a model without some parameters (:attr:`.VocabularyCut.removed`), as far as costs go."""
    if not any(removed) or not table.layer_costs:
        return table
    outside, inside = removed
    first = table.layer_costs[0]
    # Of the number format in which the table counts bytes: what is outside the layers is tables, for the most part.
    itemsize = round(first.bytes / first.parameters)
    less = [outside, *[inside // table.depth] * table.depth]
    costs = [
        replace(cost, parameters=cost.parameters - own, bytes=cost.bytes - own * itemsize)
        for cost, own in zip(table.layer_costs, less, strict=True)
    ]
    return replace(table, layer_costs=tuple(costs))


def open_vocabulary(options: ChooseOptions, table: Profile | Scout, progress: Progress) -> CountedVocabulary | None:
    """Open the tokenizer of a table's model, and count its tokens on the texts of ``--vocab``; None without it."""
    if not options.vocab:
        if options.model is not None:
            raise ConfigError("model", options.model, "is only opened to count tokens", "give --vocab FILE, too")
        return None
    from secateur.models.blocks import depth_of  # with torch, which the rest of a choice does not need
    from secateur.models.open_model import open_skeleton
    from secateur.vocabulary.choice import count_vocabulary

    name = options.model or (table.source if isinstance(table, Profile) else "") or table.model
    if isinstance(table, Scout) and options.model is None and isinstance(options.profile, (str, Path)):
        place = Path(options.profile)
        trained = (place if place.is_dir() else place.parent) / "model"
        name = str(trained) if trained.is_dir() else name
    hint = f"name the model of the {table.kind}: --model MODEL"
    try:
        transformer, tokenizer, prompts = open_skeleton(name)
    except ModelError as error:
        if options.model is not None or isinstance(error, UnsupportedArchitecture):
            raise
        raise ConfigError("model", name, f"{name} cannot be opened any more", hint) from error
    if (depth := depth_of(transformer)) != table.depth:
        problem = f"{name} has {depth} layers, but the {table.kind} is of a model of {table.depth}"
        raise ConfigError("model", name, problem, hint)
    return count_vocabulary(name, tokenizer, transformer, options, prompts=prompts, progress=progress)


def decide(
    options: ChooseOptions, table: Profile | Scout, counted: CountedVocabulary | None
) -> tuple[Choice, int | None]:
    """Choose a depth and the number of tokens: the vocabulary is cut before the depth.

    The depth is chosen as without a limit of size, and then the largest vocabulary with which it fits. Only where it
    does not fit with the smallest that is allowed, the depth is chosen among those that do. ``counted`` is None where
    only the depth is asked about.
    """
    rule: Any = choose_rung if isinstance(table, Scout) else choose_depth
    if counted is None:
        return rule(options, table), None
    sizes = counted.allowed(options)
    if not _limits_size(options):
        return rule(options, table), sizes[-1]

    def largest(choice: Choice) -> int | None:
        """The largest allowed vocabulary with which these layers fit; None where none does."""
        return next((n for n in sizes if fits(options, with_size(table, counted, n), choice.blocks)), None)

    choice = rule(options.model_copy(update=dict.fromkeys(SIZE_LIMITS)), table)
    if largest(choice) is None:
        try:
            choice = rule(options, table, with_size(table, counted, sizes[-1]))
        except ConfigError as error:
            hint = f"{error.hint} with {sizes[-1]:,} tokens, the fewest that are allowed"
            raise ConfigError(error.key, error.value, error.problem.removeprefix(f"{error.key}: "), hint) from None
    return choice, largest(choice)


def _limits_size(options: ChooseOptions) -> bool:
    return any(getattr(options, name) is not None for name in SIZE_LIMITS)


@dataclass(frozen=True)
class VocabularyCosts:
    """Sizes of the vocabulary with so many ``layers``, the whole vocabulary first; costs are the whole model's.

    ``size`` is the chosen one, ``reason`` says why; ``command`` makes the cut.
    """

    size: int
    layers: int
    reason: str
    command: str
    rows: tuple[VocabularyRow, ...]


def vocabulary_costs(
    options: ChooseOptions, table: Profile | Scout, counted: CountedVocabulary, choice: Choice, size: int
) -> VocabularyCosts:
    """What every size costs at the chosen depth."""
    blocks, whole = choice.blocks, len(counted.order)
    rows = {}
    for tokens in sorted({*counted.sizes(), counted.size_of(options), size}, reverse=True):
        cost = cut_cost(with_size(table, counted, tokens), blocks)
        rows[tokens] = replace(counted.row(tokens), parameters=cost.parameters, bytes=cost.bytes)
    limited = _limits_size(options) and options.vocab_size is None
    fit = f", the largest of these sizes with which {plural(len(blocks), 'layer')} fit" if limited else ""
    reason = f"{size:,} of {whole:,} tokens stay{fit}."
    to = str(len(blocks)) if is_prefix(blocks) else f"uniform:{len(blocks)}"
    cut: dict[str, Any] = {"model": counted.model, "to": to, "out": f"{table.model}-{len(blocks)}"}
    if size < whole:
        cut |= {"vocab": options.vocab, "vocab_size": size, "columns": options.columns, "out": f"{cut['out']}-{size}"}
    command = shlex.join(command_words("prune", command_options(PruneOptions, cut)))
    return VocabularyCosts(size, len(blocks), reason, command, tuple(rows.values()))
