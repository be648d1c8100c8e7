"""Tables of models side by side: their scores, their costs, and how they differ."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import DataError
from secateur.results.models import Float, Table


@dataclass(frozen=True)
class ScoreRow:
    """One model on one task.

    ``type`` is mteb's name of the task's type, ``score`` its main metric in mteb's own unit (0 to 1), ``samples`` the
    rows it was computed on. ``sample`` and ``seed`` are what was asked for (None: the whole task). ``low`` to ``high``
    is the 95 % bootstrap interval over ``units`` things drawn again, ``unit`` says which (:mod:`.replicates`); None
    where they cannot be. ``draws`` names the file of the draws, which :func:`.read_replicates` reads.

    ``prompt`` is what stood before the texts or queries, ``prompts`` those for texts of no kind, for queries and for
    documents. ``source`` is the model's folder or Hub id; ``data`` and ``weights`` are fingerprints of the
    task and of the model. ``versions`` of the libraries, ``command`` and ``created`` say what computed
    this row, and when. ``note`` says why there is no interval, or that a task may mislead.
    """

    model: str
    task: str
    type: str
    metric: str
    score: Float
    samples: int
    seconds: Float
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
    versions: str = ""
    command: str = ""
    created: str = ""
    note: str = ""


@dataclass(frozen=True)
class Scores(Table, kind="scores", rows_in="scores"):
    """Scores of one or more models on one or more tasks.

    A file of scores grows from run to run: ``provenance`` is that of the last run; each row has its own.
    """

    scores: tuple[ScoreRow, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.command for row in self.scores if row.command)) or super().commands

    def average(self, model: str) -> float:
        """Mean of the model's scores over its tasks: ``Mean (Task)`` of the MTEB leaderboard.

        Raises:
            DataError: The table has no scores of that model.
        """
        own = [row.score for row in self.scores if row.model == model]
        if not own:
            known = ", ".join(sorted({row.model for row in self.scores})) or "none at all"
            raise DataError(self.file, f"has no scores of {model}", f"it has those of {known}")
        return sum(own) / len(own)


@dataclass(frozen=True)
class CostRow:
    """What one model costs: counted parameters, bytes and operations, and measured times on this machine.

    ``parameters`` counts a weight that is used twice once; ``embedding_parameters`` of them are the table of tokens.
    ``bytes`` are those of its folder, ``memory_bytes`` those of its weights in memory, ``peak_bytes`` the most that a
    fresh process held while encoding long texts, libraries included (None: not measured).

    ``texts_per_second`` is for short texts (``short_tokens`` each) in batches of ``short_batch``, the quickest tried;
    the median over repetitions, ``speed_low`` and ``speed_high`` their extremes; ``long_*`` likewise for long texts.
    ``latency_p50`` and ``latency_p95`` are seconds for one short text alone. Times take in the tokenizer. ``dtype`` is
    that of the weights; ``files`` is a fingerprint of the model's files, and ``versions`` are those of the libraries.
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
class Costs(Table, kind="costs", rows_in="costs"):
    """Costs of the models of a run, measured side by side."""

    costs: tuple[CostRow, ...]


@dataclass(frozen=True)
class DifferenceRow:
    """One model against the reference on one task; ``task`` is empty in the row of the mean over all tasks.

    ``difference`` is ``score`` - ``reference_score``, with its paired 95 % bootstrap interval over ``units`` (``unit``
    says which); None where the two were not scored on the same.
    """

    model: str
    reference: str
    task: str
    metric: str
    score: Float
    reference_score: Float
    difference: Float
    low: float | None
    high: float | None
    unit: str = ""
    units: int = 0

    @property
    def apart(self) -> bool:
        """Whether the difference is significant at 95 %."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class OverlapRow:
    """How alike two spaces are: the mean share of a text's ``neighbours`` nearest texts that it has in both.

    ``similarity`` is that of the ones it has in the model's space to it, beside that of the nearest, by the vectors of
    the reference (:func:`.similarity_to`): 1 where they are as similar, 0 where they might be drawn at random.
    """

    model: str
    reference: str
    overlap: Float
    neighbours: int
    texts: int
    similarity: Float | None = None


@dataclass(frozen=True)
class ChangedRow:
    """A text whose nearest texts changed: those ``lost`` and those ``gained`` against the reference, nearest first."""

    model: str
    reference: str
    text: str
    overlap: Float
    lost: tuple[str, ...]
    gained: tuple[str, ...]


@dataclass(frozen=True)
class Comparison(Table, kind="comparison", rows_in="differences"):
    """Models side by side; the first is the ``reference`` of the others."""

    reference: str
    models: tuple[str, ...]
    differences: tuple[DifferenceRow, ...]
    overlaps: tuple[OverlapRow, ...]
    changed: tuple[ChangedRow, ...]
    scores: tuple[ScoreRow, ...]
    costs: tuple[CostRow, ...]
