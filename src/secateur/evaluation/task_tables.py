"""What a task is made of: the columns and metrics of each type, rows that know where they stand, and their checks.

Nothing here needs mteb, so that a mistake is told before it is imported.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.data.rows import (
    CELLS,
    Fields,
    Place,
    Row,
    as_binary,
    as_id,
    as_label,
    as_number,
    as_text,
    as_text_or_empty,
    error_at,
    list_of,
    parse_row,
    read_rows,
)
from secateur.errors import DataError

_JUDGMENT = re.compile(r"([-+]?[0-9]{1,9})(\.0+)?")


def _as_judgment(value: Any) -> int:
    """A relevance judgment; scores below 0, as TREC has them, are "not relevant", like 0."""
    if not (found := _JUDGMENT.fullmatch(str(value).strip())):
        raise ValueError(f"is {value!r:.60}, not an integer of at most 9 digits")
    return max(0, int(found[1]))


_PAIR: Fields = {"sentence1": as_text, "sentence2": as_text}
_LABELLED: Fields = {"text": as_text, "label": as_label}
_TEXTS, _NUMBERS = list_of(as_text), list_of(as_number)


def _as_texts(value: Any) -> list[str]:
    """A text, a list of texts, or nothing."""
    given = [] if value in (None, "") else value if isinstance(value, list) else [value]
    return list(map(as_text, given))


ANSWERED: Fields = {"query": as_text, "positive": _as_texts, "negative": _as_texts}
"""Queries with texts that answer them, and others that do not."""
QRELS = ("query-id", "corpus-id", "score")
FIELDS: dict[str, dict[str, Fields]] = {
    "sts": {"test": {**_PAIR, "score": as_number}},
    "pair_classification": {"test": {**_PAIR, "label": as_binary}},
    "classification": {"train": _LABELLED, "test": _LABELLED},
    "clustering": {"test": _LABELLED},
    "retrieval": {
        "corpus": {"_id": as_id, "title": as_text_or_empty, "text": as_text_or_empty},
        "queries": {"_id": as_id, "text": as_text},
        "qrels": dict(zip(QRELS, (as_id, as_id, _as_judgment), strict=True)),
    },
    "reranking": {"test": {"query": as_text, "positive": _TEXTS, "negative": _TEXTS}},
    "summarization": {
        "test": {"text": as_text, "human_summaries": _TEXTS, "machine_summaries": _TEXTS, "relevance": _NUMBERS}
    },
}
"""Type → file → its columns."""
OTHER_NAMES = {
    "_id": ("id",),
    "query-id": ("query_id", "qid"),
    "corpus-id": ("corpus_id", "doc-id", "doc_id", "docid"),
    "sentence1": ("sentence_1", "sentence_a", "text1", "text_a"),
    "sentence2": ("sentence_2", "sentence_b", "text2", "text_b"),
    "score": ("similarity", "similarity_score", "relatedness_score", "relevance", "label"),
    "query": ("anchor", "question", "user_input"),
    "positive": ("positives", "reference_contexts"),
    "negative": ("negatives",),
}
"""Column → what else files call it; the first that is there counts."""
_VARIED = {
    "sts": ("test", "score"),
    "pair_classification": ("test", "label"),
    "classification": ("train", "label"),
    "clustering": ("test", "label"),
}
"""Type → the file and column that must have two values at least."""


# Metrics --------------------------------------------------------------------------------------------------------------


def _names(prefixes: str, metrics: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_{metric}" for prefix in prefixes.split() for metric in metrics.split())


CUTOFFS = (1, 3, 5, 10, 20, 100, 1000)
"""mteb's, for retrieval and reranking."""
_CORRELATIONS = ("pearson", "spearman")
_RANKS = _names("ndcg map recall precision mrr hit_rate", " ".join(f"at_{k}" for k in CUTOFFS))
METRICS: dict[str, tuple[str, ...]] = {
    "sts": ("cosine_spearman", *_CORRELATIONS, *_names("cosine manhattan euclidean", "pearson spearman")),
    "pair_classification": (
        "max_ap",
        *_names("max similarity cosine manhattan euclidean dot", "accuracy f1 precision recall ap"),
    ),
    "classification": (
        *("accuracy", "ap", "ap_weighted", "f1", "precision", "recall"),
        *_names("f1 precision recall", "weighted"),
    ),
    "clustering": ("v_measure", "ami"),
    "retrieval": ("ndcg_at_10", *_RANKS),
    "reranking": ("map_at_1000", *_RANKS),
    "summarization": ("cosine_spearman", *_CORRELATIONS, *_names("cosine dot", "pearson spearman")),
}
"""Type → mteb's metrics of it, the default first."""
_RERANKING = {"map": "map_at_1000", "mrr": "mrr_at_1000"}
"""What the paper and sentence-transformers call the metrics of reranking."""


def metric_of(type_: str, wanted: str, file: Path, tables: Mapping[str, Table]) -> str:
    """A metric by mteb's name, or the default one of the type where none is wanted.

    Raises:
        DataError: The type has no such metric, or it is none for these labels; ``file`` is where it is asked for.
    """
    metric = _RERANKING.get(wanted, wanted) if type_ == "reranking" else wanted
    if metric and metric not in METRICS[type_]:
        hint = f"one of {', '.join(sorted(set(METRICS[type_])))}"
        raise DataError(file, f"{type_} has no metric {metric!r}", hint, field="metric")
    if metric in ("ap", "ap_weighted") and len({row["label"] for row in tables["test"].rows}) != 2:
        raise DataError(file, f"{metric} needs exactly two labels", "accuracy", field="metric")
    return metric or METRICS[type_][0]


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """The rows of one file, and the place of each; rows that were made of others have none."""

    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def error(self, row: int, problem: str, column: str | None = None) -> DataError:
        """The error of a row, by its number."""
        return error_at(self.file, self.places[row], problem, field=column)


def read_table(
    file: Path,
    fields: Fields,
    rows: Iterable[tuple[Place, Row]] | None = None,
    *,
    optional: Collection[str] = ("title",),
) -> Table:
    """Rows, by default those of the file, whose columns are checked, and called as in :data:`FIELDS`.

    Raises:
        DataError: One is broken, or there are none.
    """
    table = Table(file)
    of_cells = file.name.lower().endswith(CELLS)
    parsers = {name: _of_cell(parse) if of_cells else parse for name, parse in fields.items()}
    seen: Collection[str] = ()
    for place, row in read_rows(file) if rows is None else rows:
        if row.keys() != seen:  # rows are mostly alike
            seen = row.keys()
            there = {column_of(row, role): role for role in fields}
            columns = {column: parsers[role] for column, role in there.items()}
        found = parse_row(file, place, row, columns, optional=optional)
        table.places.append(place)
        table.rows.append({there[column]: value for column, value in found.items()})
    if not table.rows:
        raise DataError(file, "has no rows")
    return table


def column_of(row: Row, role: str) -> str:
    """The column of a row that has a role; the role's own name where there is none."""
    return next((name for name in (role, *OTHER_NAMES.get(role, ())) if name in row), role)


def _of_cell(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same parser for a cell of CSV or TSV, where numbers and lists, as Python and JSON write them, are texts."""

    def parse_cell(cell: str | None) -> Any:
        value: Any = cell
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            if parse in (as_number, as_binary):
                value = float(cell or "")
            elif parse in (_TEXTS, _NUMBERS, _as_texts) and (cell or "").strip().startswith("["):
                value = ast.literal_eval(cell or "")
        return parse(value)

    return parse_cell


# Checks of whole tables -----------------------------------------------------------------------------------------------


@dataclass
class Content:
    """A task as it was read.

    Attributes:
        what: The format of its files, in words.
        type: Of the task.
        files: By name.
        tables: The rows, by name.
        notes: What a reader of its scores must know.
    """

    what: str
    type: str
    files: dict[str, Path]
    tables: dict[str, Table]
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse rows that make no task of this type; of retrieval, leave out what mteb would not encode either.

        Raises:
            DataError: With the place of the first mistake.
        """
        if self.type == "retrieval":
            self._check_ids()
            self._leave_out()
            return
        if self.type in _VARIED:  # with one value, the metrics are undefined or always perfect
            name, column = _VARIED[self.type]
            table = self.tables[name]
            if len({row[column] for row in table.rows}) < 2:
                raise DataError(table.file, f"is {table.rows[0][column]!r} in every row", "two or more", field=column)
        test = self.tables["test"]
        known = {row["label"] for row in self.tables["train"].rows} if self.type == "classification" else set()
        for index, row in enumerate(test.rows):
            if self.type == "classification" and row["label"] not in known:
                problem = f"{row['label']!r} does not occur in {self.tables['train'].file.name}"
                raise test.error(index, problem, "label")
            if self.type == "reranking" and (both := [text for text in row["negative"] if text in row["positive"]]):
                raise test.error(index, f'"{both[0]:.60}" is a positive of this query, too', "negative")
            if self.type == "summarization" and len(row["relevance"]) != len(row["machine_summaries"]):
                problem = f"has {len(row['relevance'])} numbers for {len(row['machine_summaries'])} machine summaries"
                raise test.error(index, problem, "relevance")
        if self.type == "summarization" and all(len(set(row["relevance"])) < 2 for row in test.rows):
            raise DataError(test.file, "is constant within every row", field="relevance")

    def _check_ids(self) -> None:
        """Refuse ids that occur twice, judgments of what is not there, and no document that is relevant."""
        for name, columns in (("corpus", ("_id",)), ("queries", ("_id",)), ("qrels", QRELS[:2])):
            table, first = self.tables[name], dict[tuple[str, ...], int]()
            for index, row in enumerate(table.rows):
                key = tuple(row[column] for column in columns)
                if (before := first.setdefault(key, index)) != index:
                    where = f"line {place}" if isinstance(place := table.places[before], int) else place
                    raise table.error(index, f"{', '.join(map(repr, key))} occurs twice (first: {where})")
        qrels = self.tables["qrels"]
        ids = {name: {row["_id"] for row in self.tables[name].rows} for name in ("queries", "corpus")}
        for index, row in enumerate(qrels.rows):
            for column, name in (("query-id", "queries"), ("corpus-id", "corpus")):
                if row[column] not in ids[name]:
                    file = self.tables[name].file
                    where = name if file == qrels.file else file.name
                    raise qrels.error(index, f"{row[column]!r} is not in {where}", column)
        if not any(row["score"] for row in qrels.rows):
            raise DataError(qrels.file, "calls no document relevant", "one score at least is above 0", field="score")

    def _leave_out(self) -> None:
        """Leave out queries without judgments, and documents that have neither title nor text, and say so.

        mteb, too, encodes only queries that are judged. A model of which no token is asked may answer anything, even
        NaN. Where the judgments call an empty document relevant (Cranfield's do), it stays a relevant document that no
        model can find.
        """
        corpus, queries, qrels = (self.tables[name] for name in ("corpus", "queries", "qrels"))
        judged = {row["query-id"] for row in qrels.rows}
        if vain := len(judged) - len({row["query-id"] for row in qrels.rows if row["score"]}):
            what = "queries without a relevant document, which score 0 as in mteb"
            self.notes.append(f"{what}: {vain:,} of {len(judged):,}")
        documents = [row for row in corpus.rows if (row["title"] + row["text"]).strip()]
        if empty := len(corpus.rows) - len(documents):
            self.notes.append(f"documents without text, left out: {empty:,}")
        asked = [row for row in queries.rows if row["_id"] in judged]
        if unjudged := len(queries.rows) - len(asked):
            self.notes.append(f"queries without a judgment, left out: {unjudged:,} of {len(queries.rows):,}")
        self.tables |= {"corpus": Table(corpus.file, documents), "queries": Table(queries.file, asked)}
