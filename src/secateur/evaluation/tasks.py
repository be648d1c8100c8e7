"""Evaluation tasks: a task folder, or what mteb knows by a name, as a task that mteb itself scores.

A benchmark is the list of its tasks, each named ``BENCHMARK/TASK``: a benchmark may take a part of a task's languages
and splits, as ``MTEB(eng, v1)/STS17`` is English alone.

Every metric is mteb's own code on mteb's own protocol. What its protocol leaves out or repeats stays as it is:
classification fits 10 logistic regressions on 8 training texts of each label and averages; clustering embeds 4 % of
the texts and averages 10 runs of mini-batch k-means, each on 16,384 of them drawn with replacement. One thing differs,
because 4 % of few texts is nothing: a clustering task whose 4 % would be fewer than :data:`TEXTS_PER_CLUSTER` for each
label, or that was sampled already, embeds all its texts (mteb's ``max_fraction_of_documents_to_embed = None``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import Row, TaskFolder, read_task_folder, sample_task
from secateur.provenance import Fingerprint

TEXTS_PER_CLUSTER = 10


@dataclass(frozen=True)
class Task:
    """One task, checked and ready.

    Attributes:
        metadata: mteb's description of it.
        instruction: What the texts or queries are encoded for; may be empty.
        source: Fingerprint of the data, before sampling.
        make: Gives a fresh mteb task. Each model needs its own: a clustering task draws on from its random state, so
            that a second model would be scored on other texts.
        note: What a reader of its scores must know.
    """

    metadata: TaskMetadata
    instruction: str
    source: Fingerprint
    make: Callable[[], AbsTask]
    note: str = ""

    @property
    def name(self) -> str:
        """As in ``task.json``, or mteb's."""
        return str(self.metadata.name)

    @property
    def asymmetric(self) -> bool:
        """Whether queries and documents differ, so that an instruction is for the queries alone."""
        return str(self.metadata.simplified_task_type) == "retrieval"


def expand(tasks: Sequence[str | Path]) -> list[str | Path]:
    """Tasks with each benchmark's name replaced by the names of its tasks, in its order."""
    return [own for task in tasks for own in _expanded(task)]


def _expanded(task: str | Path) -> list[str | Path]:
    if Path(task).exists():
        return [task]
    try:
        benchmark = mteb.get_benchmark(str(task))
    except KeyError:
        return [task]
    return [f"{task}/{own.metadata.name}" for own in benchmark.tasks]


def open_task(task: str | Path, *, sample: int | None = None, seed: int = 42) -> Task:
    """Open a task folder, or an mteb task by its name.

    Args:
        task: A folder (see :mod:`.task_folder`), or the name of a text task of mteb, or of one in a benchmark:
            ``BENCHMARK/TASK``.
        sample: Draw at most so many test rows (see :func:`.sample_task`); folders only.
        seed: Decides which.

    Raises:
        DataError: The folder is not right, or mteb has no text task of that name.
        ConfigError: ``sample`` is below 1, or asked of an mteb task.
    """
    if sample is not None and sample < 1:
        raise ConfigError("sample", sample, f"{sample} rows are none", "1 or more")
    if not Path(task).exists():
        return _named(str(task), sample)
    folder = read_task_folder(task)
    kind = _KINDS[folder.type]
    metadata = _metadata(folder, kind)
    if sample is not None:
        folder = sample_task(folder, sample, seed)
    make = lambda: _local_task(folder, kind, metadata)  # noqa: E731
    return Task(metadata, folder.instruction, folder.source, make, folder.note)


def identify(task: str | Path) -> tuple[str, str] | None:
    """A task's name and the fingerprint of its data, as its scores have them; None where it is not here."""
    folder = Path(task)
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    state = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _identity(task, *state)


@lru_cache(maxsize=1024)
def _identity(task: str | Path, *state: object) -> tuple[str, str] | None:
    """As :func:`identify`: a folder is read once for each state of its files."""
    try:
        opened = open_task(task)
    except (DataError, ConfigError):
        return None
    return opened.name, opened.source.sha256


def _named(name: str, sample: int | None) -> Task:
    known = _look_up(name)
    about = known.metadata
    if about.modalities != ["text"]:
        raise DataError(name, f"is an mteb task on {', '.join(about.modalities)}", "name a task on text alone")
    if sample is not None:
        raise ConfigError(
            "sample", sample, f"{name} is an mteb task, and only task folders are sampled", "run it whole"
        )
    source = Fingerprint(about.name, sha256(_revision(known).encode()).hexdigest(), 0, str(about.license or ""))
    return Task(about, _instruction(known), source, lambda: _download(name))


def _look_up(name: str) -> AbsTask:
    """An mteb task without its data, each time a new one."""
    benchmark, _, own = name.rpartition("/")
    try:
        if not benchmark:
            return mteb.get_task(own)
        members = {task.metadata.name: task for task in mteb.get_benchmark(benchmark).tasks}
        return copy.deepcopy(members[own])
    except KeyError as error:
        near = str(error).partition("Did you mean: ")[2].strip("\"'?")
        hint = f"did you mean {near}?" if near else "give a task folder, or the name of an mteb task or benchmark"
        raise DataError(name, "is neither a task folder nor the name of an mteb task", hint) from None


def parts_of(task: AbsTask) -> list[AbsTask]:
    """The tasks that an aggregate task is the mean of, those that mteb runs; any other task alone."""
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def _instruction(task: AbsTask) -> str:
    """What mteb says for the task, else for its type; an aggregate has that of its parts."""
    first = parts_of(task)[0]
    prompt = first.metadata.prompt
    own = prompt.get("query", "") if isinstance(prompt, dict) else prompt
    return str(own or first.abstask_prompt)


def _revision(task: AbsTask) -> str:
    """Which data a task reads: data sets at their revisions, with the splits and languages that it takes."""
    told = []
    for part in parts_of(task):
        data = part.metadata.dataset
        told.append(f"{data['path']}@{data['revision']} {sorted(part.eval_splits)} {sorted(part.hf_subsets)}")
    return "\n".join(told)


def _download(name: str) -> AbsTask:
    """An mteb task with its data, which mteb fetches from the Hub or finds in the cache there."""
    task = _look_up(name)
    try:
        for part in parts_of(task):
            part.load_data()
    except Exception as error:  # whatever the Hub, the cache, the network or the data set's own code raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        problem = f"mteb cannot load its data ({type(error).__name__}: {reason})"
        raise DataError(name, problem, "go online, or give a task folder") from error
    return task


def count_samples(task: AbsTask) -> int:
    """How many rows a loaded task is scored on: pairs, texts or, for retrieval and reranking, queries."""
    return sum(
        _count(part, subset, split)
        for part in parts_of(task)
        for subset in part.hf_subsets
        for split in part.eval_splits
    )


def _count(task: AbsTask, subset: str, split: str) -> int:
    data = task.dataset.get(subset, task.dataset)[split]
    if isinstance(task, AbsTaskRetrieval):
        return sum(1 for query in data["queries"]["id"] if data["relevant_docs"].get(query))
    rows = len(data)
    if isinstance(task, AbsTaskPairClassification) and rows == 1:
        return len(data[0][task.label_column_name])  # mteb's older data sets: all pairs in one row
    if isinstance(task, AbsTaskClustering):
        if task.max_fraction_of_documents_to_embed is not None:
            return int(task.max_fraction_of_documents_to_embed * rows)
        return min(rows, task.max_document_to_embed or rows)
    return rows


@dataclass(frozen=True)
class _Kind:
    """A type of task folder in mteb's terms. ``aliases`` are the paper's and sentence-transformers' metric names."""

    mteb_type: str
    base: type[AbsTask]
    main: str
    metrics: frozenset[str]
    data: Callable[[TaskFolder], Any]
    settings: Callable[[TaskFolder], dict[str, Any]] = lambda folder: {}
    aliases: Mapping[str, str] | None = None


def _metric(folder: TaskFolder, kind: _Kind) -> str:
    metric = (kind.aliases or {}).get(folder.metric, folder.metric) or kind.main
    if metric not in kind.metrics:
        hint = f"one of {', '.join(sorted(kind.metrics))}"
        raise DataError(folder.path / "task.json", f"{folder.type} has no metric {metric!r}", hint, field="metric")
    if metric in ("ap", "ap_weighted") and len({row["label"] for row in folder.tables["test"]}) != 2:
        raise DataError(folder.path / "task.json", f"{metric} needs exactly two labels", "accuracy", field="metric")
    return metric


def _metadata(folder: TaskFolder, kind: _Kind) -> TaskMetadata:
    prompt = {"query": folder.instruction} if kind.base is AbsTaskRetrieval else folder.instruction
    return TaskMetadata(
        name=folder.name,
        type=kind.mteb_type,
        category="t2c" if kind.base in (AbsTaskClassification, AbsTaskClustering) else "t2t",
        description=" ".join(filter(None, [folder.notes or folder.name, f"Licence: {folder.source.licence or '?'}."])),
        dataset={"path": folder.path.name, "revision": folder.source.sha256},
        eval_splits=["test"],
        eval_langs=["und-Zyyy"],  # a task folder does not say its language
        main_score=_metric(folder, kind),
        prompt=prompt if folder.instruction else None,
        is_public=False,
    )


def _local_task(folder: TaskFolder, kind: _Kind, metadata: TaskMetadata) -> AbsTask:
    """An mteb task whose data is in memory already."""
    task = type(f"Local{kind.mteb_type}", (kind.base,), {"metadata": metadata, **kind.settings(folder)})()
    task.dataset = kind.data(folder)
    task.data_loaded = True
    return task


def _dataset(rows: tuple[Row, ...], **columns: str) -> Dataset:
    """Rows as columns; ``columns`` are mteb's names and those of the folder."""
    return Dataset.from_dict({column: [row[own] for row in rows] for column, own in columns.items()})


def _columns(**columns: str) -> Callable[[TaskFolder], DatasetDict]:
    return lambda folder: DatasetDict({split: _dataset(rows, **columns) for split, rows in folder.tables.items()})


def _classification_data(folder: TaskFolder) -> DatasetDict:
    """Labels become integers, as mteb wants them, in the order of their names."""
    numbers = {label: i for i, label in enumerate(sorted({row["label"] for row in folder.tables["train"]}))}
    numbered = {
        split: tuple({"text": row["text"], "label": numbers[row["label"]]} for row in rows)
        for split, rows in folder.tables.items()
    }
    return DatasetDict({split: _dataset(rows, text="text", label="label") for split, rows in numbered.items()})


def _retrieval_data(folder: TaskFolder) -> dict[str, dict[str, RetrievalSplitData]]:
    relevant: dict[str, dict[str, int]] = {}
    for row in folder.tables["qrels"]:
        relevant.setdefault(row["query"], {})[row["document"]] = row["score"]
    split = RetrievalSplitData(
        corpus=_dataset(folder.tables["corpus"], id="_id", title="title", text="text"),
        queries=_dataset(folder.tables["queries"], id="_id", text="text"),
        relevant_docs=relevant,
        top_ranked=None,
    )
    return {"default": {"test": split}}


def _reranking_data(folder: TaskFolder) -> dict[str, dict[str, RetrievalSplitData]]:
    """Each query with its own candidates. The ids put positives first where scores tie, as mteb's reranking does."""
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    for number, row in enumerate(folder.tables["test"]):
        query = f"test_query{number}"
        queries[query] = row["query"]
        relevant[query] = {}
        for prefix, texts, score in (("apositive", row["positive"], 1), ("negative", row["negative"], 0)):
            for i, text in enumerate(texts):
                document = f"{prefix}_{query}_{i:05}"
                corpus[document] = text
                relevant[query][document] = score
    split = RetrievalSplitData(
        corpus=Dataset.from_dict({"id": list(corpus), "title": [""] * len(corpus), "text": list(corpus.values())}),
        queries=Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
        relevant_docs=relevant,
        top_ranked={query: list(documents) for query, documents in relevant.items()},
    )
    return {"default": {"test": split}}


def _clustering_settings(folder: TaskFolder) -> dict[str, Any]:
    rows = folder.tables["test"]
    usual = int(AbsTaskClustering.max_fraction_of_documents_to_embed * len(rows))
    few = usual < TEXTS_PER_CLUSTER * len({row["label"] for row in rows})
    return {"max_fraction_of_documents_to_embed": None} if folder.sampled or few else {}


def _summarization_settings(folder: TaskFolder) -> dict[str, Any]:
    scores = [score for row in folder.tables["test"] for score in row["relevance"]]
    return {"min_score": min(scores), "max_score": max(scores)}


def _names(prefixes: str, metrics: str) -> frozenset[str]:
    return frozenset(f"{prefix}_{metric}" for prefix in prefixes.split() for metric in metrics.split())


_CORRELATIONS = frozenset({"pearson", "spearman"})
_CUTOFFS = " ".join(f"at_{k}" for k in AbsTaskRetrieval.k_values)
_RANKINGS = _names("ndcg map recall precision mrr hit_rate", _CUTOFFS)
_KINDS: dict[str, _Kind] = {
    "sts": _Kind(
        "STS",
        AbsTaskSTS,
        "cosine_spearman",
        _CORRELATIONS | _names("cosine manhattan euclidean", "pearson spearman"),
        _columns(sentence1="sentence1", sentence2="sentence2", score="score"),
    ),
    "pair_classification": _Kind(
        "PairClassification",
        AbsTaskPairClassification,
        "max_ap",
        _names("max similarity cosine manhattan euclidean dot", "accuracy f1 precision recall ap"),
        _columns(sentence1="sentence1", sentence2="sentence2", labels="label"),
    ),
    "classification": _Kind(
        "Classification",
        AbsTaskClassification,
        "accuracy",
        frozenset({"accuracy", "ap", "ap_weighted", "f1", "precision", "recall"})
        | _names("f1 precision recall", "weighted"),
        _classification_data,
    ),
    "clustering": _Kind(
        "Clustering",
        AbsTaskClustering,
        "v_measure",
        frozenset({"v_measure", "ami"}),
        _columns(sentences="text", labels="label"),
        _clustering_settings,
    ),
    "retrieval": _Kind(
        "Retrieval",
        AbsTaskRetrieval,
        "ndcg_at_10",
        _RANKINGS,
        _retrieval_data,
        lambda folder: {"ignore_identical_ids": folder.ignore_identical_ids},
    ),
    "reranking": _Kind(
        "Reranking",
        AbsTaskRetrieval,
        "map_at_1000",
        _RANKINGS,
        _reranking_data,
        aliases={"map": "map_at_1000", "mrr": "mrr_at_1000"},
    ),
    "summarization": _Kind(
        "Summarization",
        AbsTaskSummarization,
        "cosine_spearman",
        _CORRELATIONS | _names("cosine dot", "pearson spearman"),
        _columns(
            text="text",
            human_summaries="human_summaries",
            machine_summaries="machine_summaries",
            relevance="relevance",
        ),
        _summarization_settings,
    ),
}
