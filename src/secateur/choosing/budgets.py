"""What a cut costs, which depths and vocabularies the limits allow, and budgets that are met over both.

The vocabulary is cut before the depth (:func:`decide`).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.choosing.selectors import Choice, layers_of, prefix
from secateur.document import plural
from secateur.errors import ConfigError, DataError, ModelError, UnsupportedArchitecture
from secateur.options import Budget, ChooseOptions
from secateur.progress import Progress
from secateur.results import Profile, Scout, VocabularyRow

if TYPE_CHECKING:
    from secateur.vocabulary.choice import CountedVocabulary

_COSTS: dict[str, tuple[str, int, Callable[[float], str]]] = {
    "max_params": ("parameters", 1, lambda limit: plural(limit, "parameter", ",.0f")),
    "max_bytes": ("bytes", 1, lambda limit: plural(limit, "byte", ",.0f")),
    "max_latency_ms": ("latency", 1000, lambda limit: f"{limit:.3g} ms"),
}
"""Limit → the column of costs that it limits, how many of its units are one of that column, and how that is said."""
SIZE_LIMITS = ("max_params", "max_bytes")
"""Limits that a smaller vocabulary helps to meet; a text takes no less time with it."""
T = TypeVar("T", bound=Profile | Scout)


# Depths ---------------------------------------------------------------------------------------------------------------


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


# Vocabularies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies that a model could have: ``model`` as ``prune`` takes it, its tokens ``counted`` on texts."""

    model: str
    counted: CountedVocabulary

    def allowed(self, options: ChooseOptions) -> list[int]:
        """The sizes that a budget may take, the largest first: a size that is named, or all from a coverage on."""
        least = self.counted.size_of(options)
        larger = [] if options.vocab_size is not None else [size for size in self.counted.sizes() if size > least]
        return [*larger, least]

    def with_size(self, table: T, size: int) -> T:
        """The table of the same model with fewer tokens, as far as costs go."""
        return table if size == len(self.counted.order) else without(table, self.counted.removed(size))


def without(table: T, removed: tuple[int, int]) -> T:
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


def open_vocabularies(options: ChooseOptions, table: Profile | Scout, progress: Progress) -> Vocabularies | None:
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
    counted = count_vocabulary(name, tokenizer, transformer, options, prompts=prompts, progress=progress)
    return Vocabularies(name, counted)


def decide(
    options: ChooseOptions, table: Profile | Scout, vocabularies: Vocabularies | None, rule: Callable[..., Choice]
) -> tuple[Choice, int | None]:
    """Choose a depth and the number of tokens: the vocabulary is cut before the depth.

    The depth is chosen as without a limit of size, and then the largest vocabulary with which it fits. Only where it
    does not fit with the smallest that is allowed, the depth is chosen among those that do. ``vocabularies`` are None
    where only the depth is asked about; ``rule`` chooses a depth by options, a table, and the same table with the costs
    of a smaller vocabulary.
    """
    if vocabularies is None:
        return rule(options, table), None
    sizes = vocabularies.allowed(options)
    if not _limits_size(options):
        return rule(options, table), sizes[-1]

    def largest(choice: Choice) -> int | None:
        """The largest allowed vocabulary with which these layers fit; None where none does."""
        return next((n for n in sizes if fits(options, vocabularies.with_size(table, n), choice.blocks)), None)

    choice = rule(options.model_copy(update=dict.fromkeys(SIZE_LIMITS)), table)
    if largest(choice) is None:
        try:
            choice = rule(options, table, vocabularies.with_size(table, sizes[-1]))
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
    options: ChooseOptions, table: Profile | Scout, vocabularies: Vocabularies, choice: Choice, size: int
) -> VocabularyCosts:
    """What every size costs at the chosen depth."""
    counted, blocks = vocabularies.counted, choice.blocks
    whole = len(counted.order)
    rows = {}
    for tokens in sorted({*counted.sizes(), counted.size_of(options), size}, reverse=True):
        cost = cut_cost(vocabularies.with_size(table, tokens), blocks)
        rows[tokens] = replace(counted.row(tokens), parameters=cost.parameters, bytes=cost.bytes)
    limited = _limits_size(options) and options.vocab_size is None
    fit = f", the largest of these sizes with which {plural(len(blocks), 'layer')} fit" if limited else ""
    reason = f"{size:,} of {whole:,} tokens stay{fit}."
    to = str(len(blocks)) if blocks == prefix(len(blocks)) else f"uniform:{len(blocks)}"
    words, out = ["secateur", "prune", vocabularies.model, "--to", to], f"{table.model}-{len(blocks)}"
    if size < whole:
        columns = ",".join(f"{role}={column}" for role, column in (options.columns or {}).items())
        words += ["--vocab", *map(str, options.vocab), "--vocab-size", str(size)]
        words, out = [*words, *(["--columns", columns] if columns else [])], f"{out}-{size}"
    command = shlex.join([*words, "-o", out])
    return VocabularyCosts(size, len(blocks), reason, command, tuple(rows.values()))
