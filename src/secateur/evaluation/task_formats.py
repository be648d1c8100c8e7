"""The task files that people have, recognized by their names and columns, and read as the tables of a task.

Each format is one function: given a file or a folder, it reads what is there, or returns None. ``docs/how-to/judge.md``
shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.data.rows import TABLES, TEXT, Place, Row, error_at, read_rows
from secateur.errors import DataError
from secateur.evaluation.task_tables import ANSWERED, FIELDS, QRELS, Content, Table, column_of, read_table
from secateur.files import check_is_file, read_json

ABOUT = "task.json"
_DICTIONARIES = ("queries", "corpus", "relevant_docs")


def read_content(place: Path, type_: str = "") -> Content:
    """Read a file or folder in whatever format it is; ``type_`` is from ``task.json``.

    Raises:
        DataError: It is nothing known; or a file that the type needs is missing; or the first mistake in one.
    """
    for read in (_a_file_for_each_table, _dictionaries, _rows):
        if (found := read(place, type_)) is not None:
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


# A file for each table, as BEIR has them ------------------------------------------------------------------------------


def _files(folder: Path, type_: str) -> dict[str, Path]:
    """The files of a task of this type by the names of their tables, whether or not they are there."""
    files = {name: _table_file(folder / name) for name in FIELDS[type_]}
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


def _a_file_for_each_table(folder: Path, type_: str) -> Content | None:
    """``task.json`` says the type; a folder without it that holds BEIR's files is a retrieval task."""
    kind = type_ or "retrieval"
    files = _files(folder, kind)
    if not any(file.exists() for name, file in files.items() if name != "queries"):
        return None
    tables = {name: read_table(file, FIELDS[kind][name]) for name, file in files.items()}
    content = Content("task folder" if type_ else "BEIR folder", kind, files, tables)
    if kind == "retrieval" and files["qrels"].parent != folder:
        if files["qrels"].name.startswith("dev."):
            content.notes.append(f"judged by qrels/{files['qrels'].name}: there is no test split")
        if len(list(files["qrels"].parent.iterdir())) > 1:  # queries without judgments are those of other splits
            judged, queries = {row["query-id"] for row in tables["qrels"].rows}, tables["queries"]
            own = [index for index, row in enumerate(queries.rows) if row["_id"] in judged]
            rows, places = [queries.rows[i] for i in own], [queries.places[i] for i in own]
            tables["queries"] = Table(queries.file, rows, places)
    return content


# queries, corpus and relevant_docs, as LlamaIndex and sentence-transformers have them ---------------------------------


def _dictionaries(place: Path, type_: str) -> Content | None:
    """One JSON file with three dictionaries, or three files with one each."""
    if type_ not in ("", "retrieval"):
        return None
    files = homes = {name: place / f"{name}.json" for name in _DICTIONARIES}
    if all(file.is_file() for file in homes.values()):
        whole = {name: read_json(file, strict=True) for name, file in homes.items()}
    else:
        file = _only_file(place)
        whole = read_json(file, strict=True) if file is not None and file.suffix.lower() == ".json" else []
        if file is None or isinstance(whole, list):
            return None
        files, homes = {"questions": file}, dict.fromkeys(_DICTIONARIES, file)
        if missing := [name for name in _DICTIONARIES if not isinstance(whole, dict) or name not in whole]:
            there = ", ".join(whole) if isinstance(whole, dict) else f"a {type(whole).__name__}"
            raise DataError(file, f"lacks {', '.join(missing)}", f"here is {there:.200}")
    for name, file in homes.items():
        if not isinstance(whole[name], dict):
            hint = "query id: list of document ids" if name == "relevant_docs" else "id: text"
            raise DataError(file, f"is a {type(whole[name]).__name__}, not {{{hint}, ...}}", field=name)

    def texts(name: str) -> Iterator[tuple[Place, Row]]:
        for key, value in whole[name].items():
            row = value if isinstance(value, dict) and name == "corpus" else {TEXT: value}
            yield f"{name}.{key}", {**row, "_id": key}

    def judgments() -> Iterator[tuple[Place, Row]]:
        for query, given in whole["relevant_docs"].items():
            own = given if isinstance(given, (dict, list)) else [given]
            for document, score in own.items() if isinstance(own, dict) else [(document, 1) for document in own]:
                yield f"relevant_docs.{query}", dict(zip(QRELS, (query, document, score), strict=True))

    fields = FIELDS["retrieval"]
    tables = {name: read_table(homes[name], fields[name], texts(name)) for name in ("corpus", "queries")}
    tables["qrels"] = read_table(homes["relevant_docs"], fields["qrels"], judgments())
    return Content("question set (queries, corpus, relevant_docs)", "retrieval", files, tables)


# Rows of queries and positives, or of pairs with scores ---------------------------------------------------------------


def _rows(place: Path, type_: str) -> Content | None:
    """One file of rows: of queries with texts that answer them, or of pairs with a score."""
    file = _only_file(place)
    if file is None or type_ not in ("", "retrieval", "sts", "pair_classification"):
        return None
    first = next(_records(file), (0, {}))[1]
    has = {role for role in ("query", "positive", "sentence1", "sentence2", "score") if column_of(first, role) in first}
    if has >= {"query", "positive"} and type_ in ("", "retrieval"):
        return _read_positives(file, "Ragas question set" if "user_input" in first else "queries with their positives")
    if has >= {"sentence1", "sentence2", "score"} and type_ != "retrieval":
        return _read_pairs(file, type_)
    there = ", ".join(map(str, first))
    hint = f"query and positive, or sentence1, sentence2 and score; here are {there:.200}"
    of_type = f" of type {type_}" if type_ else ""
    raise DataError(file, f"its columns are none of a task{of_type}" if first else "has no rows", hint if first else "")


def _only_file(place: Path) -> Path | None:
    """The file itself; of a folder, the one file of data in it, or the one that is called test."""
    files = [place] if place.is_file() else [file for file in sorted(place.iterdir()) if file.name != ABOUT]
    files = [file for file in files if file.name.lower().endswith((*TABLES, ".json"))]
    tests = [file for file in files if file.name.startswith("test.")]
    return (tests if len(tests) == 1 else files if len(files) == 1 else [None])[0]


def _records(file: Path) -> Iterator[tuple[Place, Row]]:
    """The rows of a file, or the objects of a list in JSON."""
    if file.suffix.lower() != ".json":
        yield from read_rows(file)
        return
    for number, row in enumerate(read_json(file, strict=True)):
        if not isinstance(row, dict):
            raise error_at(file, f"[{number}]", f"holds a {type(row).__name__}, not an object")
        yield f"[{number}]", row


def _read_pairs(file: Path, type_: str) -> Content:
    """STS; where all scores are 0 or 1, pair classification. Of a file with several splits, the test split."""
    rows = list(_records(file))
    tested = [(place, row) for place, row in rows if row.get("split") == "test"]
    table = read_table(file, FIELDS["sts"]["test"], tested or rows)
    kind = type_ or ("pair_classification" if {row["score"] for row in table.rows} == {0, 1} else "sts")
    if kind == "pair_classification":
        for index, row in enumerate(table.rows):
            if row["score"] not in (0, 1):
                raise table.error(index, "is not 0 or 1", "score")
        table.rows = [{**row, "label": int(row.pop("score"))} for row in table.rows]
    return Content("pairs with scores", kind, {"pairs": file}, {"test": table})


def _read_positives(file: Path, what: str) -> Content:
    """Retrieval among all positives and negatives, each text once."""
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    judged: dict[tuple[str, str], int] = {}
    without = same = 0
    for row in read_table(file, ANSWERED, _records(file), optional=("negative",)).rows:
        others = [text for text in row["positive"] if text != row["query"]]
        without, same = without + (not row["positive"]), same + (len(others) < len(row["positive"]))
        for text in others:
            query = queries.setdefault(row["query"], f"q{len(queries)}")
            judged[query, documents.setdefault(text, f"d{len(documents)}")] = 1
        for text in row["negative"]:
            documents.setdefault(text, f"d{len(documents)}")
    if not judged:
        raise DataError(file, "has no query with a positive")
    made: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"_id": id_, "text": text, "title": ""} for text, id_ in documents.items()],
        "queries": [{"_id": id_, "text": text} for text, id_ in queries.items()],
        "qrels": [dict(zip(QRELS, (*pair, score), strict=True)) for pair, score in judged.items()],
    }
    told = {"queries without a positive": without, "positives that are their own query": same}
    notes = [f"{what}, left out: {count:,}" for what, count in told.items() if count]
    return Content(
        what, "retrieval", {"pairs": file}, {name: Table(file, table) for name, table in made.items()}, notes
    )
