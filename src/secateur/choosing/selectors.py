"""Selection methods: each is a plain function from a :class:`Question` to a :class:`Choice`; all are in one table.

A method that does not beat ``uniform`` and ``random`` is worth nothing.

Those that read losses are built on rules: a rule takes losses (..., depths) and gives a depth (...), from 1, for each
curve. So it can be asked about the measured curve and about every curve of a bootstrap over batches: the share of these
in which it chooses the same is the selection probability.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secateur.errors import DataError, IllegalDepth
from secateur.measures.intervals import MINIMUM_UNITS, REPLICATES, Array, mean_statistic, resample
from secateur.results import Profile

Rule = Callable[[Array], NDArray[Any]]

SEED = 42


@dataclass(frozen=True)
class Question:
    """Which layers of a model of ``depth`` layers to keep; ``count``: how many, where the method does not decide it.

    ``table`` is the model's profile, for the methods that read one.
    """

    depth: int
    table: Any = None
    count: int = 1
    seed: int = SEED


@dataclass(frozen=True)
class Choice:
    """Which layers to keep: ``blocks`` are their indices from 0, ascending; ``reason`` is half a sentence.

    ``warning`` is what a reader must know before relying on it. ``selection_probability`` is the share of the bootstrap
    replicates over the profile's batches in which the same rule chooses the same; None where it reads no such losses.
    """

    blocks: tuple[int, ...]
    reason: str
    warning: str = ""
    selection_probability: float | None = None


def replicates_of(losses: ArrayLike, seed: int, replicates: int = REPLICATES) -> Array:
    """Bootstrap replicates of mean losses: (batches, depths) → (replicates, depths).

    All depths of a replicate come from the same batches, so that what batches have in common (some are harder at every
    depth) does not blur which depth is the lowest.
    """
    values = np.asarray(losses, dtype=np.float64)
    return resample(mean_statistic(values), len(values), seed, replicates)


def lowest_in_each_half(losses: ArrayLike) -> NDArray[Any]:
    """L3Prune's rule (arXiv 2410.14578, section 3): the depth of the lowest loss in each half, (..., 2).

    The first ``depths // 2`` are the first half. Of equal losses the shallowest wins.
    """
    values = np.asarray(losses)
    half = values.shape[-1] // 2
    parts = [(values[..., :half], 1), (values[..., half:], half + 1)]
    return np.stack([part.argmin(axis=-1) + first for part, first in parts if part.shape[-1]], axis=-1)


def l3prune(question: Question, half: int) -> Choice:
    """What L3Prune's rule chooses in the first (0) or second (1) half of the depths."""
    depth = question.depth
    if depth == 1:
        raise IllegalDepth("small and large", depth, "a single layer has no halves")
    chosen, chance = by_rule(question.table, lambda losses: lowest_in_each_half(losses)[..., half])
    where = f"depths {depth // 2 + 1} to {depth}" if half else f"depths 1 to {depth // 2}"
    reason = f"loss {losses_of(question.table)[chosen - 1]:.4f}, the lowest of {where}"
    return Choice(prefix(chosen), reason, selection_probability=chance)


def best_task(question: Question) -> Choice:
    """The depth of the highest zero-shot score, averaged over the profile's tasks. Of equal scores the shallowest.

    Depths at which a task has no score are left out.
    """
    table = question.table
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
    """The layers that change their input most (ShortGPT, arXiv 2403.03853). Of equal ones the earlier stays."""
    table, count = question.table, question.count
    influence = [row.block_influence for row in table.depths]
    order = sorted(range(table.depth), key=lambda i: (-influence[i], i))
    kept, gone = order[:count], order[count:]
    most = f"; those that go have at most {influence[gone[0]]:.3f}" if gone else ""
    return Choice(tuple(sorted(kept)), f"Block Influence of {influence[kept[-1]]:.3f} or more{most}")


def angular(question: Question) -> Choice:
    """All but the run of layers whose input and output are nearest in angle, at the last token (arXiv 2403.17887).

    Of equal runs the first goes.
    """
    table, count = question.table, question.count
    if not table.angular:
        problem = "has no angular distances"
        raise DataError(table.file, problem, "this architecture's states have another layout", field="angular")
    gone = table.depth - count
    if not gone:
        return Choice(prefix(count), "all layers")
    distances = []
    for start in range(count + 1):
        distance = table.angular[start][start + gone]
        if distance is None:
            raise DataError(table.file, f"has no number between depths {start} and {start + gone}", field="angular")
        distances.append((distance, start))
    distance, start = min(distances)
    kept = tuple(i for i in range(table.depth) if not start <= i < start + gone)
    run = f"layers {start} to {start + gone - 1} (from 0) turn" if gone > 1 else f"layer {start} (from 0) turns"
    reason = f"{run} the state least, by {distance:.3f} of a half turn"
    return Choice(kept, reason)


def uniform(question: Question) -> Choice:
    """Evenly spaced layers, the first and the last among them; of one layer, the first."""
    count, last = question.count, question.depth - 1
    steps = max(1, count - 1)
    blocks = tuple((2 * i * last + steps) // (2 * steps) for i in range(count))  # rounded to the nearest
    return Choice(blocks, "evenly spaced")


def at_random(question: Question) -> Choice:
    """Layers drawn by the seed."""
    drawn = random.Random(question.seed).sample(range(question.depth), question.count)  # noqa: S311 - no secret
    return Choice(tuple(sorted(drawn)), f"drawn with seed {question.seed}")


def first(question: Question) -> Choice:
    """The first layers: the last ones go."""
    return Choice(prefix(question.count), "the first layers")


@dataclass(frozen=True)
class Selector:
    """A selection method; ``counts``: it must be told how many layers to keep."""

    rule: Callable[[Question], Choice]
    counts: bool = False
    reads_profile: bool = True


SELECTORS: Mapping[str, Selector] = {
    "l3prune-small": Selector(partial(l3prune, half=0)),
    "l3prune-large": Selector(partial(l3prune, half=1)),
    "best-task": Selector(best_task),
    "block-influence": Selector(block_influence, counts=True),
    "angular": Selector(angular, counts=True),
    "uniform": Selector(uniform, counts=True, reads_profile=False),
    "random": Selector(at_random, counts=True, reads_profile=False),
    "first": Selector(first, counts=True, reads_profile=False),
}
"""Name → selection method, in the order in which they are shown."""
SHORT = {"small": "l3prune-small", "large": "l3prune-large"}
"""Short names of the paper's two choices."""


def prefix(depth: int) -> tuple[int, ...]:
    """The first layers."""
    return tuple(range(depth))


def is_prefix(blocks: Sequence[int]) -> bool:
    """Whether they are the first layers."""
    return tuple(blocks) == prefix(len(blocks))


def layers_of(which: str, count: int, depth: int) -> tuple[int, ...]:
    """So many layers of a model, as a selector that reads no profile takes them: ``first`` or ``uniform``."""
    return SELECTORS[which].rule(Question(depth, count=count)).blocks


def losses_of(table: Profile) -> Array:
    """The loss at each depth, (depths,); DataError if the profile is one of texts alone."""
    found = [row.loss for row in table.depths if row.loss is not None]
    if len(found) < table.depth:
        raise DataError(table.file, "has no losses", "it was made from texts alone; profile on pairs", field="loss")
    return np.array(found, dtype=np.float64)


def by_rule(table: Profile, rule: Rule) -> tuple[int, float | None]:
    """The rule's choice on the measured curve, and its selection probability, if there are enough batches."""
    depth = int(rule(losses_of(table)))
    if len(table.batch_losses) < MINIMUM_UNITS:
        return depth, None
    seed = SEED if table.provenance.seed is None else table.provenance.seed
    losses = np.array(table.batch_losses, dtype=np.float64)
    return depth, float((rule(replicates_of(losses, seed)) == depth).mean())
