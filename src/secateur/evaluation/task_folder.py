"""Task folders and files: somebody's own evaluation data, checked before anything is encoded.

A task folder holds ``task.json`` and the files of its ``type``: :data:`.FIELDS` has their columns, and
``docs/reference/data.md`` explains them. ``task.json`` may also have ``name`` (default: the folder's), ``metric``
(default: mteb's main score of the type), ``instruction``, ``licence``, ``notes`` and ``caution`` (stands beside each
score); of retrieval also ``ignore_identical_ids`` (true: a document does not answer the query of its own id, as in
ArguAna); other keys are for people. :mod:`.task_formats` has what needs no ``task.json``.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.rows import TABLES, Row
from secateur.data.sources import read_beside, stem
from secateur.errors import DataError
from secateur.evaluation.task_formats import ABOUT, read_content
from secateur.evaluation.task_tables import FIELDS, metric_of
from secateur.files import read_json
from secateur.options import CheckTasksOptions, step
from secateur.provenance import Fingerprint, fingerprint

Tables = Mapping[str, tuple[Row, ...]]

TRAIN_PER_LABEL = 8
"""A sampled classification task keeps so many training texts of each label: what mteb fits one classifier on."""
DISTRACTORS_PER_QUERY = 4
"""A sampled retrieval task keeps, besides all judged documents of its queries, so many others for each query."""
LONGEST_NAME = 120
_FILE_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")


@dataclass(frozen=True)
class TaskFolder:
    """A checked task folder or file.

    ``what`` is its format in words; ``tables`` has the rows by file; ``note`` is what a reader of its scores must know.
    """

    path: Path
    name: str
    type: str
    metric: str
    instruction: str
    notes: str
    tables: Tables
    source: Fingerprint
    sampled: bool = False
    ignore_identical_ids: bool = False
    note: str = ""
    what: str = ""


def read_task_folder(path: str | Path) -> TaskFolder:
    """Read and check a task folder or file.

    Raises:
        DataError: With file, line and field: something is missing or broken, or the rows make no task of this type.
    """
    place = Path(path)
    about = _read_about(place)
    content = read_content(place, about["type"])
    content.check()
    metric = metric_of(content.type, about["metric"], place / ABOUT, content.tables)
    ignore = about["ignore_identical_ids"]
    if ignore is not None and (not isinstance(ignore, bool) or (ignore and content.type != "retrieval")):
        problem = f"is {ignore!r:.60} in a task of type {content.type}"
        raise DataError(place / ABOUT, problem, "true or false, of retrieval", field="ignore_identical_ids")
    digest = hashlib.sha256(f"{content.type} {about['metric']}\n".encode())
    if ignore:
        digest.update(b"ignore_identical_ids\n")
    for name, file in sorted(content.files.items()):
        digest.update(f"{name} {fingerprint(file, 0).sha256}\n".encode())
    tables = {name: tuple(table.rows) for name, table in content.tables.items()}
    rows = len(tables.get("test") or tables["queries"])
    identical = _note_on_identical_ids(tables) if content.type == "retrieval" and ignore is None else ""
    return TaskFolder(
        path=place,
        **{key: about[key] for key in ("name", "instruction", "notes")},
        type=content.type,
        metric=metric,
        tables=tables,
        source=Fingerprint(about["name"], digest.hexdigest(), rows, about["licence"]),
        ignore_identical_ids=bool(ignore),
        note="; ".join(filter(None, [about["caution"], *content.notes, identical])),
        what=content.what,
    )


def texts_of(task: TaskFolder) -> list[str]:
    """The distinct texts of a task's rows, in their order; labels and ids are none."""
    found: dict[str, None] = {}
    for name, rows in task.tables.items():
        for row in rows if name != "qrels" else ():
            for column, value in row.items():
                if column not in ("_id", "label", "title", "relevance", "score"):
                    found |= dict.fromkeys(text for text in (value if isinstance(value, list) else [value]) if text)
    return list(found)


def _read_about(place: Path) -> dict[str, Any]:
    """``task.json``, or the JSON file beside a data file, with defaults."""
    if not place.exists():
        raise DataError(place, "no such file or folder")
    file = place / ABOUT
    content: Any = read_json(file, strict=True) if file.is_file() else {}
    if place.is_file() and place.name.endswith(TABLES):  # as beside training data
        beside = read_beside(place)
        content = {"instruction": beside.get("query_instruction", ""), "licence": beside.get("licence", "")}
    if not isinstance(content, dict):
        raise DataError(file, "is not a JSON object", 'write {"type": ...}')
    about: dict[str, Any] = dict.fromkeys(("name", "type", "metric", "instruction", "licence", "notes", "caution"), "")
    about["name"] = stem(place) if place.is_file() else place.resolve().name
    for key in tuple(about):
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or (key in ("name", "type") and not value.strip()):
            raise DataError(file, f"is {value!r:.60}, not a text", field=key)
        about[key] = value.strip()
    if len(about["name"]) > LONGEST_NAME or not _FILE_NAME.fullmatch(about["name"]):
        problem = f"{about['name']!r:.60} cannot be a part of file names"
        where = file if "name" in content else place
        raise DataError(where, problem, f"at most {LONGEST_NAME} characters, no slash, no dot in front", field="name")
    if about["type"] not in ("", *FIELDS):
        raise DataError(file, f"unknown type {about['type']!r}", f"one of {', '.join(FIELDS)}", field="type")
    about["ignore_identical_ids"] = content.get("ignore_identical_ids")
    return about


def _note_on_identical_ids(tables: Tables) -> str:
    """A note on queries that are documents too, under the same id: each finds itself first."""
    corpus = {row["_id"]: row["text"] for row in tables["corpus"]}
    same = sum(corpus.get(row["_id"]) == row["text"] for row in tables["queries"])
    many = "1 query is" if same == 1 else f"{same} queries are"
    note = f'{many} in the corpus under the same id: "ignore_identical_ids": true in task.json leaves out these hits'
    return note if same else ""


# Samples --------------------------------------------------------------------------------------------------------------


def sample_task(task: TaskFolder, count: int, seed: int) -> TaskFolder:
    """Draw at most ``count`` test rows by ``seed``; what is drawn depends on nothing else.

    Classification, clustering and pair classification are drawn in proportion to their labels, at least one row of
    each; training rows likewise, at least :data:`TRAIN_PER_LABEL`. Retrieval draws ``count`` judged queries, keeps
    *all* documents judged for them, and :data:`DISTRACTORS_PER_QUERY` others for each query, so that its score is
    higher than the full one, and comparable only with scores on the same sample.
    """
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    if task.type == "retrieval":
        tables = _sample_retrieval(task.tables, count, rng)
    elif task.type in ("classification", "clustering", "pair_classification"):
        least = {"train": TRAIN_PER_LABEL, "test": 1}
        tables = {name: _stratified(rows, count, least[name], rng) for name, rows in sorted(task.tables.items())}
    else:
        tables = {"test": _draw(task.tables["test"], count, rng)}
    if task.type == "sts" and len({row["score"] for row in tables["test"]}) < 2:
        raise DataError(task.path, f"a sample of {count} has one score only", "take a larger sample")
    complete = all(len(tables[name]) == len(rows) for name, rows in task.tables.items())
    return task if complete else replace(task, tables=tables, sampled=True)


def _draw(rows: Sequence[Row], count: int, rng: random.Random) -> tuple[Row, ...]:
    """``count`` rows at random, in their order."""
    return tuple(rows[i] for i in sorted(rng.sample(range(len(rows)), min(count, len(rows)))))


def _stratified(rows: Sequence[Row], count: int, least: int, rng: random.Random) -> tuple[Row, ...]:
    """``count`` rows in proportion to their labels, but ``least`` of each, where it has so many.

    The r-th row drawn of a label with n rows stands at (r + 1/2) / n; the first ``count`` rows of all are taken.
    """
    order: list[tuple[float, int]] = []
    by_label: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        by_label.setdefault(row["label"], []).append(index)
    for _, indices in sorted(by_label.items()):
        rng.shuffle(indices)
        order += [(-1.0 if rank < least else (rank + 0.5) / len(indices), i) for rank, i in enumerate(indices)]
    forced = sum(position < 0 for position, _ in order)
    return tuple(rows[i] for i in sorted(i for _, i in sorted(order)[: max(count, forced)]))


def _sample_retrieval(tables: Tables, count: int, rng: random.Random) -> dict[str, tuple[Row, ...]]:
    if count >= len(tables["queries"]):  # all of them are judged
        return dict(tables)
    queries = _draw(tables["queries"], count, rng)
    ids = {row["_id"] for row in queries}
    qrels = tuple(row for row in tables["qrels"] if row["query-id"] in ids)
    needed = {row["corpus-id"] for row in qrels}
    others = _draw([row for row in tables["corpus"] if row["_id"] not in needed], DISTRACTORS_PER_QUERY * count, rng)
    kept = needed | {row["_id"] for row in others}
    return {"corpus": tuple(r for r in tables["corpus"] if r["_id"] in kept), "queries": queries, "qrels": qrels}


# Checks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskCheck:
    """One folder or file, looked at.

    Attributes:
        path: As it was named.
        problem: What is wrong, with file, line and column; empty where it is a task, and all else is empty otherwise.
        what: Its format in words.
        name: What scores will call the task.
        type: Of the task.
        metric: By which it is scored, as mteb calls it.
        counts: Of its rows, by what they are.
        instruction: Goes before each query, or text, of models that take instructions.
        notes: What stands beside each score of the task.
    """

    path: str
    problem: str = ""
    what: str = ""
    name: str = ""
    type: str = ""
    metric: str = ""
    counts: Mapping[str, int] | None = None
    instruction: str = ""
    notes: str = ""


@step(CheckTasksOptions)
def check_tasks(options: CheckTasksOptions) -> list[TaskCheck]:
    """Read task folders and files as ``evaluate`` does, and say what each is, or what is wrong with it.

    Returns:
        One check for each, in their order; a broken task is no error, but has a ``problem``.
    """
    checks = []
    for path in options.tasks:
        try:
            task = read_task_folder(path)
        except DataError as error:
            checks.append(TaskCheck(str(path), problem=str(error)))
            continue
        shared = {key: getattr(task, key) for key in ("what", "name", "type", "metric", "instruction")}
        checks.append(TaskCheck(str(path), counts=_counts(task), notes=task.note, **shared))
    return checks


def _counts(task: TaskFolder) -> dict[str, int]:
    tables = task.tables
    if task.type == "retrieval":
        relevant = sum(row["score"] > 0 for row in tables["qrels"])
        return {"queries": len(tables["queries"]), "documents": len(tables["corpus"]), "relevant": relevant}
    rows = {"sts": "pairs", "pair_classification": "pairs", "reranking": "queries"}.get(task.type, "texts")
    counts = {"training texts": len(tables["train"])} if "train" in tables else {}
    counts[rows] = len(tables["test"])
    if "label" in tables["test"][0]:
        counts["labels"] = len({row["label"] for row in tables["test"]})
    return counts
