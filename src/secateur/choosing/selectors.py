"""Ways to choose the blocks that stay, all with one signature: ``selector(question) -> choice``.

:data:`SELECTORS` makes them words that every command knows (:mod:`.choose`). Some read the profile's losses,
some its other columns, some nothing at all: a choice that does not beat ``uniform`` and ``random`` is worth nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from secateur.errors import ConfigError, DataError, IllegalDepth
from secateur.measures.curves import (
    Rule,
    draws_of,
    has_knee,
    knee,
    lowest_in_each_half,
    valleys,
    valleys_in_each_half,
)
from secateur.measures.intervals import FEWEST
from secateur.results import Profile

SEED = 42


@dataclass(frozen=True)
class Question:
    """Which blocks of a model to keep.

    Attributes:
        depth: How many blocks the model has.
        profile: Of this model; not every selector needs one.
        count: How many blocks to keep, for the selectors that do not decide it themselves.
        seed: Of what is drawn.
    """

    depth: int
    profile: Profile | None = None
    count: int = 1
    seed: int = SEED


@dataclass(frozen=True)
class Choice:
    """What a selector chose.

    Attributes:
        blocks: Indices of the blocks that stay, from 0, ascending.
        reason: Why, in half a sentence with the numbers that decided.
        warning: What a reader must know before he relies on it; empty where there is nothing.
        chance: The share of bootstrap draws over the profile's batches in which the same rule chooses the same; None
            where a rule does not read losses by batch.
    """

    blocks: tuple[int, ...]
    reason: str
    warning: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class Selector:
    """A rule and what there is to know about it.

    Attributes:
        rule: The selector.
        about: What it does, in one line, with its source.
        counts: Whether it must be told how many blocks to keep.
        reads_profile: Whether it needs a profile.
    """

    rule: Callable[[Question], Choice]
    about: str
    counts: bool = False
    reads_profile: bool = True


def l3prune(question: Question, half: int) -> Choice:
    """L3Prune (arXiv 2410.14578, section 3): the lowest loss in the first (0) or second (1) half of the depths."""
    table = _halves(question)
    depth, chance = _by_rule(table, lowest_in_each_half, half)
    return Choice(prefix(depth), f"{_loss(table, depth)}, the lowest of {_range(table, half)}", chance=chance)


def l3prune_interior(question: Question, half: int) -> Choice:
    """The lowest true minimum of the smoothed curve in a half (:func:`.valleys`).

    Where the half has none, what :func:`l3prune` chooses, with a warning.
    """
    table = _halves(question)
    depth, chance = _by_rule(table, valleys_in_each_half, half)
    if depth in valleys(losses_of(table).tolist()):
        return Choice(prefix(depth), f"the lowest valley of {_range(table, half)}, {_loss(table, depth)}", "", chance)
    warning = f"no valley in {_range(table, half)}: the lowest loss there, as l3prune"
    return Choice(prefix(depth), f"{_loss(table, depth)}, the lowest of {_range(table, half)}", warning, chance)


def by_knee(question: Question) -> Choice:
    """The knee of the loss curve (:func:`.knee`)."""
    table = _measured(question)
    depth, chance = _by_rule(table, knee, 0)
    if has_knee(losses_of(table)):
        return Choice(
            prefix(depth), f"beyond, loss falls more slowly than blocks are added; {_loss(table, depth)}", "", chance
        )
    return Choice(prefix(depth), f"the lowest loss, {_loss(table, depth)}", "the curve has no knee", chance)


def best_task(question: Question) -> Choice:
    """The depth of the highest score, averaged over the profile's tasks. Of equal scores the shallowest.

    Depths at which a task has no score are left out.
    """
    table = _profile(question)
    if not table.task_scores:
        raise DataError(table.file, "has no task scores", "profile with --tasks", field="task_scores")
    tasks = {row.task for row in table.task_scores}
    scores: dict[int, list[float]] = {}
    for row in table.task_scores:
        scores.setdefault(row.depth, []).append(row.score)
    means = {depth: fmean(scores[depth]) for depth in sorted(scores) if len(scores[depth]) == len(tasks)}
    if not means:
        raise DataError(table.file, "has no depth at which every task has a score", field="task_scores")
    depth = max(means, key=lambda k: means[k])
    of = "on average " if len(tasks) > 1 else ""
    return Choice(prefix(depth), f"scores {means[depth]:.4f} {of}on {', '.join(sorted(tasks))}, the most of all depths")


def block_influence(question: Question) -> Choice:
    """ShortGPT (arXiv 2403.03853): the blocks that change their input least go. Of equal ones the later goes."""
    table, count = _profile(question), _count(question)
    influence = [row.block_influence for row in table.depths]
    order = sorted(range(table.depth), key=lambda i: (-influence[i], i))
    kept, gone = order[:count], order[count:]
    most = f"; those that go have at most {influence[gone[0]]:.3f}" if gone else ""
    return Choice(tuple(sorted(kept)), f"Block Influence of {influence[kept[-1]]:.3f} or more{most}")


def angular(question: Question) -> Choice:
    """Gromov et al. (arXiv 2403.17887): the run of blocks goes whose input and output are nearest in angle.

    Distances are of the last token's states. Of equal runs the first goes.
    """
    table, count = _profile(question), _count(question)
    if not table.angular:
        problem = "has no angular distances"
        raise DataError(table.file, problem, "this architecture's states have another layout", field="angular")
    gone = table.depth - count
    distances = [(_angle(table, start, start + gone), start) for start in range(count + 1)]
    distance, start = min(distances)
    kept = tuple(i for i in range(table.depth) if not start <= i < start + gone)
    if not gone:
        return Choice(kept, "all blocks")
    return Choice(
        kept, f"blocks {start} to {start + gone - 1} (from 0) turn the state least, by {distance:.3f} of a half turn"
    )


def uniform(question: Question) -> Choice:
    """Evenly spaced blocks, the first and the last among them; of one block, the first."""
    count, last = _count(question), question.depth - 1
    steps = max(1, count - 1)
    blocks = tuple((2 * i * last + steps) // (2 * steps) for i in range(count))  # rounded to the nearest
    return Choice(blocks, "evenly spaced")


def at_random(question: Question) -> Choice:
    """Blocks drawn by the seed."""
    drawn = random.Random(question.seed).sample(range(question.depth), _count(question))  # noqa: S311 - no secret
    return Choice(tuple(sorted(drawn)), f"drawn with seed {question.seed}")


def first(question: Question) -> Choice:
    """The first blocks: the last ones go."""
    return Choice(prefix(_count(question)), "the first blocks")


SELECTORS: Mapping[str, Selector] = {
    "l3prune-small": Selector(
        partial(l3prune, half=0), "the lowest loss in the first half of the depths (L3Prune, arXiv 2410.14578)"
    ),
    "l3prune-large": Selector(
        partial(l3prune, half=1), "the lowest loss in the second half of the depths (L3Prune, arXiv 2410.14578)"
    ),
    "l3prune-interior-small": Selector(
        partial(l3prune_interior, half=0), "the lowest true minimum of the smoothed loss in the first half"
    ),
    "l3prune-interior-large": Selector(
        partial(l3prune_interior, half=1), "the lowest true minimum of the smoothed loss in the second half"
    ),
    "knee": Selector(by_knee, "the depth after which more blocks bring little (Kneedle, Satopää et al. 2011)"),
    "best-task": Selector(best_task, "the depth of the highest zero-shot score, averaged over the profile's tasks"),
    "block-influence": Selector(
        block_influence, "the blocks that change their input most (ShortGPT, arXiv 2403.03853)", counts=True
    ),
    "angular": Selector(
        angular, "all but the run of blocks that turns the state least (arXiv 2403.17887)", counts=True
    ),
    "uniform": Selector(
        uniform, "evenly spaced blocks, the first and the last among them", counts=True, reads_profile=False
    ),
    "random": Selector(at_random, "blocks drawn by a seed", counts=True, reads_profile=False),
    "first": Selector(first, "the first blocks", counts=True, reads_profile=False),
}
"""Name → selector, in the order in which they are shown."""


def prefix(depth: int) -> tuple[int, ...]:
    """The first blocks."""
    return tuple(range(depth))


def losses_of(table: Profile) -> Tensor:
    """The loss at each depth: (depths,).

    Raises:
        DataError: The profile is one of texts alone.
    """
    found = [row.loss for row in table.depths if row.loss is not None]
    if len(found) < table.depth:
        raise DataError(table.file, "has no losses", "it was made from texts alone; profile on pairs", field="loss")
    return torch.tensor(found, dtype=torch.float64)


def chance_of(table: Profile, rule: Rule, place: int, depth: int) -> float | None:
    """The share of bootstrap draws in which a rule chooses this depth; None with fewer than five batches.

    Args:
        table: The profile.
        rule: From losses to depths.
        place: Which of the rule's choices.
        depth: What it chooses on the measured curve.
    """
    if len(table.batch_losses) < FEWEST:
        return None
    losses = torch.tensor(table.batch_losses, dtype=torch.float64)
    seed = SEED if table.provenance.seed is None else table.provenance.seed
    chosen = rule(draws_of(losses, seed))[:, place]
    return float((chosen == depth).double().mean())


def _by_rule(table: Profile, rule: Rule, place: int) -> tuple[int, float | None]:
    depth = int(rule(losses_of(table))[place])
    return depth, chance_of(table, rule, place, depth)


def _profile(question: Question) -> Profile:
    if question.profile is None:
        raise ConfigError("profile", None, "is missing", "this choice is made from a profile: give --profile DIR")
    return question.profile


def _measured(question: Question) -> Profile:
    table = _profile(question)
    losses_of(table)
    return table


def _halves(question: Question) -> Profile:
    table = _measured(question)
    if table.depth == 1:
        raise IllegalDepth("small and large", table.depth, "a single block has no halves")
    return table


def _count(question: Question) -> int:
    count, depth = question.count, question.depth
    if not 1 <= count <= depth:
        raise IllegalDepth(count, depth, f"that would keep {count}", [1 if count < 1 else depth])
    return count


def _angle(table: Profile, start: int, end: int) -> float:
    distance = table.angular[start][end]
    if distance is None:
        raise DataError(table.file, f"has no number between depths {start} and {end}", field="angular")
    return distance


def _loss(table: Profile, depth: int) -> str:
    return f"loss {losses_of(table)[depth - 1]:.4f}"


def _range(table: Profile, half: int) -> str:
    middle = table.depth // 2
    return f"depths {middle + 1} to {table.depth}" if half else f"depths 1 to {middle}"
