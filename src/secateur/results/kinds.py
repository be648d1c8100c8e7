"""The tables that the steps write: profiles, scouts, scores, costs and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.errors import DataError
from secateur.results.base import Float, Matrix, Table


@dataclass(frozen=True)
class DepthRow:
    """One depth of a profile: the state after ``depth`` layers, through the model's final norm, pooled.

    ``loss`` is the mean over batches, in nats, ``loss_se`` its standard error and ``loss_low`` to ``loss_high`` its
    95 % bootstrap interval; ``selection_probability`` is the share of bootstrap replicates in which
    L3Prune's rule chooses this depth (both None with fewer than five batches). ``accuracy``, ``ndcg_at_10`` and
    ``alignment`` are of pairs too, and None with texts alone.
    ``block_influence`` belongs to the layer that ends at this depth; ``effective_rank``, ``uniformity`` and
    ``mean_cosine`` are of the pooled vectors; ``next_token_loss`` is that of the language-model head at this depth, in
    nats, None where the model has none.
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

    ``kind`` is mteb's name of the task's type, ``score`` the task's main metric (0 to 1), ``low`` to ``high`` its 95 %
    bootstrap interval, None where rows cannot be drawn again; ``samples`` are the rows it was computed on. A depth at
    which a score is no number (all vectors alike) has no row, and a note in the profile.
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
    opened (as stored, but for a number format that was asked for); ``flops_per_token`` are counted on a text of 128
    tokens. ``latency`` is the median time in seconds for one text of some 20 tokens, ``seconds`` that for a batch of 8,
    in the number format and on the device of the profile.
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
        losses_by_pooling: Pooling → its loss at each depth, the model's own among them.
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
    losses_by_pooling: Mapping[str, tuple[Float, ...]] = field(default_factory=dict)
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

    ``score`` is the mean over the scout's tasks, 0 to 1; ``difference`` is it less that of the full depth. Each has its
    95 % bootstrap interval, the latter paired by row; the ends are None where there is none, as at the full depth.
    ``trained`` says whether the depth was one of those that were trained.
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
        model: What the model is called.
        depth: Its number of layers.
        judge: What the scores are of: ``tasks`` (the user's), ``pairs`` (held-out ones), or ``texts`` (whether a text
            has the neighbours that it has for the teacher).
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
    the model's folder or Hub id. ``versions`` of the libraries, ``command`` and ``created`` say what computed this row,
    and when. ``note`` says why there is no interval, or that a task may
    mislead.
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
    ``versions`` are those of the libraries.
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
    """How alike two spaces are: the mean share of a text's ``neighbours`` nearest texts that it has in both."""

    model: str
    reference: str
    overlap: Float
    neighbours: int
    texts: int


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
