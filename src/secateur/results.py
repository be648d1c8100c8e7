"""What a run leaves on disk: tables with their provenance.

A result is a table. Each table is a frozen dataclass whose ``rows`` are tidy: one row per (model, depth) or per
(model, task). It is saved as one JSON file with a ``kind``, a schema version and a
:class:`.Provenance`, so that every number can be traced to a command, a seed and a data file.
``load(path)`` gives back what ``table.save(path)`` wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from secateur.errors import DataError
from secateur.files import read_json, write_text
from secateur.provenance import Fingerprint, Provenance

SCHEMA_VERSION = 1

T = TypeVar("T", bound="Table")


@dataclass(frozen=True)
class Table:
    """Rows and their provenance. Subclasses say what a row is.

    Attributes:
        kind: Name of the table in its file; tells a profile from scores.
        file: Name that the table's file has by convention.
    """

    kind: ClassVar[str] = ""
    file: ClassVar[str] = ""

    provenance: Provenance

    @property
    def rows(self) -> tuple[Any, ...]:
        """The tidy rows, each a frozen dataclass."""
        raise AttributeError(f"{type(self).__name__} has no rows")

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
        """Write the table into ``folder`` under its conventional name, whole or not at all."""
        path = Path(folder) / self.file
        content = {"kind": self.kind, "schema_version": SCHEMA_VERSION, **asdict(self)}
        write_text(path, json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n")
        return path


@dataclass(frozen=True)
class DepthRow:
    """One depth of a profile: the state after ``depth`` blocks, through the model's final norm, pooled.

    ``loss`` is the mean over batches, in nats, ``loss_se`` its standard error and ``loss_low`` to ``loss_high`` its
    95 % bootstrap interval; ``chance`` is the share of bootstrap draws in which L3Prune's rule chooses this depth (both
    None with fewer than five batches). ``accuracy``, ``ndcg_at_10`` and ``alignment`` are of pairs too, and None with
    texts alone.
    ``block_influence`` belongs to the block that ends at this depth; ``effective_rank``, ``uniformity`` and
    ``mean_cosine`` are of the pooled vectors; ``next_token_loss`` is that of the language-model head at this depth, in
    nats, None where the model has none.
    """

    depth: int
    loss: float | None
    loss_se: float | None
    block_influence: float
    effective_rank: float | None
    loss_low: float | None = None
    loss_high: float | None = None
    chance: float | None = None
    accuracy: float | None = None
    ndcg_at_10: float | None = None
    alignment: float | None = None
    uniformity: float | None = None
    mean_cosine: float | None = None
    next_token_loss: float | None = None


@dataclass(frozen=True)
class DepthScoreRow:
    """One task at one depth of an untrained model: what :func:`.evaluate` gives for the model cut to it.

    ``kind`` is mteb's name of the task's type, ``score`` the task's main metric (0 to 1), ``low`` to ``high`` its 95 %
    bootstrap interval, None where rows cannot be drawn again; ``samples`` are the rows it was computed on. A depth at
    which a score is no number (all vectors alike) has no row, and a note in the profile.
    """

    task: str
    kind: str
    metric: str
    depth: int
    score: float
    low: float | None = None
    high: float | None = None
    samples: int = 0


@dataclass(frozen=True)
class PartRow:
    """What one part of a model costs; any cut costs the sum of the parts that it keeps.

    ``part`` 0 is all that is no block (token table, norms, pooling, and the tokenizer's time), ``part`` k the k-th
    block. ``parameters`` counts a weight that is used twice once; ``bytes`` are those of the weights as the model was
    opened (as stored, but for a number format that was asked for); ``flops_per_token`` are counted on a text of 128
    tokens. ``latency`` is the median time in seconds for one text of some 20 tokens, ``seconds`` that for a batch of 8,
    in the number format and on the device of the profile.
    """

    part: int
    parameters: int
    bytes: int
    flops_per_token: float
    latency: float
    seconds: float


Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Profile(Table):
    """What each depth of one model is worth. ``rows`` has one :class:`DepthRow` for each depth from 1 to ``depth``.

    Attributes:
        batches: Batches read, of ``batch_size`` pairs (or texts).
        texts: Distinct texts run, and ``tokens`` theirs, prompts included.
        settled: Whether the choice of L3Prune's rule is significantly better than every other depth of its half, at
            95 % over all looks at the data (:mod:`.stopping`); None without pairs.
        cka: Linear CKA between depths, (depth, depth); null where a depth gives all texts the same vector.
        angular: Mean angular distance of the last token's states between depths, (depth + 1, depth + 1), the first
            being the embeddings; empty where an architecture's states have another layout.
        losses_by_pooling: Pooling → its loss at each depth; the model's own pooling is among them.
        batch_losses: (batches, depth), what ``loss`` is the mean of, for any other rule's bootstrap.
        task_scores: Tasks × depths, one :class:`DepthScoreRow` each; empty where no task was asked for.
        parts: What each part of the model costs; empty in profiles of earlier versions.
        notes: What a reader must know: what was measured to decide, what could not be computed, and why.
    """

    kind: ClassVar[str] = "profile"
    file: ClassVar[str] = "profile.json"

    model: str
    depth: int
    pooling: str
    scale: float
    dtype: str
    batch_size: int
    batches: int
    max_length: int
    prompt: str
    depths: tuple[DepthRow, ...]
    texts: int = 0
    tokens: int = 0
    settled: bool | None = None
    cka: Matrix = ()
    angular: Matrix = ()
    losses_by_pooling: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    batch_losses: Matrix = ()
    task_scores: tuple[DepthScoreRow, ...] = ()
    parts: tuple[PartRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[DepthRow, ...]:
        return self.depths

    @property
    def can_choose(self) -> bool:
        """Whether there is something to choose from, and losses to choose by."""
        return self.depth > 1 and all(row.loss is not None for row in self.depths)


@dataclass(frozen=True)
class ScoreRow:
    """One model on one task.

    ``type`` is mteb's name of the task's type, ``score`` its main metric in mteb's own unit (0 to 1), ``samples`` the
    rows it was computed on. ``sample`` and ``seed`` are what was asked for (None: the whole task), ``prompt`` is
    what stood before the texts or queries; ``data`` and ``weights`` are fingerprints of the task and of the model.

    ``low`` to ``high`` is the 95 % bootstrap interval of the score over ``units`` things drawn again, ``unit`` says
    which (:mod:`.replicates`); None where they cannot be, and ``note`` says why. ``draws`` names the file of the
    draws, which :func:`.read_replicates` reads.

    ``prompts`` are those of the model on this task for texts of no kind, for queries and for documents; ``source`` is
    the model's folder or Hub id, ``files`` a fingerprint of that folder's files. ``versions`` are those of the
    libraries, ``command`` and ``created`` say what computed this row, and when. All are empty in scores of earlier
    versions. ``note`` says what a reader must know: why there is no interval, or that a task may mislead.
    """

    model: str
    task: str
    type: str
    metric: str
    score: float
    samples: int
    seconds: float
    sample: int | None = None
    seed: int = 42
    prompt: str = ""
    data: str = ""
    weights: str = ""
    low: float | None = None
    high: float | None = None
    unit: str = ""
    units: int = 0
    draws: str = ""
    prompts: tuple[str, ...] = ()
    source: str = ""
    files: str = ""
    versions: str = ""
    command: str = ""
    created: str = ""
    note: str = ""


@dataclass(frozen=True)
class Scores(Table):
    """Scores of one or more models on one or more tasks.

    A file of scores grows from run to run. Its ``provenance`` is that of the run that wrote it last; each row says by
    itself which command and versions it comes from.
    """

    kind: ClassVar[str] = "scores"
    file: ClassVar[str] = "scores.json"

    scores: tuple[ScoreRow, ...]

    @property
    def rows(self) -> tuple[ScoreRow, ...]:
        return self.scores

    @property
    def commands(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.command for row in self.scores if row.command)) or super().commands

    def average(self, model: str) -> float:
        """Mean of the model's scores over its tasks: ``Mean (Task)`` of the MTEB leaderboard.

        Raises:
            DataError: The table has no scores of that model.
        """
        own = self._of(model)
        return sum(row.score for row in own) / len(own)

    def average_over_types(self, model: str) -> float:
        """Mean over task types of the mean within each: ``Mean (TaskType)`` of the MTEB leaderboard.

        Raises:
            DataError: The table has no scores of that model.
        """
        by_type: dict[str, list[float]] = {}
        for row in self._of(model):
            by_type.setdefault(row.type, []).append(row.score)
        return sum(sum(scores) / len(scores) for scores in by_type.values()) / len(by_type)

    def _of(self, model: str) -> list[ScoreRow]:
        own = [row for row in self.scores if row.model == model]
        if not own:
            known = ", ".join(sorted({row.model for row in self.scores})) or "none at all"
            raise DataError(self.file, f"has no scores of {model}", f"it has those of {known}")
        return own


@dataclass(frozen=True)
class CostRow:
    """What one model costs: counted parameters, bytes and operations, and measured times on this machine.

    ``parameters`` counts a weight that is used twice once; ``embedding_parameters`` of them are the table of tokens.
    ``bytes`` are those of its folder, ``memory_bytes`` those of its weights in memory, ``peak_bytes`` the most that a
    fresh process held while encoding long texts, libraries included (None: not measured). ``flops_per_token`` are
    counted by :mod:`.flops` on a text of ``flops_tokens`` tokens.

    ``texts_per_second`` is for short texts (``short_tokens`` each) in batches of ``short_batch``, the quickest tried;
    the median over repetitions, ``speed_low`` and ``speed_high`` their extremes; ``long_*`` likewise for long texts.
    ``latency_p50`` and ``latency_p95`` are seconds for one short text alone. Times take in the tokenizer. ``device``
    and ``threads`` say where, ``dtype`` is that of the weights. ``files`` is a fingerprint of the model's files, and
    ``versions`` are those of the libraries; both are empty in costs of earlier versions.
    """

    model: str
    depth: int
    parameters: int
    embedding_parameters: int
    bytes: int
    texts_per_second: float
    speed_low: float
    speed_high: float
    memory_bytes: int = 0
    peak_bytes: int | None = None
    flops_per_token: float = 0.0
    flops_tokens: int = 0
    load_seconds: float = 0.0
    latency_p50: float = 0.0
    latency_p95: float = 0.0
    short_tokens: float = 0.0
    short_batch: int = 0
    long_tokens: float = 0.0
    long_batch: int = 0
    long_texts_per_second: float = 0.0
    long_speed_low: float = 0.0
    long_speed_high: float = 0.0
    dtype: str = ""
    device: str = ""
    threads: int = 0
    files: str = ""
    versions: str = ""


@dataclass(frozen=True)
class Costs(Table):
    """Costs of the models of a run, measured side by side."""

    kind: ClassVar[str] = "costs"
    file: ClassVar[str] = "costs.json"

    costs: tuple[CostRow, ...]

    @property
    def rows(self) -> tuple[CostRow, ...]:
        return self.costs


@dataclass(frozen=True)
class DifferenceRow:
    """One model against the reference on one task; ``task`` is empty in the row of the mean over all tasks.

    ``difference`` is ``score`` - ``reference_score``, with its paired 95 % bootstrap interval over ``units`` things
    drawn again (``unit`` says which); None where the two were not scored on the same things.
    """

    model: str
    reference: str
    task: str
    metric: str
    score: float
    reference_score: float
    difference: float
    low: float | None
    high: float | None
    unit: str = ""
    units: int = 0

    @property
    def apart(self) -> bool:
        """Whether the difference is outside the error."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class OverlapRow:
    """How alike two spaces are: the mean share of a text's ``neighbours`` nearest texts that it has in both."""

    model: str
    reference: str
    overlap: float
    neighbours: int
    texts: int


@dataclass(frozen=True)
class ChangedRow:
    """A text whose nearest texts changed: those ``lost`` and those ``gained`` against the reference, nearest first."""

    model: str
    reference: str
    text: str
    overlap: float
    lost: tuple[str, ...]
    gained: tuple[str, ...]


@dataclass(frozen=True)
class Comparison(Table):
    """Models side by side; the first is the ``reference`` of the others. ``rows`` are the differences of scores."""

    kind: ClassVar[str] = "comparison"
    file: ClassVar[str] = "comparison.json"

    reference: str
    models: tuple[str, ...]
    differences: tuple[DifferenceRow, ...]
    overlaps: tuple[OverlapRow, ...]
    changed: tuple[ChangedRow, ...]
    scores: tuple[ScoreRow, ...]
    costs: tuple[CostRow, ...]

    @property
    def rows(self) -> tuple[DifferenceRow, ...]:
        return self.differences


@dataclass(frozen=True)
class LossRow:
    """One logged step of a training: mean loss since the last logged step, and the learning rate then."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class TrialRow:
    """A score of a model that is being trained, after ``step`` steps; higher is better."""

    step: int
    score: float


@dataclass(frozen=True)
class Training(Table):
    """How a model was healed. ``settings`` is the resolved configuration; ``prompts`` are by data set.

    ``trials`` are the scores on the way, where there were any, and ``best_step`` is the step whose weights were kept;
    None is the last.
    """

    kind: ClassVar[str] = "training"
    file: ClassVar[str] = "training.json"

    model: str
    steps: int
    seconds: float
    trained_parameters: int
    settings: Mapping[str, Any]
    prompts: Mapping[str, str]
    losses: tuple[LossRow, ...]
    trials: tuple[TrialRow, ...] = ()
    best_step: int | None = None

    @property
    def rows(self) -> tuple[LossRow, ...]:
        return self.losses


@dataclass(frozen=True)
class Origin(Table):
    """``secateur.json`` in a model folder: which blocks of which model it holds, and how it came to be.

    ``kept`` are the original indices of the blocks kept, of ``depth`` blocks in all; ``history`` has one line for each
    command that made the folder, oldest first; ``check`` is the largest difference between the folder's vectors and
    those of ``checked_against``, on a few texts; ``left_out`` names the parts of the source that are no blocks and
    were not kept: heads, a vision tower.
    """

    kind: ClassVar[str] = "model"
    file: ClassVar[str] = "secateur.json"

    base_model: str
    depth: int
    kept: tuple[int, ...]
    pooling: str
    check: float
    history: tuple[str, ...] = field(default=())
    checked_against: str = "the model in memory"
    left_out: tuple[str, ...] = ()


_TABLES: tuple[type[Table], ...] = (Profile, Scores, Costs, Training, Origin)


def load(path: str | Path, kind: type[T]) -> T:
    """Read a table back.

    Args:
        path: The file, or the folder that holds it under its conventional name.
        kind: The table class expected there.

    Raises:
        DataError: The file is missing, is not JSON, is another kind of table, or of a newer schema; or a value is of
            another type than its key has.
    """
    file = Path(path) / kind.file if Path(path).is_dir() else Path(path)
    content = read_json(file)
    if not isinstance(content, dict) or content.get("kind") != kind.kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise DataError(
            file, f"holds {found!r}, not a {kind.kind}", f"give the file that secateur wrote as {kind.file}"
        )
    if content.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            file, f"schema version {content.get('schema_version')}, but this secateur reads {SCHEMA_VERSION}"
        )
    try:
        table = _build(kind, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(file, f"is not a whole {kind.kind}", f"missing or unexpected: {error}") from error
    for key, value in _misfits(table):
        raise DataError(file, f"{value!r:.60} is not valid", "make the file again", field=key)
    return table


_ROWS: dict[str, type] = {
    "depths": DepthRow,
    "task_scores": DepthScoreRow,
    "parts": PartRow,
    "scores": ScoreRow,
    "costs": CostRow,
    "losses": LossRow,
    "trials": TrialRow,
    "differences": DifferenceRow,
    "overlaps": OverlapRow,
    "changed": ChangedRow,
}


def _build(kind: type[T], content: Mapping[str, Any]) -> T:
    optional = {f.name for f in fields(kind) if f.default is not MISSING}
    values: dict[str, Any] = {
        f.name: content[f.name] for f in fields(kind) if f.name in content or f.name not in optional
    }
    origin = dict(values["provenance"])
    origin["data"] = tuple(Fingerprint(**item) for item in origin["data"])
    values["provenance"] = Provenance(**origin)
    for name, row in _ROWS.items():
        if name in values:
            values[name] = tuple(row(**_frozen(item)) for item in values[name])
    return kind(**{name: _frozen(value) for name, value in values.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _misfits(part: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of a table, and of its rows, whose values are of other types than theirs."""
    for name, hint in _hints(part.__class__).items():
        value, key = getattr(part, name), f"{place}{name}"
        if get_origin(hint) is ClassVar:
            continue
        if is_dataclass(hint):
            yield from _misfits(value, f"{key}.")
        elif get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
            for number, item in enumerate(value):
                yield from _misfits(item, f"{key}.{number}.")
        elif not _fits(value, hint) or (value is None and hint is float and isinstance(part, CostRow)):
            yield key, value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; null is any float, for one that was not finite is written so."""
    if hint is Any:
        return True
    if hint is float:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if origin is not None:
        return isinstance(value, Mapping) and all(_fits(item, inner[1]) for item in value.values())
    return isinstance(value, hint)


def _frozen(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as null, never as a word that other readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
