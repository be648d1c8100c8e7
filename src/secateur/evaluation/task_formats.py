"""The types of tasks, and the files that people have of them, known by their names and columns and read as tables.

``docs/how-to/judge.md`` shows the formats. Nothing here needs mteb, so that a mistake is told before it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data.rows import (
    TABLES,
    TEXT,
    Fields,
    Place,
    Row,
    as_binary,
    as_id,
    as_label,
    as_number,
    as_number_list,
    as_text,
    as_text_list,
    as_text_or_empty,
    as_texts,
    error_at,
    parse_rows,
    read_rows,
)
from secateur.errors import DataError
from secateur.files import check_is_file, read_json

ABOUT = "task.json"
Check = Callable[[Row], tuple[str | None, str] | None]
"""What is wrong with a row, after the column that it is in."""
_JUDGMENT = re.compile(r"([-+]?[0-9]{1,9})(\.0+)?")


def _as_judgment(value: Any) -> int:
    """A relevance judgment; scores below 0, as TREC has them, are "not relevant", like 0."""
    if not (found := _JUDGMENT.fullmatch(str(value).strip())):
        raise ValueError(f"is {value!r:.60}, not an integer of at most 9 digits")
    return max(0, int(found[1]))


@dataclass(frozen=True)
class TaskType:
    """A type of tasks: mteb's default metric, a pattern of all its metrics, and its files with their columns."""

    metric: str
    metrics: str
    files: Mapping[str, Fields]


QRELS = ("query-id", "corpus-id", "score")
_PAIR: Fields = {"sentence1": as_text, "sentence2": as_text}
_LABELLED: Fields = {"text": as_text, "label": as_label}
_LISTS: Fields = {"query": as_text, "positive": as_text_list, "negative": as_text_list}
_SUMMARIES: Fields = {"text": as_text, "human_summaries": as_text_list, "machine_summaries": as_text_list}
_RETRIEVAL: dict[str, Fields] = {
    "corpus": {"_id": as_id, "title": as_text_or_empty, "text": as_text_or_empty},
    "queries": {"_id": as_id, "text": as_text},
    "qrels": dict(zip(QRELS, (as_id, as_id, _as_judgment), strict=True)),
}
_CORRELATION = r"({}_)?(pearson|spearman)"
_OF_PAIRS = r"(max|similarity|cosine|manhattan|euclidean|dot)_(accuracy|f1|precision|recall|ap)"
_OF_LABELS = r"accuracy|(ap|f1|precision|recall)(_weighted)?"
_OF_RANKS = r"(ndcg|map|recall|precision|mrr|hit_rate)_at_(1|3|5|10|20|100|1000)"
TYPES = {
    "sts": TaskType(
        "cosine_spearman",
        _CORRELATION.format("(cosine|manhattan|euclidean)"),
        {"test": {**_PAIR, "score": as_number}},
    ),
    "pair_classification": TaskType("max_ap", _OF_PAIRS, {"test": {**_PAIR, "label": as_binary}}),
    "classification": TaskType("accuracy", _OF_LABELS, {"train": _LABELLED, "test": _LABELLED}),
    "clustering": TaskType("v_measure", r"v_measure|ami", {"test": _LABELLED}),
    "retrieval": TaskType("ndcg_at_10", _OF_RANKS, _RETRIEVAL),
    "reranking": TaskType("map_at_1000", _OF_RANKS, {"test": _LISTS}),
    "summarization": TaskType(
        "cosine_spearman",
        _CORRELATION.format("(cosine|dot)"),
        {"test": {**_SUMMARIES, "relevance": as_number_list}},
    ),
}
NAMES = {
    "_id": ("_id", "id"),
    "query-id": ("query-id", "query_id", "qid"),
    "corpus-id": ("corpus-id", "corpus_id", "doc-id", "doc_id", "docid"),
    "sentence1": ("sentence1", "sentence_1", "sentence_a", "text1", "text_a"),
    "sentence2": ("sentence2", "sentence_2", "sentence_b", "text2", "text_b"),
    "score": ("score", "similarity", "similarity_score", "relatedness_score", "relevance", "label"),
    "query": ("query", "anchor", "question", "user_input"),
    "positive": ("positive", "positives", "reference_contexts"),
    "negative": ("negative", "negatives"),
}
"""What files call a column; the first that is there counts."""


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """A task as it was read: its format in words, its type, files and tables by name, and notes beside its scores."""

    what: str
    type: str
    files: Mapping[str, Path]
    tables: Mapping[str, Sequence[Row]]
    notes: Sequence[str] = ()


def _read_tables(
    type_: str, files: Mapping[str, Path], rows: Mapping[str, Iterable[tuple[Place, Row]]] | None = None
) -> dict[str, list[Row]]:
    """The tables of a type, by default from the rows of their files."""
    tables: dict[str, list[Row]] = {}
    for name, fields in TYPES[type_].files.items():
        given = read_rows(files[name]) if rows is None else rows[name]
        tables[name] = _read_table(files[name], fields, given, check=_check_of(type_, name, tables))
    return tables


def _read_table(
    file: Path,
    fields: Fields,
    rows: Iterable[tuple[Place, Row]],
    *,
    optional: Collection[str] = ("title",),
    check: Check = lambda row: None,
) -> list[Row]:
    """Rows whose columns are checked, and called as in :data:`TYPES`."""
    table: list[Row] = []
    for place, row in parse_rows(file, rows, fields, NAMES, optional=optional):
        if wrong := check(row):
            raise error_at(file, place, wrong[1], field=wrong[0])
        table.append(row)
    return table


def _check_of(type_: str, name: str, before: Mapping[str, Sequence[Row]]) -> Check:
    """The check of the rows of a table, on each other and on the tables that were read ``before``."""
    key = QRELS[:2] if name == "qrels" else ("_id",)
    known = {table: {row["label" if name == "test" else "_id"] for row in rows} for table, rows in before.items()}
    seen = set()

    def check(row: Row) -> tuple[str | None, str] | None:
        if type_ == "retrieval":
            if (own := tuple(row[column] for column in key)) in seen:
                return None, f"{', '.join(map(repr, own))} occurs twice"
            seen.add(own)
            for column, table in (("query-id", "queries"), ("corpus-id", "corpus")) if name == "qrels" else ():
                if row[column] not in known[table]:
                    return column, f"{row[column]!r} is not in {table}"
        elif type_ == "classification" and known and row["label"] not in known["train"]:
            return "label", f"{row['label']!r} does not occur in train"
        elif type_ == "reranking" and (both := [text for text in row["negative"] if text in row["positive"]]):
            return "negative", f'"{both[0]:.60}" is a positive of this query, too'
        elif type_ == "summarization" and len(row["relevance"]) != len(row["machine_summaries"]):
            numbers, summaries = len(row["relevance"]), len(row["machine_summaries"])
            return "relevance", f"has {numbers} numbers for {summaries} machine summaries"
        return None

    return check


# Formats --------------------------------------------------------------------------------------------------------------


def read_content(place: Path, type_: str = "") -> Content:
    """Read a file or folder in whatever format it is; ``type_`` is from ``task.json``, if it has one.

    Raises:
        DataError: It is nothing known; or a file that the type needs is missing; or the first mistake in one.
    """
    for read in (_separate_files, _dictionaries, _rows):
        if (found := read(place, type_)) is not None:
            _check_values(found)
            return found
    if type_ and place.is_dir():
        check_is_file(next(iter(_files(place, type_).values())))
    known = "query and positive; sentence1, sentence2 and score; or JSON with queries, corpus and relevant_docs"
    hint = f"expected are corpus, queries and qrels; rows of {known}"
    if (place / ABOUT).is_file():
        raise DataError(place / ABOUT, "is missing, and the files do not tell it", hint, field="type")
    raise DataError(
        place, f"has no {ABOUT}, and its files are none of a task" if place.is_dir() else "is no task", hint
    )


def _check_values(content: Content) -> None:
    """Refuse labels or scores that are all alike, by which the metrics would be undefined, or always perfect."""
    name, fields = next(iter(TYPES[content.type].files.items()))
    column = next((column for column in ("score", "label") if column in fields), "")
    values = {row[column] for row in content.tables[name]} if column else set()
    file = next(iter(content.files.values()))
    if len(values) == 1:
        raise DataError(file, f"is {values.pop()!r} in every row", "two or more", field=column)
    if content.type == "summarization" and all(len(set(row["relevance"])) == 1 for row in content.tables["test"]):
        raise DataError(file, "is the same for all summaries in each row", "two numbers in a row", field="relevance")
    if content.type == "retrieval" and not any(row["score"] for row in content.tables["qrels"]):
        file = content.files.get("qrels", file)
        raise DataError(file, "calls no document relevant", "one score at least is above 0", field="score")


def _files(folder: Path, type_: str) -> dict[str, Path]:
    """The files of a task of this type by the names of their tables, whether or not they are there."""
    files = {name: _table_file(folder / name) for name in TYPES[type_].files}
    if type_ == "retrieval" and not files["qrels"].exists():
        splits = [_table_file(folder / "qrels" / split) for split in ("test", "dev")]
        files["qrels"] = next((file for file in splits if file.exists()), folder / "qrels.tsv")
    return files


def _table_file(path: Path) -> Path:
    """The file of that name in one of the formats of tables; as JSON Lines where there is none."""
    found = [file for suffix in TABLES if (file := path.with_name(path.name + suffix)).exists()]
    if len(found) > 1:
        raise DataError(found[0], f"stands beside {found[1].name}", "remove one of the two")
    return found[0] if found else path.with_name(f"{path.name}.jsonl")


def _separate_files(folder: Path, type_: str) -> Content | None:
    """``task.json`` says the type; a folder without it that holds BEIR's files is a retrieval task."""
    kind = type_ or "retrieval"
    files = _files(folder, kind)
    if not any(file.exists() for name, file in files.items() if name != "queries"):
        return None
    dev = files["qrels"].name if kind == "retrieval" and files["qrels"].name.startswith("dev.") else ""
    notes = [f"judged by qrels/{dev}: there is no test split"] if dev else []
    return Content("task folder" if type_ else "BEIR folder", kind, files, _read_tables(kind, files), notes)


def _dictionaries(place: Path, type_: str) -> Content | None:
    """As LlamaIndex and sentence-transformers have them: one JSON file with three dictionaries, or three files."""
    files = {name: place / f"{name}.json" for name in ("queries", "corpus", "relevant_docs")}
    if type_ not in ("", "retrieval"):
        return None
    whole: Any
    if all(file.is_file() for file in files.values()):
        whole, homes = {name: read_json(file, strict=True) for name, file in files.items()}, files
    else:
        file = _only_file(place)
        whole = read_json(file, strict=True) if file is not None and file.suffix.lower() == ".json" else None
        if file is None or not isinstance(whole, dict):
            return None
        homes, files = dict.fromkeys(files, file), {"questions": file}
    for name, file in homes.items():
        if not isinstance(whole.get(name), dict):
            problem = (
                f"is a {type(whole[name]).__name__}" if name in whole else f"is missing; here is {[*whole]!s:.200}"
            )
            hint = 'a question set has {"queries": {id: text}, "corpus": {id: text}, "relevant_docs": {id: [id, ...]}}'
            raise DataError(file, problem, hint, field=name)

    def texts(name: str) -> Iterator[tuple[Place, Row]]:
        for key, value in whole[name].items():
            row = value if isinstance(value, dict) and name == "corpus" else {TEXT: value}
            yield f"{name}.{key}", {**row, "_id": key}

    def judgments() -> Iterator[tuple[Place, Row]]:
        for query, given in whole["relevant_docs"].items():
            own = given if isinstance(given, (dict, list)) else [given]
            for document, score in own.items() if isinstance(own, dict) else [(document, 1) for document in own]:
                yield f"relevant_docs.{query}", dict(zip(QRELS, (query, document, score), strict=True))

    rows = {"corpus": texts("corpus"), "queries": texts("queries"), "qrels": judgments()}
    tables = _read_tables("retrieval", {**homes, "qrels": homes["relevant_docs"]}, rows)
    return Content("question set (queries, corpus, relevant_docs)", "retrieval", files, tables)


def _rows(place: Path, type_: str) -> Content | None:
    """One file of rows: of queries with texts that answer them, or of pairs with a score."""
    file = _only_file(place)
    if file is None or type_ not in ("", "retrieval", "sts", "pair_classification"):
        return None
    first = next(_records(file), (0, {}))[1]
    has = {role for role, names in NAMES.items() if not first.keys().isdisjoint(names)}
    if has >= {"query", "positive"} and type_ in ("", "retrieval"):
        return _read_positives(file, "Ragas question set" if "user_input" in first else "queries with their positives")
    if has >= {"sentence1", "sentence2", "score"} and type_ != "retrieval":
        return _read_pairs(file, type_)
    if not first:
        raise DataError(file, "has no rows")
    problem = f"its columns are none of a task{f' of type {type_}' if type_ else ''}"
    hint = f"query and positive, or sentence1, sentence2 and score; here are {', '.join(first):.200}"
    raise DataError(file, problem, hint)


def _only_file(place: Path) -> Path | None:
    """The file itself; of a folder, the one file of data in it, or the one that is called test."""
    files = [place] if place.is_file() else [file for file in sorted(place.glob("[!.]*")) if file.name != ABOUT]
    files = [file for file in files if file.name.lower().endswith((*TABLES, ".json"))]
    tests = [file for file in files if file.name.startswith("test.")]
    return (tests if len(tests) == 1 else files if len(files) == 1 else [None])[0]


def _records(file: Path) -> Iterator[tuple[Place, Row]]:
    """The rows of a file, or the objects of a list in JSON."""
    if file.suffix.lower() != ".json":
        yield from read_rows(file)
        return
    content = read_json(file, strict=True)
    if not isinstance(content, list):
        raise DataError(file, f"holds a {type(content).__name__}, not a list or a question set")
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise error_at(file, f"[{number}]", f"holds a {type(row).__name__}, not an object")
        yield f"[{number}]", row


def _read_pairs(file: Path, type_: str) -> Content:
    """STS; where all scores are 0 or 1, pair classification. Of a file with several splits, the test split."""
    rows = list(_records(file))
    splits = {str(row.get("split")): None for _, row in rows}
    if len(splits) > 1:
        rows = [(place, row) for place, row in rows if row.get("split") == "test"]
    if not rows:
        raise DataError(file, f"has the splits {', '.join(splits):.200}", "one is called test", field="split")
    fields = {**_PAIR, "score": as_binary if type_ == "pair_classification" else as_number}
    table = _read_table(file, fields, rows)
    if type_ == "pair_classification" or (not type_ and {row["score"] for row in table} == {0, 1}):
        labelled = [{**{name: row[name] for name in _PAIR}, "label": int(row["score"])} for row in table]
        return Content("pairs with scores", "pair_classification", {"pairs": file}, {"test": labelled})
    return Content("pairs with scores", "sts", {"pairs": file}, {"test": table})


def _read_positives(file: Path, what: str) -> Content:
    """Retrieval among all positives and negatives, each text once."""
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    judged: dict[tuple[str, str], None] = {}
    without = same = 0
    fields: Fields = {**_LISTS, "positive": as_texts, "negative": as_texts}
    for row in _read_table(file, fields, _records(file), optional=("negative",)):
        others = [text for text in row["positive"] if text != row["query"]]
        without, same = without + (not row["positive"]), same + (len(others) < len(row["positive"]))
        for text in others:
            query = queries.setdefault(row["query"], f"q{len(queries)}")
            judged[query, documents.setdefault(text, f"d{len(documents)}")] = None
        for text in row["negative"]:
            documents.setdefault(text, f"d{len(documents)}")
    if not judged:
        raise DataError(file, "has no query with a positive")
    tables: dict[str, list[Row]] = {
        "corpus": [{"_id": id_, "text": text, "title": ""} for text, id_ in documents.items()],
        "queries": [{"_id": id_, "text": text} for text, id_ in queries.items()],
        "qrels": [dict(zip(QRELS, (*pair, 1), strict=True)) for pair in judged],
    }
    told = {"queries without a positive": without, "positives that are their own query": same}
    notes = [f"{what}, left out: {count:,}" for what, count in told.items() if count]
    return Content(what, "retrieval", {"pairs": file}, tables, notes)
