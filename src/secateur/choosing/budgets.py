"""What a cut costs, which depths and vocabularies the limits allow, and budgets that are met over both.

The vocabulary is cut before the depth: the depth is chosen as without a limit of size, and then the largest vocabulary
with which it fits. Only where it does not fit with the smallest that is allowed, the depth is chosen among those that
do.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.choosing.selectors import Choice, layers_of, prefix
from secateur.document import percent, plural
from secateur.errors import ConfigError, DataError, ModelError, UnsupportedArchitecture
from secateur.options import Budget, ChooseOptions
from secateur.progress import Progress
from secateur.results import LayerCost, Profile, Scout, VocabularyRow

if TYPE_CHECKING:
    from secateur.vocabulary.choice import CountedVocabulary

_COSTS: dict[str, tuple[Callable[[LayerCost], float], str]] = {
    "max_params": (lambda row: row.parameters, "{:,.0f} parameters"),
    "max_bytes": (lambda row: row.bytes, "{:,.0f} bytes"),
    "max_latency_ms": (lambda row: 1000 * row.latency, "{:.3g} ms"),
}
"""Limit of a cost → what it limits, and how that is said."""
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


def cost_of(parts: Sequence[LayerCost], blocks: Sequence[int]) -> LayerCost:
    """What a model costs that keeps these layers, by index from 0: a row whose ``layer`` is their number."""
    kept = [parts[0], *(parts[index + 1] for index in blocks)]
    sums = {item.name: sum(getattr(row, item.name) for row in kept) for item in fields(LayerCost)}
    return LayerCost(**sums | {"layer": len(blocks)})


def cut_cost(table: Profile | Scout, blocks: Sequence[int]) -> CutCost:
    """The costs of the model cut to some of its layers, by index from 0."""
    if not table.layer_costs:
        return CutCost()
    own, full = (cost_of(table.layer_costs, kept) for kept in (blocks, prefix(table.depth)))
    told = {name: getattr(own, name) for name in ("parameters", "bytes", "flops_per_token", "latency")}
    return CutCost(**told, speed=full.seconds / own.seconds)


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
    if not left:
        smallest = cost_of(table.layer_costs, layers_at(table, depths[0]))
        costs = {key: _COSTS[key][0](smallest) for key in cost_limits(options)}
        key, limit = next((key, limit) for key, limit in cost_limits(options).items() if costs[key] > limit)
        words = _COSTS[key][1]
        hint = f"the smallest, depth {depths[0]}, has {words.format(costs[key])}"
        raise ConfigError(key, limit, f"no depth has at most {words.format(limit)}", hint)
    return left


def fits(options: Budget, table: Profile | Scout, blocks: Sequence[int]) -> bool:
    """Whether a model that keeps these layers is within all limits.

    Raises:
        DataError: The table does not tell costs.
    """
    limits = cost_limits(options)
    if limits and not table.layer_costs:
        why = next((note for note in table.notes if note.startswith("no costs")), "it was made by an earlier version")
        raise DataError(table.file, "has no costs of the layers", f"{why}; {table.kind} again", field="layer_costs")
    return not limits or all(_COSTS[key][0](cost_of(table.layer_costs, blocks)) <= limits[key] for key in limits)


# Vocabularies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies that a model could have: ``model`` as ``prune`` takes it, its tokens ``counted`` on texts."""

    model: str
    counted: CountedVocabulary

    @property
    def whole(self) -> int:
        """Number of all tokens."""
        return len(self.counted.order)

    def allowed(self, options: ChooseOptions) -> list[int]:
        """The sizes that a budget may take, the largest first: a size that is named, or all from a coverage on."""
        least = self.counted.size_of(options)
        larger = [] if options.vocab_size is not None else [size for size in self.counted.sizes() if size > least]
        return [*larger, least]

    def with_size(self, table: T, size: int) -> T:
        """The table of the same model with fewer tokens, as far as costs go."""
        return table if size == self.whole else without(table, self.counted.removed(size))


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


@dataclass(frozen=True)
class Decision:
    """Layers, and a number of tokens; None where the vocabulary is not asked about.

    ``wanted`` are the layers that would be kept without a limit of size, where no allowed vocabulary makes them fit.
    """

    choice: Choice
    size: int | None = None
    wanted: Choice | None = None


def decide(
    options: ChooseOptions,
    table: T,
    vocabularies: Vocabularies | None,
    rule: Callable[[ChooseOptions, T, T | None], Choice],
) -> Decision:
    """Choose a depth and a vocabulary: the vocabulary is cut before the depth.

    ``vocabularies`` are None where only the depth is asked about; ``rule`` chooses a depth by options, a table, and the
    same table with the costs of a smaller vocabulary.
    """
    if vocabularies is None:
        return Decision(rule(options, table, None))
    sizes = vocabularies.allowed(options)
    if not _limits_size(options):
        return Decision(rule(options, table, None), sizes[-1])

    def largest(choice: Choice) -> int | None:
        """The largest allowed vocabulary with which these layers fit; None where none does."""
        return next((n for n in sizes if fits(options, vocabularies.with_size(table, n), choice.blocks)), None)

    wanted = rule(options.model_copy(update=dict.fromkeys(SIZE_LIMITS)), table, None)
    if (size := largest(wanted)) is not None:
        return Decision(wanted, size)
    try:
        choice = rule(options, table, vocabularies.with_size(table, sizes[-1]))
    except ConfigError as error:
        if error.key not in SIZE_LIMITS:
            raise
        fewer = "; fewer are allowed with a smaller --vocab-coverage or --vocab-size"
        hint = f"{error.hint} with {sizes[-1]:,} tokens{'' if options.vocab_size else fewer}"
        raise ConfigError(error.key, error.value, error.problem.removeprefix(f"{error.key}: "), hint) from None
    return Decision(choice, largest(choice), wanted)


def _limits_size(options: ChooseOptions) -> bool:
    return any(getattr(options, name) is not None for name in SIZE_LIMITS)


@dataclass(frozen=True)
class VocabularyCost(VocabularyRow):
    """One size of the vocabulary at the chosen depth; ``parameters`` and ``bytes`` are those of the whole model.

    ``longer`` is the number of tokens per text relative to the whole vocabulary; ``fits``: the limits of costs allow
    it.
    """

    longer: float = 1.0
    fits: bool = True


@dataclass(frozen=True)
class VocabularyCosts:
    """Sizes of the vocabulary with so many ``layers``, the whole vocabulary first.

    ``size`` is the chosen one, ``reason`` says why, and what it costs; ``command`` makes the cut.
    """

    size: int
    layers: int
    reason: str
    command: str
    rows: tuple[VocabularyCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """The chosen size, why, the command that makes the cut, and all sizes."""
        told = {"vocab_size": self.size, "vocab_reason": self.reason, "command": self.command}
        return told | {"vocabularies": [asdict(row) for row in self.rows]}


def vocabulary_costs(
    options: ChooseOptions, table: Profile | Scout, vocabularies: Vocabularies | None, decision: Decision
) -> VocabularyCosts | None:
    """What every size costs at the chosen depth; None where the vocabulary is not asked about."""
    if vocabularies is None or decision.size is None:
        return None
    counted, whole, size = vocabularies.counted, vocabularies.whole, decision.size
    blocks, least = decision.choice.blocks, counted.size_of(options)
    rows = {}
    for tokens in sorted({*counted.sizes(), least, size}, reverse=True):
        row, costs = counted.row(tokens), vocabularies.with_size(table, tokens)
        cost = cut_cost(costs, blocks)
        rows[tokens] = VocabularyCost(
            **asdict(row) | {"parameters": cost.parameters, "bytes": cost.bytes},
            longer=row.tokens_per_text / max(1e-9, counted.tokens_per_text),
            fits=not table.layer_costs or fits(options, costs, blocks),
        )
    own, layers = rows[size], plural(len(blocks), "layer")
    reason = ""
    if decision.wanted is not None:
        reason = f"{plural(len(decision.wanted.blocks), 'layer')} do not fit even with {least:,} tokens, the fewest "
        reason += "that are allowed, so layers went, too. "
    if size == whole:
        reason += f"All {whole:,} tokens stay{f': {layers} fit with them' if _limits_size(options) else ''}."
    else:
        limited = _limits_size(options) and options.vocab_size is None
        why = f", the largest vocabulary with which {layers} fit" if limited else ""
        unknown = f"; {percent(own.unknown)} of their tokens become unknown" if own.unknown else ""
        reason += (
            f"{size:,} of {whole:,} tokens{why}: {percent(own.coverage)} of the tokens of held-out texts stay, "
            f"{percent(own.changed, 0)} of the texts change, and all have {own.longer:.2f} × the tokens{unknown}."
        )
    full = cut_cost(table, prefix(table.depth)).parameters
    if full and own.parameters:
        reason += f" {100 * own.parameters / full:.0f} % of the whole model's parameters."
    to = str(len(blocks)) if blocks == prefix(len(blocks)) else f"uniform:{len(blocks)}"
    words, out = ["secateur", "prune", vocabularies.model, "--to", to], f"{table.model}-{len(blocks)}"
    if size < whole:
        words += ["--vocab", *map(str, options.vocab), "--vocab-size", str(size)]
        columns = ",".join(f"{role}={column}" for role, column in (options.columns or {}).items())
        words, out = [*words, *(["--columns", columns] if columns else [])], f"{out}-{size}"
    return VocabularyCosts(size, len(blocks), reason, shlex.join([*words, "-o", out]), tuple(rows.values()))
