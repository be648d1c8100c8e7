"""Task folders: somebody's own evaluation data, checked before anything is encoded.

A task folder holds ``task.json`` and the files of its ``type``: :data:`_FIELDS` has their columns, and
``docs/reference/data.md`` explains them. ``task.json`` may also have ``name`` (default: the folder's), ``metric``
(default: mteb's main score of the type), ``instruction``, ``licence`` and ``notes``; of retrieval also
``ignore_identical_ids`` (true: a document does not answer the query of its own id, as in ArguAna); other
keys are for people. A folder without
``task.json`` that holds BEIR's files is a retrieval task. Each ``.jsonl`` may be a ``.jsonl.gz``.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.rows import (
    Fields,
    Row,
    as_binary,
    as_id,
    as_label,
    as_number,
    as_text,
    as_text_or_empty,
    list_of,
    parse_row,
    read_lines,
    read_rows,
)
from secateur.errors import DataError
from secateur.files import check_is_file, read_json
from secateur.provenance import Fingerprint, fingerprint

Tables = Mapping[str, tuple[Row, ...]]

TRAIN_PER_LABEL = 8
"""A sampled classification task keeps so many training texts of each label: what mteb fits one classifier on."""
DISTRACTORS_PER_QUERY = 4
"""A sampled retrieval task keeps, besides all judged documents of its queries, so many others for each query."""
LONGEST_NAME = 120
MISTAKES_TOLD = 5
_FILE_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")
_JUDGMENT = re.compile(r"[-+]?[0-9]{1,9}")
QRELS_HEADER = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class TaskFolder:
    """A checked task folder.

    ``tables`` has the rows by file; ``metric`` is empty where ``task.json`` names none; ``note`` is what a reader of
    its scores must know.
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


def read_task_folder(path: str | Path) -> TaskFolder:
    """Read and check a task folder.

    Raises:
        DataError: With file, line and field: a file is missing or broken, a column is missing, a value has the wrong
            type, a text is empty, an id is unknown or occurs twice, or the rows do not make a task of this type.
    """
    folder = Path(path)
    about = _read_about(folder)
    fields = _FIELDS[about["type"]]
    tables = {name: _read_table(file, fields[name]) for name, file in _files(folder, about["type"])}
    _check_tables(about["type"], tables)
    ignore = about["ignore_identical_ids"]
    digest = hashlib.sha256(f"{about['type']} {about['metric']}\n".encode())
    if ignore:
        digest.update(b"ignore_identical_ids\n")
    for name, table in sorted(tables.items()):
        digest.update(f"{name} {fingerprint(table.file, 0).sha256}\n".encode())
    main = tables.get("test") or tables["queries"]
    return TaskFolder(
        path=folder,
        **{key: about[key] for key in ("name", "type", "metric", "instruction", "notes")},
        tables={name: tuple(table.rows) for name, table in tables.items()},
        source=Fingerprint(about["name"], digest.hexdigest(), len(main.rows), about["licence"]),
        ignore_identical_ids=bool(ignore),
        note=_note_on_identical_ids(tables) if about["type"] == "retrieval" and ignore is None else "",
    )


def check_task_folder(path: str | Path) -> None:
    """Refuse what is no task folder, by ``task.json`` and the names of its files alone.

    Raises:
        DataError: As :func:`read_task_folder`.
    """
    for _, file in _files(Path(path), _read_about(Path(path))["type"]):
        check_is_file(file)


def texts_of(task: TaskFolder) -> list[str]:
    """The distinct texts of a task's rows, in their order; labels and ids are none."""
    found: dict[str, None] = {}
    for name, rows in task.tables.items():
        for row in rows if name != "qrels" else ():
            for column, value in row.items():
                if column not in ("_id", "label", "title", "relevance", "score"):
                    found |= dict.fromkeys(text for text in (value if isinstance(value, list) else [value]) if text)
    return list(found)


def _files(folder: Path, type_: str) -> Iterator[tuple[str, Path]]:
    """The files of a task of this type, by the names of their tables."""
    for name in _FIELDS[type_]:
        endings = ("qrels.tsv", "qrels/test.tsv") if name == "qrels" else (f"{name}.jsonl", f"{name}.jsonl.gz")
        plain, other = (folder / ending for ending in endings)
        if name != "qrels" and plain.exists() and other.exists():
            raise DataError(plain, f"stands beside {other.name}", "remove one of the two")
        yield name, other if other.exists() and not plain.exists() else plain


def _read_about(folder: Path) -> dict[str, Any]:
    """``task.json``, with its defaults."""
    file = folder / "task.json"
    if folder.is_dir() and not file.is_file():
        if not (folder / "qrels" / "test.tsv").is_file():
            raise DataError(folder, "has no task.json", 'a task folder has a task.json with at least {"type": ...}')
        content: Any = {"type": "retrieval"}
    else:
        content = read_json(file, strict=True)
    if not isinstance(content, dict):
        raise DataError(file, "is not a JSON object", 'write {"type": ...}')
    about: dict[str, Any] = {"name": folder.resolve().name, "metric": "", "instruction": "", "licence": "", "notes": ""}
    for key in (*about, "type"):
        value = content.get(key, about.get(key))
        if value is None and key in about:
            continue
        if not isinstance(value, str) or (key in content and key in ("name", "type") and not value.strip()):
            problem = "is missing" if key not in content else f"is {value!r}, not a text"
            raise DataError(file, problem, field=key)
        about[key] = value.strip()
    if len(about["name"]) > LONGEST_NAME or not _FILE_NAME.fullmatch(about["name"]):
        problem = f"{about['name']!r:.60} cannot be a part of file names"
        raise DataError(file, problem, f"at most {LONGEST_NAME} characters, no slash, no dot in front", field="name")
    if about["type"] not in _FIELDS:
        raise DataError(file, f"unknown type {about['type']!r}", f"one of {', '.join(_FIELDS)}", field="type")
    about["ignore_identical_ids"] = ignore = content.get("ignore_identical_ids")
    if ignore is not None and (not isinstance(ignore, bool) or (ignore and about["type"] != "retrieval")):
        problem = f"is {ignore!r:.60} in a task of type {about['type']}"
        raise DataError(file, problem, "true or false, of retrieval", field="ignore_identical_ids")
    return about


@dataclass
class _Table:
    """The rows of one file, and the line of each."""

    file: Path
    lines: list[int]
    rows: list[dict[str, Any]]

    def error(self, index: int, problem: str, field: str | None = None) -> DataError:
        """The error of a row."""
        return DataError(self.file, problem, line=self.lines[index], field=field)

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Leave out the other rows."""
        kept = [index for index, row in enumerate(self.rows) if wanted(row)]
        self.lines, self.rows = [self.lines[i] for i in kept], [self.rows[i] for i in kept]


def _raise_first(mistakes: Sequence[DataError]) -> None:
    """Raise the first of several mistakes in a file, if any; it names the lines of the others."""
    if mistakes:
        first, others = mistakes[0], [str(mistake.line) for mistake in mistakes[1:]]
        if others:
            more = f" and {len(others) - MISTAKES_TOLD} more" if len(others) > MISTAKES_TOLD else ""
            lines = f"line{'s' if len(others) > 1 else ''} {', '.join(others[:MISTAKES_TOLD])}{more}"
            first.args = (f"{first}; {lines} is not valid either",)
        raise first


def _read_table(file: Path, fields: Fields) -> _Table:
    table, mistakes = _Table(file, [], []), []
    for line, row in _judgments(file) if file.suffix == ".tsv" else read_rows(file):
        try:
            table.rows.append(parse_row(file, line, row, fields, optional=("title",)))
            table.lines.append(line)
        except DataError as error:
            mistakes.append(error)
    _raise_first(mistakes)
    if not table.rows:
        raise DataError(file, "has no rows")
    return table


def _judgments(file: Path) -> Iterator[tuple[int, Row]]:
    for line, text in read_lines(file):
        cells = text.rstrip("\r\n").split("\t", 2)
        if line == 1 and tuple(cells) != QRELS_HEADER:
            raise DataError(file, "is not the header", f"write {'<tab>'.join(QRELS_HEADER)}", line=1)
        if line > 1 and text.strip():
            yield line, dict(zip(QRELS_HEADER, cells, strict=False))


def _judgment(value: str) -> int:
    """A relevance judgment; scores below 0, as TREC has them, are "not relevant", like 0."""
    if not _JUDGMENT.fullmatch(value.strip()):
        raise ValueError(f"is {value!r:.60}, not an integer of at most 9 digits")
    return max(0, int(value))


_PAIR: Fields = {"sentence1": as_text, "sentence2": as_text}
_LABELLED: Fields = {"text": as_text, "label": as_label}
_TEXTS, _NUMBERS = list_of(as_text), list_of(as_number)
_FIELDS: dict[str, dict[str, Fields]] = {
    "sts": {"test": {**_PAIR, "score": as_number}},
    "pair_classification": {"test": {**_PAIR, "label": as_binary}},
    "classification": {"train": _LABELLED, "test": _LABELLED},
    "clustering": {"test": _LABELLED},
    "retrieval": {
        "corpus": {"_id": as_id, "title": as_text_or_empty, "text": as_text_or_empty},
        "queries": {"_id": as_id, "text": as_text},
        "qrels": {"query-id": str, "corpus-id": str, "score": _judgment},
    },
    "reranking": {"test": {"query": as_text, "positive": _TEXTS, "negative": _TEXTS}},
    "summarization": {
        "test": {"text": as_text, "human_summaries": _TEXTS, "machine_summaries": _TEXTS, "relevance": _NUMBERS}
    },
}
"""Type → file → its columns."""
_VARIED = {
    "sts": ("test", "score"),
    "pair_classification": ("test", "label"),
    "classification": ("train", "label"),
    "clustering": ("test", "label"),
}
"""Type → the file and column that must have two values at least."""


# Checks of whole tables -----------------------------------------------------------------------------------------------


def _check_tables(type_: str, tables: dict[str, _Table]) -> None:
    """Refuse rows that make no task of this type; of retrieval, leave out what mteb would not encode either."""
    if type_ == "retrieval":
        return _check_retrieval(tables)
    mistakes: list[DataError] = []
    test = tables["test"]
    if type_ in _VARIED:  # with one value, the metrics are undefined or always perfect
        name, column = _VARIED[type_]
        if len({row[column] for row in tables[name].rows}) < 2:
            problem = f"is {tables[name].rows[0][column]!r} in every row"
            raise DataError(tables[name].file, problem, "two or more", field=column)
    if type_ == "classification":
        known, where = {row["label"] for row in tables["train"].rows}, f"does not occur in {tables['train'].file.name}"
        unknown = [index for index, row in enumerate(test.rows) if row["label"] not in known]
        mistakes = [test.error(index, f"{test.rows[index]['label']!r} {where}", "label") for index in unknown]
    elif type_ == "reranking":
        for index, row in enumerate(test.rows):
            if both := [text for text in row["negative"] if text in row["positive"]]:
                mistakes.append(test.error(index, f'"{both[0]:.60}" is a positive of this query, too', "negative"))
    elif type_ == "summarization":
        for index, row in enumerate(test.rows):
            if len(row["relevance"]) != len(row["machine_summaries"]):
                problem = f"has {len(row['relevance'])} numbers for {len(row['machine_summaries'])} machine summaries"
                mistakes.append(test.error(index, problem, "relevance"))
        if not mistakes and all(len(set(row["relevance"])) < 2 for row in test.rows):
            raise DataError(test.file, "is constant within every row", field="relevance")
    return _raise_first(mistakes)


def _check_retrieval(tables: dict[str, _Table]) -> None:
    """Check the ids, and leave out queries without judgments, and documents that have neither title nor text.

    BEIR's ``queries.jsonl`` has those of all splits; mteb, too, encodes only those that are judged. A model of which no
    token is asked may answer anything, even NaN. Where the judgments call an empty document relevant (Cranfield's do),
    it stays a relevant document that no model can find.
    """
    corpus, queries, qrels = tables["corpus"], tables["queries"], tables["qrels"]
    for table, columns in ((corpus, ("_id",)), (queries, ("_id",)), (qrels, QRELS_HEADER[:2])):
        seen: set[tuple[str, ...]] = set()
        keys = [tuple(row[column] for column in columns) for row in table.rows]
        twice = [index for index, key in enumerate(keys) if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        _raise_first([table.error(index, f"{', '.join(map(repr, keys[index]))} occurs twice") for index in twice])
    known = {"query-id": queries, "corpus-id": corpus}
    ids = {column: {row["_id"] for row in table.rows} for column, table in known.items()}
    mistakes = []
    for index, row in enumerate(qrels.rows):
        for column in [column for column in known if row[column] not in ids[column]][:1]:
            mistakes.append(qrels.error(index, f"{row[column]!r} is not in {known[column].file.name}", column))
    _raise_first(mistakes)
    if not any(row["score"] for row in qrels.rows):
        raise DataError(qrels.file, "calls no document relevant", "one score at least is above 0", field="score")
    judged = {row["query-id"] for row in qrels.rows}
    corpus.keep(lambda row: bool((row["title"] + row["text"]).strip()))
    queries.keep(lambda row: row["_id"] in judged)


def _note_on_identical_ids(tables: Mapping[str, _Table]) -> str:
    """A note on queries that are documents too, under the same id: each finds itself first."""
    corpus = {row["_id"]: row["text"] for row in tables["corpus"].rows}
    same = sum(corpus.get(row["_id"]) == row["text"] for row in tables["queries"].rows)
    many = "1 query is" if same == 1 else f"{same} queries are"
    note = f'{many} in the corpus under the same id: "ignore_identical_ids": true in task.json leaves out these hits'
    return note if same else ""


# Samples --------------------------------------------------------------------------------------------------------------


def sample_task(task: TaskFolder, count: int, seed: int) -> TaskFolder:
    """Draw at most ``count`` test rows by ``seed``; what is drawn depends on nothing else.

    Classification, clustering and pair classification are drawn in proportion to their labels, at least one row of
    each, so a task with more labels than ``count`` gets as many rows as labels. Training rows are drawn likewise, at
    least :data:`TRAIN_PER_LABEL` of each label. Retrieval draws ``count`` judged queries, keeps *all* documents judged
    for them, and :data:`DISTRACTORS_PER_QUERY` others for each query: fewer documents to be confused by, so a sampled
    retrieval score is higher than the full one, and comparable only with scores on the same sample.
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
