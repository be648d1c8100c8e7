"""Evaluation tasks: a task folder or file, or what mteb knows by a name, as a task that mteb itself scores.

A benchmark is the list of its tasks, each named ``BENCHMARK/TASK``: a benchmark may take a part of a task's languages
and splits. Metrics and protocol are mteb's, with one exception: clustering embeds 4 % of the texts, and all of them
where that would be fewer than :data:`TEXTS_PER_CLUSTER` for each label, or where the task was sampled already.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from secateur.data.rows import Row
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import TaskFolder, read_task_folder, sample_task
from secateur.provenance import Fingerprint

TEXTS_PER_CLUSTER = 10


@dataclass(frozen=True)
class Task:
    """One task, checked and ready, with mteb's description of it.

    ``instruction`` says what the texts or queries are encoded for; ``source`` is of the data before sampling. ``make``
    gives a fresh mteb task, for each model its own: a clustering task draws on from its random state. ``note`` is what
    a reader of its scores must know.
    """

    metadata: TaskMetadata
    instruction: str
    source: Fingerprint
    make: Callable[[], AbsTask]
    note: str = ""

    @property
    def name(self) -> str:
        return str(self.metadata.name)

    @property
    def asymmetric(self) -> bool:
        """Whether queries and documents differ, so that an instruction is for the queries alone."""
        return str(self.metadata.simplified_task_type) == "retrieval"


def expand(tasks: Sequence[str | Path]) -> list[str | Path]:
    """Tasks with each benchmark's name replaced by the names of its tasks, in its order."""
    expanded: list[str | Path] = []
    for task in tasks:
        try:
            known = [] if Path(task).exists() else mteb.get_benchmark(str(task)).tasks
        except KeyError:
            known = []
        expanded += [f"{task}/{own.metadata.name}" for own in known] or [task]
    return expanded


def open_task(task: str | Path, *, sample: int | None = None, seed: int = 42) -> Task:
    """Open a task folder or file, or a text task of mteb, or of one of its benchmarks, by its name.

    Of folders and files, at most ``sample`` test rows are drawn by ``seed`` (:func:`.sample_task`).

    Raises:
        DataError: The folder is not right, or mteb has no text task of that name.
        ConfigError: A sample is asked of an mteb task.
    """
    if not Path(task).exists():
        return _named_task(str(task), sample)
    folder = read_task_folder(task)
    metadata = _metadata(folder)
    sampled = folder if sample is None else sample_task(folder, sample, seed)
    return Task(metadata, folder.instruction, folder.source, lambda: _local_task(sampled, metadata), folder.note)


def open_tasks(tasks: Sequence[str | Path | Task], sample: int | None, seed: int) -> list[Task]:
    """Open all tasks that are not open yet; benchmarks are expanded, and names must differ.

    Raises:
        DataError, ConfigError: As :func:`open_task`; or two have one name.
    """
    opened: list[Task] = []
    for task in tasks:
        opened += [task] if isinstance(task, Task) else [open_task(t, sample=sample, seed=seed) for t in expand([task])]
    names = [task.name for task in opened]
    if twice := [name for name in names if names.count(name) > 1]:
        hint = 'change "name" in one task.json, or rename it'
        raise ConfigError("tasks", tasks, f"two tasks are called {twice[0]}", hint)
    return opened


# mteb's own tasks -----------------------------------------------------------------------------------------------------


def _named_task(name: str, sample: int | None) -> Task:
    known = _look_up(name)
    about, parts = known.metadata, parts_of(known)
    if about.modalities != ["text"]:
        raise DataError(name, f"is an mteb task on {', '.join(about.modalities)}", "name a task on text alone")
    if sample is not None:
        problem = f"{name} is an mteb task, and only task folders are sampled"
        raise ConfigError("sample", sample, problem, "run it whole")
    data = [  # sets at their revisions, with the splits and languages that it takes
        f"{part.metadata.dataset['path']}@{part.metadata.dataset['revision']} "
        f"{sorted(part.eval_splits)} {sorted(part.hf_subsets)}"
        for part in parts
    ]
    prompt = parts[0].metadata.prompt  # what mteb says for the task, else for its type; an aggregate has its parts'
    own = prompt.get("query", "") if isinstance(prompt, dict) else prompt
    source = Fingerprint(about.name, sha256("\n".join(data).encode()).hexdigest(), 0, str(about.license or ""))
    return Task(about, str(own or parts[0].abstask_prompt), source, lambda: _download(name))


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


def parts_of(task: AbsTask) -> list[AbsTask]:
    """The tasks that an aggregate task is the mean of, those that mteb runs; any other task alone."""
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def splits_of(task: AbsTask) -> list[tuple[str, str, Any]]:
    """Split, subset and rows of all that a loaded task is scored on, in mteb's order."""
    pairs = itertools.product(task.eval_splits, task.hf_subsets)
    return [(split, subset, task.dataset.get(subset, task.dataset)[split]) for split, subset in pairs]


def count_samples(task: AbsTask) -> int:
    """How many rows a loaded task has: pairs, texts or queries that are judged."""
    total = 0
    for part in parts_of(task):
        for _, _, data in splits_of(part):
            is_retrieval = isinstance(part, AbsTaskRetrieval)
            total += sum(map(bool, data["relevant_docs"].values())) if is_retrieval else len(data)
    return total


# Task folders ---------------------------------------------------------------------------------------------------------


_TYPES: dict[str, tuple[str, type[AbsTask], dict[str, str]]] = {
    "sts": ("STS", AbsTaskSTS, {}),
    "pair_classification": ("PairClassification", AbsTaskPairClassification, {"label": "labels"}),
    "classification": ("Classification", AbsTaskClassification, {}),
    "clustering": ("Clustering", AbsTaskClustering, {"text": "sentences", "label": "labels"}),
    "retrieval": ("Retrieval", AbsTaskRetrieval, {"_id": "id"}),
    "reranking": ("Reranking", AbsTaskRetrieval, {"_id": "id"}),
    "summarization": ("Summarization", AbsTaskSummarization, {}),
}
"""Type of a task folder → mteb's name and class of it, and the columns that mteb calls otherwise."""


def _metadata(folder: TaskFolder) -> TaskMetadata:
    kind, base, _ = _TYPES[folder.type]
    prompt = {"query": folder.instruction} if base is AbsTaskRetrieval else folder.instruction
    return TaskMetadata(
        name=folder.name,
        type=kind,
        category="t2c" if folder.type in ("classification", "clustering") else "t2t",
        description=" ".join(filter(None, [folder.notes or folder.name, f"Licence: {folder.source.licence or '?'}."])),
        dataset={"path": folder.path.name, "revision": folder.source.sha256},
        eval_splits=["test"],
        eval_langs=["und-Zyyy"],  # a task folder does not say its language
        main_score=folder.metric,
        prompt=prompt if folder.instruction else None,
        is_public=False,
    )


def _local_task(folder: TaskFolder, metadata: TaskMetadata) -> AbsTask:
    """An mteb task whose data is in memory already."""
    kind, base, names = _TYPES[folder.type]
    settings: dict[str, Any] = {"metadata": metadata}
    tables: dict[str, list[Row]] = {name: list(rows) for name, rows in folder.tables.items()}
    if folder.type == "clustering":
        usual = int(AbsTaskClustering.max_fraction_of_documents_to_embed * len(tables["test"]))
        if folder.sampled or usual < TEXTS_PER_CLUSTER * len({row["label"] for row in tables["test"]}):
            settings["max_fraction_of_documents_to_embed"] = None
    elif folder.type == "classification":  # mteb wants integers, here in the order of the labels' names
        numbers = {label: i for i, label in enumerate(sorted({row["label"] for row in tables["train"]}))}
        tables = {name: [{**row, "label": numbers[row["label"]]} for row in rows] for name, rows in tables.items()}
    elif folder.type == "retrieval":
        settings["ignore_identical_ids"] = folder.ignore_identical_ids
    elif folder.type == "summarization":
        scores = [score for row in tables["test"] for score in row["relevance"]]
        settings |= {"min_score": min(scores), "max_score": max(scores)}
    elif folder.type == "reranking":
        tables = _candidates(tables["test"])
    task = type(f"Local{kind}", (base,), settings)()
    data = {name: Dataset.from_list(rows).rename_columns(names) for name, rows in tables.items() if name != "qrels"}
    if base is AbsTaskRetrieval:
        relevant: dict[str, dict[str, int]] = {}
        for row in tables["qrels"]:
            relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
        ranked = {query: list(own) for query, own in relevant.items()} if folder.type == "reranking" else None
        task.dataset = {"default": {"test": RetrievalSplitData(**data, relevant_docs=relevant, top_ranked=ranked)}}
    else:
        task.dataset = DatasetDict(data)
    task.data_loaded = True
    return task


def _candidates(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Retrieval's tables, each query with its own documents, all judged.

    Their ids are those of mteb's reranking, which put positives last where scores tie.
    """
    tables: dict[str, list[Row]] = {"corpus": [], "queries": [], "qrels": []}
    for number, row in enumerate(rows):
        query = f"test_query{number}"
        tables["queries"].append({"_id": query, "text": row["query"]})
        for column, prefix, score in (("positive", "apositive", 1), ("negative", "negative", 0)):
            for i, text in enumerate(row[column]):
                document = f"{prefix}_{query}_{i:05}"
                tables["corpus"].append({"_id": document, "title": "", "text": text})
                tables["qrels"].append({"query-id": query, "corpus-id": document, "score": score})
    return tables
