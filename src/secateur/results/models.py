"""What stands in a model's folder: how it was trained, and which layers and tokens of which model it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.results.base import Float, Table


@dataclass(frozen=True)
class LossRow:
    """One logged step of a training: mean loss since the last logged step, and the learning rate then."""

    step: int
    loss: Float
    learning_rate: Float


@dataclass(frozen=True)
class EvaluationRow:
    """A score of a model that is being trained, after ``step`` steps; higher is better."""

    step: int
    score: Float


@dataclass(frozen=True)
class Training(Table, kind="training", rows_in="losses"):
    """How a model was healed. ``settings`` is the resolved configuration; ``prompts`` are by data set.

    ``evaluations`` are the scores on the way, where there were any; ``best_step`` is the step whose weights were kept,
    None for the last.
    """

    model: str
    steps: int
    seconds: Float
    trained_parameters: int
    settings: Mapping[str, Any]
    prompts: Mapping[str, str]
    losses: tuple[LossRow, ...]
    evaluations: tuple[EvaluationRow, ...] = ()
    best_step: int | None = None


COVERED, BELOW_HELD_OUT = 0.95, 0.03
"""Of a task's tokens fewer than this share stay, and so much fewer than of held-out texts: these are texts of another
kind."""


@dataclass(frozen=True)
class VocabularyRow:
    """A vocabulary of ``tokens`` tokens, chosen by the user's texts, and what it does to texts that were held out.

    ``coverage`` is the share of their tokens that stay, ``changed`` the share of the texts with a token that does not;
    ``tokens_per_text`` is the mean number of tokens afterwards. ``unknown`` is the share of the tokens that are unknown
    and were not before. ``parameters`` and ``bytes`` are those of the token tables; None where nobody knows.
    """

    tokens: int
    coverage: Float
    changed: Float
    tokens_per_text: Float
    unknown: Float = 0.0
    parameters: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class VocabularyCut:
    """How a vocabulary was cut: to ``row``, of ``tokens`` tokens, by ``texts`` texts of ``files``.

    ``tokens_per_text`` is that of the held-out texts before; ``task_coverage`` is the share of the tokens of a task's
    texts that stay, of tasks that were named; ``removed`` are the parameters of tables that went, those of tables that
    hold a slice for each layer last.
    """

    row: VocabularyRow
    tokens: int
    tokens_per_text: Float
    texts: int
    files: tuple[str, ...]
    task_coverage: Mapping[str, Float] = field(default_factory=dict)
    removed: tuple[int, int] = (0, 0)

    @property
    def uncovered(self) -> dict[str, float]:
        """Tasks that are covered much worse than the held-out texts, with their coverage."""
        least = min(COVERED, self.row.coverage - BELOW_HELD_OUT)
        return {task: share for task, share in self.task_coverage.items() if share < least}


@dataclass(frozen=True)
class Origin(Table, kind="model", file="secateur.json"):
    """``secateur.json`` in a model folder: which layers of which model it holds, and how it came to be.

    ``kept`` are the original indices of the layers kept, of ``depth`` layers in all; ``history`` has one line for each
    command that made the folder, oldest first; ``check`` is the largest difference between the folder's vectors and
    those of ``checked_against``, on a few texts; ``left_out`` names what was not kept: heads, a vision tower;
    ``vocabulary`` says how the vocabulary was cut, where it was.
    """

    base_model: str
    depth: int
    kept: tuple[int, ...]
    pooling: str
    check: Float
    history: tuple[str, ...] = field(default=())
    checked_against: str = "the model in memory"
    left_out: tuple[str, ...] = ()
    vocabulary: VocabularyCut | None = None
