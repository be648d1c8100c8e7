"""From what a user says to the layers that stay: a number, a share, a selection method, a scout, or a budget."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.choosing.budgets import (
    CutCost,
    VocabularyCosts,
    choose_rung,
    cost_limits,
    cut_cost,
    decide,
    fits,
    layers_at,
    open_vocabulary,
    vocabulary_costs,
    with_size,
)
from secateur.choosing.selectors import SEED, SELECTORS, SHORT, Choice, Question, is_prefix, prefix
from secateur.errors import ConfigError, DataError, IllegalDepth, SecateurError
from secateur.files import read_json
from secateur.options import Budget, ChooseOptions, make, step
from secateur.progress import Progress, silent
from secateur.results import InNotebook, Profile, RungRow, Scout, load

if TYPE_CHECKING:
    from secateur.vocabulary.choice import CountedVocabulary

CHOSEN_FROM = "chosen_from"
"""Key of ``choice.json`` that holds the :func:`losses_fingerprint`; a choice written by hand needs none."""
FULL, BUDGET, CHOSEN = "full", "budget", "chosen"
Measured = Profile | Scout | str | Path
"""A table to choose from, its file or its folder."""


@step(ChooseOptions)
def choose(options: ChooseOptions, *, progress: Progress = silent) -> dict[str, int]:
    """Choose a depth by a scout's scores; or depths from a profile: L3Prune's two, or one within a budget.

    Returns:
        Numbers of layers to keep. For a scout ``{"chosen": k}``, see :func:`.choose_rung`. For a profile ``{"small": k,
        "large": k}`` (arXiv 2410.14578, section 3): where the untrained model's loss is lowest, ``small`` in the first
        ``depth // 2`` depths and ``large`` in the others; of equal losses the shallowest. With limits, ``{"budget":
        k}``. With ``vocab`` also ``"vocab_size"``, the number of tokens to keep (:mod:`.budgets`).

    Raises:
        DataError: The file is neither, or does not tell what is asked for, as a profile of texts alone has no losses.
        IllegalDepth: The model has a single layer.
        ConfigError: No depth is within the limits, or a limit does not go with the table or the model.
        ModelError: With ``vocab``, the model cannot be opened, or its vocabulary cannot be cut.
    """
    table, _, choice, size = _decide(options, progress)
    if isinstance(table, Scout):
        told = {CHOSEN: len(choice.blocks)}
    elif _has_limits(options):
        told = {BUDGET: len(choice.blocks)}
    else:
        told = {name: len(choice_of(name, table.depth, table).blocks) for name in SHORT}
    return told if size is None else told | {"vocab_size": size}


def _decide(
    options: ChooseOptions, progress: Progress
) -> tuple[Profile | Scout, CountedVocabulary | None, Choice, int | None]:
    """The table, the vocabulary of its model where it may be cut, and the layers and the number of tokens to keep."""
    table = read_table(options.profile)
    if isinstance(table, Scout):
        if options.max_loss_increase is not None:
            problem = "applies to a profile's loss, and this is a scout"
            raise ConfigError("max_loss_increase", options.max_loss_increase, problem, "give --tolerance")
    elif options.best or options.tolerance is not None:
        name, problem = "best" if options.best else "tolerance", f"{table.model} has only a profile"
        hint = f"scout it: secateur scout {table.model} ..."
        raise ConfigError(name, getattr(options, name), f"needs scores after a training, and {problem}", hint)
    counted = open_vocabulary(options, table, progress)
    return table, counted, *decide(options, table, counted)


def read_table(given: Profile | Scout | str | Path) -> Profile | Scout:
    """A profile or a scout, its file, or the folder that holds it; DataError if it is neither."""
    if isinstance(given, (Profile, Scout)):
        return given
    path = Path(given)
    if path.is_dir():
        found = [file for file in (path / Scout.file, path / Profile.file) if file.is_file()]
        if not found:
            hint = "name the folder of a scout or a profile"
            raise DataError(path, f"holds no {Scout.file} and no {Profile.file}", hint)
        path = found[0]
    content = read_json(path)
    is_scout = isinstance(content, dict) and content.get("kind") == Scout.kind
    return load(path, Scout) if is_scout else load(path, Profile)


def losses_fingerprint(profile: Profile) -> str:
    """Of the losses by depth, all that :func:`choose` reads: tells whether a choice was made from this profile."""
    losses = json.dumps([row.loss for row in profile.depths])
    return hashlib.sha256(losses.encode()).hexdigest()[:16]


def blocks_to_keep(to: str | int | float, depth: int, profile: Measured | None = None) -> tuple[int, ...]:
    """The layers that stay, as ``--to`` says it.

    Args:
        to: How many layers to keep; a share to remove, below 1 (the number kept is rounded down); ``chosen``, by a
            scout's scores; ``small`` or ``large``; or a selection method (:data:`.SELECTORS`), with a number where it
            must be told how many: ``uniform:7``, ``random:7:1`` with a seed.
        depth: How many layers the model has.
        profile: Of this model, for the methods that read one; for ``chosen`` a scout.

    Returns:
        Indices of layers, from 0, ascending.

    Raises:
        ConfigError: ``to`` is none of these, or the profile is missing or of another depth.
        IllegalDepth: No such depth.
        DataError: The profile does not tell what the method reads.
    """
    if is_selector(to):
        return choice_of(str(to), depth, profile).blocks
    number = float(to)
    if 0 < number < 1:
        kept = math.floor(depth * (1 - number) + 1e-9)  # 30 × (1 − 0.8) is 5.999… in floating point
    elif number.is_integer():
        kept = int(number)
    else:
        raise ConfigError("to", to, f"is {to}", "a number of layers to keep is whole, a share to remove below 1")
    _check_count(kept, to, depth)
    return prefix(kept)


def is_selector(to: str | int | float) -> bool:
    """Whether ``to`` is a selection method, and no number or share of layers."""
    try:
        float(to)
    except (TypeError, ValueError):
        return True
    return False


def needs_profile(to: str | int | float) -> bool:
    """Whether only a profile, or a scout, tells which layers ``to`` means; ConfigError if it is no selection method."""
    if not is_selector(to):
        return False
    key = _parse(str(to))[0]
    return key == CHOSEN or SELECTORS[key].reads_profile


def choice_of(name: str, depth: int, profile: Measured | None = None) -> Choice:
    """What a selection method chooses, with its reason; arguments and errors as for :func:`blocks_to_keep`."""
    key, count, seed = _parse(name)
    needed = Scout if key == CHOSEN else Profile if SELECTORS[key].reads_profile else None
    table = None
    if needed:
        if profile is None:
            hint = "give --profile DIR, or a number of layers"
            raise ConfigError("to", name, f"is {name}, which needs a {needed.kind}", hint)
        table = read_table(profile)
        if not isinstance(table, needed):
            hint = f"{CHOSEN} reads a scout" if needed is Profile else "give the folder that secateur scout wrote"
            raise ConfigError("profile", table.model, f"is a {table.kind}, but {name} needs a {needed.kind}", hint)
        if table.depth != depth:
            problem = f"has {table.depth} depths, but the model has {depth} layers"
            raise ConfigError("profile", table.model, problem)
    if isinstance(table, Scout):
        return choose_rung(make(Budget, {}), table)
    if SELECTORS[key].counts:
        _check_count(count, count, depth)
    return SELECTORS[key].rule(Question(depth, table, count, seed))


def _parse(text: str) -> tuple[str, int, int]:
    """``random:7:1`` → the selection method, how many layers, and the seed."""
    name, *numbers = text.split(":")
    key = SHORT.get(name, name)
    if key not in (*SELECTORS, CHOSEN):
        methods = (f"{own}:K" if selector.counts else own for own, selector in SELECTORS.items())
        hint = f"give a number of layers, a share to remove, or one of {', '.join([CHOSEN, *SHORT, *methods])}"
        raise ConfigError("to", text, f"is {text!r}", hint)
    if key == CHOSEN or not SELECTORS[key].counts:
        if numbers:
            raise ConfigError("to", text, f"is {text!r}, but {name} chooses the number of layers itself", name)
        return key, 0, SEED
    most = 2 if name == "random" else 1
    if not (1 <= len(numbers) <= most and all(re.fullmatch("[0-9]{1,9}", number) for number in numbers)):
        raise ConfigError("to", text, f"is {text!r}, but {name} must be told how many layers to keep", f"{name}:7")
    return key, int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else SEED


def _check_count(count: int, said: str | int | float, depth: int) -> None:
    if not 1 <= count <= depth:
        raise IllegalDepth(said, depth, f"that would keep {count}", [1 if count < 1 else depth])


def _has_limits(options: ChooseOptions) -> bool:
    return bool(cost_limits(options)) or options.max_loss_increase is not None


@dataclass(frozen=True, kw_only=True)
class Candidate(Choice, CutCost):
    """One choice (:class:`.Choice`) with its row of the profile and what it costs.

    ``name`` is what ``--to`` takes to get it, ``full``, or ``budget``: what the limits allow. ``loss`` is zero-shot,
    with its 95 % interval; None where other layers than the first stay, since a profile measures depths.
    """

    name: str
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None


@dataclass(frozen=True)
class Candidates(InNotebook):
    """All choices from the profile of ``model``, which has ``depth`` layers; ``refused`` is name → why not.

    ``vocabulary`` has the sizes of the vocabulary at the depth that the limits allow, or at ``large``; None where they
    were not asked for.
    """

    model: str
    depth: int
    rows: tuple[Candidate, ...]
    refused: Mapping[str, str]
    vocabulary: VocabularyCosts | None = None


@dataclass(frozen=True)
class Rung(CutCost, RungRow):
    """One depth of a scout with what it costs; ``fits``: the limits of costs allow it."""

    fits: bool = True


@dataclass(frozen=True)
class Rungs(InNotebook):
    """All depths that a scout of ``model`` scored, as :class:`Rung`; ``chosen`` is one of them, ``reason`` says why.

    ``judge`` says what the scores are of, ``tasks`` how many; ``vocabulary`` has the sizes of the vocabulary at the
    chosen depth, None where they were not asked for.
    """

    model: str
    depth: int
    judge: str
    tasks: int
    chosen: int
    reason: str
    rows: tuple[Rung, ...]
    vocabulary: VocabularyCosts | None = None


@step(ChooseOptions)
def candidates(options: ChooseOptions, *, progress: Progress = silent) -> Candidates | Rungs:
    """What there is to choose from, side by side, with what it would cost and how sure it is.

    Of a scout, the depths that it scored (:class:`.Rungs`). Of a profile, what every selection method chooses; those
    that must be told how many layers to keep are asked for as many as ``small`` and ``large``, and as many as the
    limits allow. With ``vocab``, sizes of the vocabulary come with them.

    Raises:
        DataError: The file is neither.
        ConfigError, ModelError: As for :func:`choose`.
    """
    table, counted, choice, size = _decide(options, progress)
    vocabulary = smallest = None
    if counted is not None and size is not None:
        vocabulary = vocabulary_costs(options, table, counted, choice, size)
        smallest = with_size(table, counted, counted.allowed(options)[-1])
    if isinstance(table, Scout):
        rungs = []
        for rung in table.depths:
            blocks = layers_at(table, rung.depth)
            costs = vars(cut_cost(table, blocks))
            rungs.append(Rung(**vars(rung), **costs, fits=fits(options, smallest or table, blocks)))
        judged = (table.judge, len({row.task for row in table.task_scores}))
        return Rungs(table.model, table.depth, *judged, len(choice.blocks), choice.reason, tuple(rungs), vocabulary)
    found = {FULL: Choice(prefix(table.depth), "nothing is cut")}
    # Without losses nothing tells a size: half of the layers.
    sizes = set(choose(table).values() if table.can_choose else [max(1, table.depth // 2)])
    if _has_limits(options):
        found[BUDGET] = choice
        sizes.add(len(choice.blocks))
    refused = {}
    for name, selector in SELECTORS.items():
        counts = [f":{size}" for size in sorted(sizes) if size < table.depth] if selector.counts else [""]
        for spec in (name + count for count in counts if name != "first"):  # which are depths that stand there already
            try:
                found[spec] = choice_of(spec, table.depth, table)
            except SecateurError as error:
                refused[spec] = str(error)
    rows = []
    for name, choice in found.items():
        row = table.depths[len(choice.blocks) - 1] if is_prefix(choice.blocks) else None
        loss = {key: getattr(row, key) for key in ("loss", "loss_low", "loss_high")} if row else {}
        rows.append(Candidate(name=name, **vars(choice), **loss, **vars(cut_cost(table, choice.blocks))))
    return Candidates(table.model, table.depth, tuple(rows), refused, vocabulary)


def ranges(blocks: Sequence[int]) -> str:
    """Layers as ``--keep`` takes them: ``0-5,8,11``."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1] + 1]
    runs = [(blocks[i], blocks[j - 1]) for i, j in zip(starts, [*starts[1:], len(blocks)], strict=True)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
