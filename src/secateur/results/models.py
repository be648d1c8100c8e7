"""Results as tables, and those of one model: its profile, its scout, its training, and what its folder holds.

Each is one frozen dataclass, saved as one JSON file with its provenance; its ``rows`` are tidy. ``load(path, kind)``
gives back what ``table.save(folder)`` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import TypeAdapter, ValidationError, WrapValidator
from pydantic_core import to_json

from secateur.errors import DataError
from secateur.files import read_json, write_bytes
from secateur.provenance import Provenance

SCHEMA_VERSION = 1

T = TypeVar("T", bound="Table")
Float = Annotated[float, WrapValidator(lambda value, check: None if value is None else check(value))]
"""A number; what is not finite is written as null, and read as None."""
Matrix = tuple[tuple[float | None, ...], ...]


class InNotebook:
    """A dataclass that a notebook shows as tables: all rows that are in it, of each kind as one."""

    def _repr_html_(self) -> str | None:
        import pandas as pd

        found = ((own.name, getattr(self, own.name)) for own in fields(cast(Any, self)))
        tables = ((name, rows) for name, rows in found if isinstance(rows, tuple) and rows and is_dataclass(rows[0]))
        return "".join(f"<p>{name}</p>{pd.DataFrame(rows).to_html(max_rows=60)}" for name, rows in tables) or None


@dataclass(frozen=True)
class Table(InNotebook):
    """Rows and their provenance. Subclasses say what a row is.

    Attributes:
        kind: Name of the table in its file; tells a profile from scores.
        file: Name that the table's file has: ``KIND.json`` where the class does not say another.
        rows_in: Name of the attribute that holds the rows.
    """

    kind: ClassVar[str]
    file: ClassVar[str]
    rows_in: ClassVar[str]

    provenance: Provenance

    def __init_subclass__(cls, *, kind: str = "", file: str = "", rows_in: str = "") -> None:
        if kind:
            cls.kind, cls.file, cls.rows_in = kind, file or f"{kind}.json", rows_in

    @property
    def rows(self) -> tuple[Any, ...]:
        """The tidy rows, each a frozen dataclass."""
        return tuple(getattr(self, self.rows_in, ()))

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that the rows come from."""
        return (self.provenance.command,)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict per row."""
        return [asdict(row) for row in self.rows]

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        import pandas as pd

        return pd.DataFrame(self.to_dicts())

    def save(self, folder: str | Path) -> Path:
        """Write the table into ``folder`` as :attr:`file`, whole or not at all."""
        path = Path(folder) / self.file
        content = {"kind": self.kind, "schema_version": SCHEMA_VERSION, **asdict(self)}
        # JSON has no NaN: a number that is not finite is null, never a word that other readers refuse.
        write_bytes(path, to_json(content, indent=1, inf_nan_mode="null") + b"\n")
        return path


def load(path: str | Path, kind: type[T]) -> T:
    """Read a table back from its file, or from the folder that holds it.

    Raises:
        DataError: The file is missing, is not JSON, is another kind of table, or of a newer schema; or a value is
            missing or invalid.
    """
    file = Path(path) / kind.file if Path(path).is_dir() else Path(path)
    content = read_json(file)
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or found != kind.kind:
        raise DataError(
            file, f"holds {found!r}, not a {kind.kind}", f"give the file that secateur wrote as {kind.file}"
        )
    content.pop("losses_by_pooling", None)  # of earlier profiles
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(file, f"schema version {version}, but this secateur reads {SCHEMA_VERSION}")
    try:
        text = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")  # lone surrogates
        return _adapter(cast(Any, kind)).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] in ("missing", "unexpected_keyword_argument"):
            raise DataError(file, f"is not a whole {kind.kind}", f"missing or unexpected: {key}") from None
        raise DataError(file, f"{first['input']!r:.60} is not valid", "make the file again", field=key) from None


_adapter = cache(TypeAdapter)


# Profiles and scouts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthRow:
    """One depth of a profile: the state after ``depth`` layers, through the model's final norm, pooled.

    ``loss`` is the mean over batches, in nats, with its standard error and 95 % bootstrap interval;
    ``selection_probability`` is the share of bootstrap replicates in which L3Prune's rule chooses this depth (both None
    with fewer than five batches). ``accuracy``, ``ndcg_at_10`` and ``alignment`` are None with texts alone.
    ``block_influence`` belongs to the layer that ends at this depth; ``next_token_loss`` is that of the language-model
    head at this depth, in nats, None where the model has none.
    """

    depth: int
    loss: float | None
    loss_se: float | None
    block_influence: Float
    effective_rank: float | None
    loss_low: float | None = None
    loss_high: float | None = None
    selection_probability: float | None = None
    accuracy: float | None = None
    ndcg_at_10: float | None = None
    alignment: float | None = None
    uniformity: float | None = None
    mean_cosine: float | None = None
    next_token_loss: float | None = None


@dataclass(frozen=True)
class DepthScoreRow:
    """One task at one depth of a model: what :func:`.evaluate` gives for the model cut to it.

    As in :class:`ScoreRow`, ``kind`` being its ``type``. A depth at which a score is no number (all vectors alike) has
    no row, and a note in the profile.
    """

    task: str
    kind: str
    metric: str
    depth: int
    score: Float
    low: float | None = None
    high: float | None = None
    samples: int = 0


@dataclass(frozen=True)
class LayerCost:
    """What one part of a model costs; any cut costs the sum of the parts that it keeps.

    ``layer`` 0 is all that is no layer (token table, norms, pooling, and the tokenizer's time), ``layer`` k the k-th
    layer. ``parameters`` counts a weight that is used twice once; ``bytes`` are those of the weights as the model was
    opened; ``flops_per_token`` are counted on a text of 128 tokens. ``latency`` is the median time in seconds for one
    text of some 20 tokens, ``seconds`` that for a batch of 8.
    """

    layer: int
    parameters: int
    bytes: int
    flops_per_token: Float
    latency: Float
    seconds: Float


@dataclass(frozen=True)
class Profile(Table, kind="profile", rows_in="depths"):
    """What each depth of one model is worth. ``rows`` has one :class:`DepthRow` for each depth from 1 to ``depth``.

    Attributes:
        batches: Batches read, of ``batch_size`` pairs (or texts).
        texts: Distinct texts run, and ``tokens`` theirs, prompts included.
        converged: Whether the choice of L3Prune's rule is significantly better than every other depth of its half, at
            95 % over all looks at the data (:func:`.has_converged`); None without pairs.
        cka: Linear CKA between depths, (depth, depth); null where a depth gives all texts the same vector.
        angular: Mean angular distance of the last token's states, (depth + 1, depth + 1), depth 0 being the embeddings;
            empty where an architecture's states have another layout.
        batch_losses: (batches, depth), what ``loss`` is the mean of.
        task_scores: Tasks × depths, one :class:`DepthScoreRow` each; empty where no task was asked for.
        layer_costs: What each layer of the model costs.
        notes: What was measured to decide, what could not be computed, and why.
        source: The model's folder, file or Hub id; empty for one that was open.
    """

    model: str
    depth: int
    pooling: str
    scale: Float
    dtype: str
    batch_size: int
    batches: int
    max_length: int
    prompt: str
    depths: tuple[DepthRow, ...]
    texts: int = 0
    tokens: int = 0
    converged: bool | None = None
    cka: Matrix = ()
    angular: Matrix = ()
    batch_losses: Matrix = ()
    task_scores: tuple[DepthScoreRow, ...] = ()
    layer_costs: tuple[LayerCost, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""

    @property
    def can_choose(self) -> bool:
        """Whether there is something to choose from, and losses to choose by."""
        return self.depth > 1 and all(row.loss is not None for row in self.depths)


@dataclass(frozen=True)
class RungRow:
    """One depth of a scouted model.

    ``score`` is the mean over the scout's tasks, 0 to 1; ``difference`` is it less that of the full depth, paired by
    row. Each has its 95 % bootstrap interval; the ends are None where there is none, as at the full depth. ``trained``
    says whether the depth was one of those that were trained.
    """

    depth: int
    trained: bool
    score: Float
    low: float | None
    high: float | None
    difference: Float
    difference_low: float | None = None
    difference_high: float | None = None


@dataclass(frozen=True)
class Scout(Table, kind="scout", rows_in="depths"):
    """What each depth of a model is worth after one short training of several depths at once.

    Attributes:
        judge: What the scores are of: ``tasks`` (the user's), ``pairs`` (held-out ones), or ``texts`` (how similar
            to a text, for a teacher, its nearest ones are).
        depths: One :class:`RungRow` for each depth that was scored, ascending; the full depth is the last.
        task_scores: Tasks × depths.
        layer_costs: What each layer costs.
        notes: What a reader must know.
        layers: Which layers a depth has: the ``first`` ones, or ``uniform``, evenly spaced.
    """

    model: str
    depth: int
    judge: str
    depths: tuple[RungRow, ...]
    task_scores: tuple[DepthScoreRow, ...] = ()
    layer_costs: tuple[LayerCost, ...] = ()
    notes: tuple[str, ...] = ()
    layers: str = "first"


# A model's folder -----------------------------------------------------------------------------------------------------


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
