"""What a run leaves on disk: tables with their provenance, written whole or not at all.

A result is a table. Each table is a frozen dataclass whose ``rows`` are tidy: one row per (model, depth) or per
(model, task). It is saved as one JSON file with a ``kind``, a schema version and a :class:`Provenance`, so that every
number can be traced to a command, a seed and a data file. ``load(path)`` gives back what ``table.save(path)`` wrote.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError

from secateur.errors import DataError, OutputError

SCHEMA_VERSION = 1
LIBRARIES = ("secateur", "torch", "transformers", "sentence-transformers", "peft", "mteb", "numpy")

T = TypeVar("T", bound="Table")


@dataclass(frozen=True)
class Fingerprint:
    """A data file as it was read: ``sha256`` of its bytes, ``rows`` used, and its licence where a file tells it."""

    name: str
    sha256: str
    rows: int
    licence: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where a table comes from: the command, when, with which seed, versions, data, and on what machine."""

    command: str
    created: str
    seed: int | None
    versions: Mapping[str, str]
    data: tuple[Fingerprint, ...]
    hardware: Mapping[str, Any]


def provenance(data: Sequence[Fingerprint] = (), seed: int | None = None, command: str | None = None) -> Provenance:
    """Describe this process. ``command`` defaults to the command line that started it."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Provenance(
        command=command or command_line(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seed=seed,
        versions=versions,
        data=tuple(data),
        hardware={"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
    )


_command: ContextVar[str] = ContextVar("command", default="")


@contextlib.contextmanager
def acting_as(command: str) -> Iterator[None]:
    """Within: tables say that they come from this command, the one that would do a study's step alone."""
    token = _command.set(command)
    try:
        yield
    finally:
        _command.reset(token)


def command_line() -> str:
    """The command behind what is done now, as it can be typed again."""
    if _command.get():
        return _command.get()
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return shlex.join([program, *sys.argv[1:]])


def fingerprint(file: Path, rows: int, licence: str = "") -> Fingerprint:
    """Hash a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return Fingerprint(file.name, digest.hexdigest(), rows, licence)


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
    95 % bootstrap interval (None with one batch); ``chance`` is the share of bootstrap draws in which L3Prune's rule
    chooses this depth. ``accuracy``, ``ndcg_at_10`` and ``alignment`` are of pairs too, and None with texts alone.
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
    """One task at one depth of an untrained model: what :func:`secateur.evaluate` gives for the model cut to it.

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
        settled: Whether 95 % of bootstrap draws agree with the choice of L3Prune's rule; None without pairs.
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
    which (:mod:`secateur.predictions`); None where they cannot be. ``draws`` names the file of the draws, which
    :func:`secateur.differences.read_draws` reads.
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


@dataclass(frozen=True)
class Scores(Table):
    """Scores of one or more models on one or more tasks."""

    kind: ClassVar[str] = "scores"
    file: ClassVar[str] = "scores.json"

    scores: tuple[ScoreRow, ...]

    @property
    def rows(self) -> tuple[ScoreRow, ...]:
        return self.scores

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
    counted by :mod:`secateur.flops` on a text of ``flops_tokens`` tokens.

    ``texts_per_second`` is for short texts (``short_tokens`` each) in batches of ``short_batch``, the quickest tried;
    the median over repetitions, ``speed_low`` and ``speed_high`` their extremes; ``long_*`` likewise for long texts.
    ``latency_p50`` and ``latency_p95`` are seconds for one short text alone. Times take in the tokenizer. ``device``
    and ``threads`` say where, ``dtype`` is that of the weights.
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
        DataError: The file is missing, is not JSON, is another kind of table, or of a newer schema.
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
        return _build(kind, content)
    except (KeyError, TypeError) as error:
        raise DataError(file, f"is not a whole {kind.kind}", f"missing or unexpected: {error}") from error


def read_json(file: Path) -> Any:
    """Parse a JSON file, with the line in the error where it is broken."""
    try:
        content = file.read_bytes()
        check_no_byte_order_mark(file, content)
        return json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise DataError(file, "no such file") from None
    except json.JSONDecodeError as error:
        raise DataError(file, f"broken JSON ({error.msg})", line=error.lineno) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(file, f"cannot be read ({error})") from None


def check_no_byte_order_mark(file: Path, start: bytes) -> None:
    """Refuse a file that starts with a UTF-8 byte order mark, which would become part of its first word.

    Raises:
        DataError: It does.
    """
    if start.startswith(codecs.BOM_UTF8):
        raise DataError(file, "starts with a byte order mark", "save it as UTF-8 without BOM", line=1)


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


_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it: readers see the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """As :func:`write_text`, for bytes.

    Raises:
        OutputError: The disk is full, or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # as in _TEMPORARY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise output_error(path, error) from error


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields ``<path>.partial``; on success it is renamed to ``path``, on an error it is removed.

    Raises:
        OutputError: ``path`` holds something already, or cannot be written.
    """
    path = Path(path)
    partial = partial_folder(path)
    try:
        with writing(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            give_name(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_folder(path: str | Path) -> Path:
    """Where a folder is prepared until it is complete. Refuses a ``path`` that holds something already."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(path, "already holds something else", "name a new folder, or remove this one")
    return path.with_name(path.name + ".partial")


def give_name(folder: Path, path: Path) -> None:
    """Rename a folder to ``path``, which is absent or an empty folder."""
    if path.exists():
        path.rmdir()
    folder.rename(path)


def results_folder(path: str | Path, *own: str) -> Path:
    """A folder for results, made where absent. It may hold earlier results (the files named in ``own``), no others.

    What a process that was killed had not finished writing is removed.

    Raises:
        OutputError: It is a file, or holds something else.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OutputError(path, "is a file", "name a folder")
    held = [item for item in path.iterdir() if item.name not in own] if path.exists() else []
    unfinished = [item for item in held if (found := _TEMPORARY.fullmatch(item.name)) and found[1] in own]
    foreign = sorted(item.name for item in held if item not in unfinished)
    if foreign:
        raise OutputError(path, f"already holds something else ({foreign[0]})", "name a new folder")
    try:
        for item in unfinished:
            item.unlink()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    return path


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within: what fails because ``path`` cannot be written is an OutputError.

    On a full disk, safetensors and torch raise errors of their own, which do not tell.
    """
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error
    except (RuntimeError, SafetensorError) as error:
        if not _is_full(Path(path)) and f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error


def _is_full(path: Path) -> bool:
    there = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(there).free < 4096


def output_error(path: str | Path, error: OSError) -> OutputError:
    """Say in the user's words why a path could not be written."""
    reasons = {
        errno.ENOSPC: ("the disk is full", "free some space and run the same command again"),
        errno.EDQUOT: ("the disk quota is used up", "free some space and run the same command again"),
        errno.EACCES: ("no permission to write there", "name another folder"),
        errno.EROFS: ("the file system is read-only", "name another folder"),
    }
    problem, hint = reasons.get(error.errno or 0, (f"cannot be written ({error.strerror or error})", ""))
    return OutputError(path, problem, hint)
