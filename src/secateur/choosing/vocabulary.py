"""Sizes of the vocabulary beside depths, and budgets that are met over both.

The vocabulary is cut before the depth: the depth is chosen as without a limit of size, and then the largest vocabulary
with which it fits. Only where it does not fit with the smallest that is allowed, the depth is chosen among those that
do.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.choosing.budgets import check_costs, cut_cost, fits
from secateur.choosing.selectors import Choice, prefix
from secateur.document import percent, plural
from secateur.errors import ConfigError, ModelError, UnsupportedArchitecture
from secateur.options import ChooseOptions
from secateur.progress import Progress
from secateur.results import Profile, Scout, VocabularyRow

if TYPE_CHECKING:
    from secateur.vocabulary.choice import CountedVocabulary

SIZE_LIMITS = ("max_params", "max_bytes")
"""Limits that a smaller vocabulary helps to meet; a text takes no less time with it."""
T = TypeVar("T", bound=Profile | Scout)


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies that the model of a profile or a scout could have.

    Attributes:
        model: What to cut, as ``prune`` takes it.
        counted: Its tokens, by the user's texts.
    """

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
        if size == self.whole or not table.layer_costs:
            return table
        tables, first = self.counted.tables, table.layer_costs[0]
        gone = [own.width * own.rows - left for own, left in zip(tables, self.counted.parameters(size), strict=True)]
        outside = sum(numbers for own, numbers in zip(tables, gone, strict=True) if not own.packed)
        in_each_layer = (sum(gone) - outside) // table.depth
        # Of the number format in which the table counts bytes: what is outside the layers is tables, for the most part.
        itemsize = round(first.bytes / first.parameters)
        less = [outside, *[in_each_layer] * table.depth]
        costs = [
            replace(cost, parameters=cost.parameters - own, bytes=cost.bytes - own * itemsize)
            for cost, own in zip(table.layer_costs, less, strict=True)
        ]
        return replace(table, layer_costs=tuple(costs))


def open_vocabularies(options: ChooseOptions, table: Profile | Scout, progress: Progress) -> Vocabularies | None:
    """Open the tokenizer of a table's model, and count its tokens on the texts of ``--vocab``; None without it.

    Raises:
        ConfigError: The model is not found and not named, or another one; as :func:`.count_vocabulary`.
        ModelError, DataError: As :func:`.open_skeleton` and :func:`.count_vocabulary`.
    """
    if not options.vocab:
        return None
    from secateur.models.blocks import depth_of  # with torch, which the rest of a choice does not need
    from secateur.models.open_model import open_skeleton
    from secateur.vocabulary.choice import count_vocabulary

    name = options.model or _model_of(options, table)
    try:
        opened = open_skeleton(name)
    except UnsupportedArchitecture:
        raise
    except ModelError as error:
        if options.model is not None:
            raise
        problem = f"{name}, of which the {table.kind} is, cannot be opened any more"
        raise ConfigError("model", name, problem, "name it: --model MODEL") from error
    if (depth := depth_of(opened.transformer)) != table.depth:
        problem = f"{name} has {depth} layers, but the {table.kind} is of a model of {table.depth}"
        raise ConfigError("model", name, problem, f"name the model of the {table.kind}: --model MODEL")
    prompts = opened.prompts.values()
    counted = count_vocabulary(name, opened.tokenizer, opened.transformer, options, prompts=prompts, progress=progress)
    return Vocabularies(name, counted)


def _model_of(options: ChooseOptions, table: Profile | Scout) -> str:
    """What is to be cut: the model that a scout trained, or the one that was profiled."""
    if isinstance(table, Profile):
        return table.source or table.model
    if isinstance(options.profile, (str, Path)):
        place = Path(options.profile)
        trained = (place if place.is_dir() else place.parent) / "model"
        if trained.is_dir():
            return str(trained)
    return table.model


@dataclass(frozen=True)
class Decision:
    """A depth and a size of the vocabulary.

    Attributes:
        choice: The layers.
        size: Number of tokens; None where the vocabulary is not asked about.
        wanted: The layers that would be kept without a limit of size, where no allowed vocabulary makes them fit.
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

    Args:
        options: The limits, and the smallest vocabulary that is allowed.
        table: A profile or a scout.
        vocabularies: Of its model; None where only the depth is asked about.
        rule: Chooses a depth by options, a table, and another table that tells costs.

    Raises:
        ConfigError: Nothing is within the limits.
        DataError: The table does not tell costs.
    """
    if vocabularies is None:
        return Decision(rule(options, table, None))
    least = vocabularies.counted.size_of(options)
    if not _limits_size(options):
        return Decision(rule(options, table, None), least)
    check_costs(table)
    wanted = rule(options.model_copy(update=dict.fromkeys(SIZE_LIMITS)), table, None)
    if (size := _largest(options, table, vocabularies, wanted)) is not None:
        return Decision(wanted, size)
    try:
        choice = rule(options, table, vocabularies.with_size(table, least))
    except ConfigError as error:
        if error.key not in SIZE_LIMITS:
            raise
        hint = f"{error.hint} with {least:,} tokens" + (
            "" if options.vocab_size else "; fewer are allowed with a smaller --vocab-coverage or --vocab-size"
        )
        raise ConfigError(error.key, error.value, error.problem.removeprefix(f"{error.key}: "), hint) from None
    return Decision(choice, _largest(options, table, vocabularies, choice), wanted)


def _limits_size(options: ChooseOptions) -> bool:
    return any(getattr(options, name) is not None for name in SIZE_LIMITS)


def _largest(options: ChooseOptions, table: T, vocabularies: Vocabularies, choice: Choice) -> int | None:
    """The largest allowed vocabulary with which these layers fit; None where none does."""
    sizes = vocabularies.allowed(options)
    return next((size for size in sizes if fits(options, vocabularies.with_size(table, size), choice.blocks)), None)


# Side by side ---------------------------------------------------------------------------------------------------------


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
    """Sizes of the vocabulary, the largest first.

    Attributes:
        size: The chosen one.
        layers: Number of layers at which the costs are.
        reason: Why, and what it costs, in a sentence.
        command: Makes the cut.
        rows: The whole vocabulary is the first.
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
    options: ChooseOptions, table: Profile | Scout, vocabularies: Vocabularies, decision: Decision
) -> VocabularyCosts:
    """What every size costs at the chosen depth."""
    size, blocks = decision.size or vocabularies.whole, decision.choice.blocks
    sizes = sorted({*vocabularies.counted.sizes(), vocabularies.counted.size_of(options), size}, reverse=True)
    rows = tuple(_row(options, table, vocabularies, blocks, own) for own in sizes)
    reason = _sentence(options, table, vocabularies, decision, rows[sizes.index(size)])
    return VocabularyCosts(size, len(blocks), reason, _command(options, table, vocabularies, len(blocks), size), rows)


def _row(
    options: ChooseOptions, table: Profile | Scout, vocabularies: Vocabularies, blocks: Sequence[int], size: int
) -> VocabularyCost:
    row = vocabularies.counted.row(size)
    costs: Profile | Scout = vocabularies.with_size(table, size)
    cost = cut_cost(costs, blocks)
    return VocabularyCost(
        **asdict(row) | {"parameters": cost.parameters, "bytes": cost.bytes},
        longer=row.tokens_per_text / max(1e-9, vocabularies.counted.tokens_per_text),
        fits=not table.layer_costs or fits(options, costs, blocks),
    )


def _sentence(
    options: ChooseOptions,
    table: Profile | Scout,
    vocabularies: Vocabularies,
    decision: Decision,
    row: VocabularyCost,
) -> str:
    """How many tokens stay and why, and what that does to texts and to the size of the model."""
    whole, layers = vocabularies.whole, plural(len(decision.choice.blocks), "layer")
    before = ""
    if decision.wanted is not None:
        least = vocabularies.counted.size_of(options)
        before = f"{plural(len(decision.wanted.blocks), 'layer')} do not fit even with {least:,} tokens, the fewest "
        before += "that are allowed, so layers went, too. "
    full = cut_cost(table, prefix(table.depth)).parameters
    share = f" {100 * row.parameters / full:.0f} % of the whole model's parameters." if full and row.parameters else ""
    limited = _limits_size(options)
    if row.tokens == whole:
        return f"{before}All {whole:,} tokens stay{f': {layers} fit with them' if limited else ''}.{share}"
    why = f", the largest vocabulary with which {layers} fit" if limited and options.vocab_size is None else ""
    unknown = f"; {percent(row.unknown)} of their tokens become unknown" if row.unknown else ""
    return (
        f"{before}{row.tokens:,} of {whole:,} tokens{why}: {percent(row.coverage)} of the tokens of held-out texts "
        f"stay, {percent(row.changed, 0)} of the texts change, and all have {row.longer:.2f} × the tokens{unknown}."
        f"{share}"
    )


def _command(options: ChooseOptions, table: Profile | Scout, vocabularies: Vocabularies, layers: int, size: int) -> str:
    """What cuts the model to that depth and that vocabulary, to be typed."""
    words, out = ["secateur", "prune", vocabularies.model, "--to", str(layers)], f"{table.model}-{layers}"
    if size < vocabularies.whole:
        words += ["--vocab", *map(str, options.vocab), "--vocab-size", str(size)]
        columns = ",".join(f"{role}={own}" for role, own in (options.columns or {}).items())
        words, out = [*words, *(["--columns", columns] if columns else [])], f"{out}-{size}"
    return shlex.join([*words, "-o", out])
