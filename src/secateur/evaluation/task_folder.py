"""Task folders: somebody's own evaluation data, checked before anything is encoded.

A task folder holds ``task.json`` and, by its ``type``:

======================= ======================================================================================
``sts``                 ``test.jsonl``: ``sentence1``, ``sentence2``, ``score`` (a number)
``pair_classification`` ``test.jsonl``: ``sentence1``, ``sentence2``, ``label`` (0 or 1)
``classification``      ``train.jsonl`` and ``test.jsonl``: ``text``, ``label`` (a text, a number, true or false)
``clustering``          ``test.jsonl``: ``text``, ``label``
``retrieval``           BEIR's ``corpus.jsonl`` (``_id``, ``title`` where there is one, ``text``), ``queries.jsonl``
                        (``_id``, ``text``) and ``qrels.tsv`` or ``qrels/test.tsv`` (header ``query-id``,
                        ``corpus-id``, ``score``; a score below 1 is "not relevant", as for trec_eval)
``reranking``           ``test.jsonl``: ``query``, ``positive`` and ``negative`` (lists of texts)
``summarization``       ``test.jsonl``: ``text``, ``human_summaries``, ``machine_summaries`` (lists of texts),
                        ``relevance`` (one number for each machine summary)
======================= ======================================================================================

``task.json`` has ``type`` and may have ``name`` (default: the folder's), ``metric`` (default: mteb's main score of the
type), ``instruction``, ``licence`` and ``notes``; of retrieval also ``ignore_identical_ids`` (true: a document does not
answer the query of its own id, as in ArguAna); other keys are for people. A folder without ``task.json`` that holds
BEIR's files is a retrieval task. Each ``.jsonl`` may be a ``.jsonl.gz``.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.jsonl import read_json_lines
from secateur.errors import DataError
from secateur.files import check_is_file, read_json
from secateur.provenance import Fingerprint, fingerprint

Row = Mapping[str, Any]

TRAIN_PER_LABEL = 8
"""A sampled classification task keeps so many training texts of each label: what mteb fits one classifier on."""
DISTRACTORS_PER_QUERY = 4
"""A sampled retrieval task keeps, besides all judged documents of its queries, so many others for each query."""
LONGEST_NAME = 120
_FILE_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")
QRELS_HEADER = ("query-id", "corpus-id", "score")
QRELS = Path("qrels", "test.tsv")
"""Where BEIR keeps the judgments of the test split."""
_JUDGMENT = re.compile(r"[-+]?[0-9]{1,9}")
MISTAKES_TOLD = 5


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
    tables: Mapping[str, tuple[Row, ...]]
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
    tables = {stem: _read_table(folder, stem, columns) for stem, columns in _COLUMNS[about["type"]].items()}
    if about["type"] == "retrieval":
        tables["qrels"] = _read_qrels(_find_qrels(folder))
    _CHECKS[about["type"]](tables)
    ignore = about["ignore_identical_ids"]
    return TaskFolder(
        path=folder,
        name=about["name"],
        type=about["type"],
        metric=about["metric"],
        instruction=about["instruction"],
        notes=about["notes"],
        tables={stem: tuple(table.rows) for stem, table in tables.items()},
        source=_fingerprint(folder, about, tables),
        ignore_identical_ids=bool(ignore),
        note=_find_themselves(tables) if about["type"] == "retrieval" and ignore is None else "",
    )


def _find_themselves(tables: Mapping[str, _Table]) -> str:
    """A note on queries that are documents too, under the same id: each finds itself first."""
    corpus = {row["_id"]: row["text"] for row in tables["corpus"].rows}
    same = sum(corpus.get(row["_id"]) == row["text"] for row in tables["queries"].rows)
    if not same:
        return ""
    many = "1 query is" if same == 1 else f"{same} queries are"
    return f'{many} in the corpus under the same id: "ignore_identical_ids": true in task.json leaves out these hits'


def check_task_folder(path: str | Path) -> None:
    """Refuse what is no task folder, by ``task.json`` and the names of its files alone.

    Raises:
        DataError: As :func:`read_task_folder`.
    """
    folder = Path(path)
    about = _read_about(folder)
    for stem in _COLUMNS[about["type"]]:
        check_is_file(_find(folder, stem))
    if about["type"] == "retrieval":
        check_is_file(_find_qrels(folder))


def _read_about(folder: Path) -> dict[str, Any]:
    """``task.json``, with its defaults."""
    file = folder / "task.json"
    if folder.is_dir() and not file.is_file():
        if not (folder / QRELS).is_file():
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
    if about["type"] not in _COLUMNS:
        raise DataError(file, f"unknown type {about['type']!r}", f"one of {', '.join(_COLUMNS)}", field="type")
    about["ignore_identical_ids"] = ignore = content.get("ignore_identical_ids")
    if ignore is not None and (not isinstance(ignore, bool) or (ignore and about["type"] != "retrieval")):
        problem = f"is {ignore!r:.60} in a task of type {about['type']}"
        raise DataError(file, problem, "true or false, of retrieval", field="ignore_identical_ids")
    return about


@dataclass(frozen=True)
class _Table:
    """The rows of one file, and the line of each."""

    file: Path
    lines: list[int]
    rows: list[dict[str, Any]]

    def error(self, index: int, problem: str, hint: str = "", field: str | None = None) -> DataError:
        return DataError(self.file, problem, hint, line=self.lines[index], field=field)

    def only(self, is_kept: Callable[[Row], bool]) -> _Table:
        """The table with some of its rows."""
        kept = [index for index, row in enumerate(self.rows) if is_kept(row)]
        return _Table(self.file, [self.lines[i] for i in kept], [self.rows[i] for i in kept])


def _find(folder: Path, stem: str) -> Path:
    plain, packed = folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"
    if plain.exists() and packed.exists():
        raise DataError(plain, f"stands beside {packed.name}", "remove one of the two")
    return packed if packed.exists() else plain


def _find_qrels(folder: Path) -> Path:
    return folder / QRELS if not (folder / "qrels.tsv").exists() and (folder / QRELS).exists() else folder / "qrels.tsv"


def _refuse(mistakes: Sequence[DataError]) -> None:
    """Raise the first of several mistakes in a file, if any; it names the lines of the others.

    Raises:
        DataError: There are any.
    """
    if not mistakes:
        return
    first, others = mistakes[0], [str(mistake.line) for mistake in mistakes[1:]]
    if others:
        more = f" and {len(others) - MISTAKES_TOLD} more" if len(others) > MISTAKES_TOLD else ""
        lines = f"line{'s' if len(others) > 1 else ''} {', '.join(others[:MISTAKES_TOLD])}{more}"
        first.args = (f"{first}; {lines} is not valid either",)
    raise first


def _read_table(folder: Path, stem: str, columns: _Columns) -> _Table:
    table = _Table(_find(folder, stem), [], [])
    mistakes: list[DataError] = []
    for line, row in read_json_lines(table.file):
        try:
            values = {column: _parsed(table.file, line, row, column, parse) for column, parse in columns.items()}
        except DataError as error:
            mistakes.append(error)
            continue
        table.lines.append(line)
        table.rows.append(values)
    _refuse(mistakes)
    if not table.rows:
        raise DataError(table.file, "has no rows")
    return table


def _parsed(file: Path, line: int, row: Row, column: str, parse: Callable[[Any], Any]) -> Any:
    if column not in row and column != "title":
        raise DataError(file, "is missing", f"the row has {', '.join(row)}", line=line, field=column)
    try:
        return parse(row.get(column))
    except ValueError as error:
        raise DataError(file, str(error), line=line, field=column) from None


def _read_qrels(file: Path) -> _Table:
    """Relevance judgments: a header and ``query-id``, ``corpus-id``, ``score`` (an integer) between tabs.

    Scores below 0, as TREC has them, are "not relevant", like 0.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(file, "no such file") from None
    except OSError as error:
        raise DataError(file, f"cannot be read ({error.strerror or error})") from None
    content = content.removeprefix(codecs.BOM_UTF8)
    table = _Table(file, [], [])
    mistakes: list[DataError] = []
    for number, raw in enumerate(content.splitlines(), start=1):
        try:
            cells = raw.decode("utf-8").split("\t")
        except UnicodeDecodeError:
            raise DataError(file, "is not UTF-8", line=number) from None
        if number == 1 and tuple(cells) != QRELS_HEADER:
            raise DataError(file, "is not the header", f"write {'<tab>'.join(QRELS_HEADER)}", line=1)
        if number == 1 or not raw.strip():
            continue
        if len(cells) != len(QRELS_HEADER):
            mistakes.append(DataError(file, f"has {len(cells)} columns, not 3", "put tabs between them", line=number))
        elif not _JUDGMENT.fullmatch(cells[2].strip()):
            problem = f"is {cells[2]!r:.60}, not an integer of at most 9 digits"
            mistakes.append(DataError(file, problem, line=number, field="score"))
        else:
            table.lines.append(number)
            table.rows.append({"query": cells[0], "document": cells[1], "score": max(0, int(cells[2]))})
    _refuse(mistakes)
    if not table.rows:
        raise DataError(file, "has no rows")
    return table


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {value!r:.60}, not a text")
    if not value.strip():
        raise ValueError("is an empty text")
    return value


def _text_or_empty(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"is {value!r:.60}, not a text")
    return value or ""


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"is {value!r:.60}, not a list of texts")
    if not value:
        raise ValueError("is an empty list")
    return [_text(item) for item in value]


def _number(value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float)):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            if math.isfinite(value):
                return float(value)
    raise ValueError(f"is {value!r:.60}, not a number")


def _numbers(value: Any) -> list[float]:
    if not isinstance(value, list):
        raise ValueError(f"is {value!r:.60}, not a list of numbers")
    return [_number(item) for item in value]


def _binary(value: Any) -> int:
    """0 or 1, also as false and true or, from a column that had gaps, as 0.0 and 1.0."""
    if not isinstance(value, (int, float)) or value not in (0, 1):
        raise ValueError(f"is {value!r:.60}, not 0 or 1")
    return int(value)


def _id(value: Any) -> str:
    """A text or an integer; 7.0 is 7, but beyond 2**53 several integers are the same float."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        if abs(value) >= 1 << 53:
            raise ValueError(f"is {value!r:.60}, a float too large to tell ids apart")
        return str(int(value))
    return _text(value)


def _label(value: Any) -> str:
    """A text, a number, or true or false; 1.0 and 1 are one label, true is another."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        return repr(value)
    return _id(value)


_Columns = dict[str, Callable[[Any], Any]]
_PAIR: _Columns = {"sentence1": _text, "sentence2": _text}
_LABELLED: _Columns = {"text": _text, "label": _label}
_COLUMNS: dict[str, dict[str, _Columns]] = {
    "sts": {"test": {**_PAIR, "score": _number}},
    "pair_classification": {"test": {**_PAIR, "label": _binary}},
    "classification": {"train": _LABELLED, "test": _LABELLED},
    "clustering": {"test": _LABELLED},
    "retrieval": {
        "corpus": {"_id": _id, "title": _text_or_empty, "text": _text_or_empty},
        "queries": {"_id": _id, "text": _text},
    },
    "reranking": {"test": {"query": _text, "positive": _texts, "negative": _texts}},
    "summarization": {
        "test": {"text": _text, "human_summaries": _texts, "machine_summaries": _texts, "relevance": _numbers}
    },
}


def _check_varied(column: str) -> Callable[[Mapping[str, _Table]], None]:
    """A check that a column has two values at least: with one, the metrics are undefined or always perfect."""

    def check(tables: Mapping[str, _Table]) -> None:
        for table in tables.values():
            if len({row[column] for row in table.rows}) < 2:
                raise DataError(table.file, f"is {table.rows[0][column]!r} in every row", "two or more", field=column)

    return check


def _check_classification(tables: Mapping[str, _Table]) -> None:
    _check_varied("label")({"train": tables["train"]})
    known, test = {row["label"] for row in tables["train"].rows}, tables["test"]
    unknown = [index for index, row in enumerate(test.rows) if row["label"] not in known]
    where = f"does not occur in {tables['train'].file.name}"
    _refuse([test.error(index, f"{test.rows[index]['label']!r} {where}", field="label") for index in unknown])


def _check_retrieval(tables: dict[str, _Table]) -> None:
    """Check the ids, and leave out queries without judgments, and documents that have neither title nor text.

    BEIR's ``queries.jsonl`` has those of all splits; mteb, too, encodes only those that are judged. A model of which no
    token is asked may answer anything, even NaN. Where the judgments call an empty document relevant (Cranfield's do),
    it stays a relevant document that no model can find.
    """
    corpus, queries, qrels = tables["corpus"], tables["queries"], tables["qrels"]
    for table in (corpus, queries):
        _check_unique(table, [row["_id"] for row in table.rows])
    _check_unique(qrels, [(row["query"], row["document"]) for row in qrels.rows])
    ids = {"query": {row["_id"] for row in queries.rows}, "document": {row["_id"] for row in corpus.rows}}
    names = {"query": ("query-id", queries.file.name), "document": ("corpus-id", corpus.file.name)}
    mistakes: list[DataError] = []
    for index, row in enumerate(qrels.rows):
        for key, (field, file) in names.items():
            if row[key] not in ids[key]:
                mistakes.append(qrels.error(index, f"{row[key]!r} is not in {file}", field=field))
                break
    _refuse(mistakes)
    if not any(row["score"] for row in qrels.rows):
        raise DataError(qrels.file, "calls no document relevant", "one score at least is above 0", field="score")
    judged = {row["query"] for row in qrels.rows}
    tables["corpus"] = corpus.only(lambda row: bool((row["title"] + row["text"]).strip()))
    tables["queries"] = queries.only(lambda row: row["_id"] in judged)


def _check_unique(table: _Table, keys: Sequence[Any]) -> None:
    if len(set(keys)) < len(keys):
        first: dict[Any, int] = {}
        again = [index for index, key in enumerate(keys) if first.setdefault(key, index) != index]
        _refuse([table.error(index, f"{keys[index]!r} occurs twice") for index in again])


def _check_reranking(tables: Mapping[str, _Table]) -> None:
    for index, row in enumerate(tables["test"].rows):
        both = [text for text in row["negative"] if text in row["positive"]]
        if both:
            raise tables["test"].error(index, f'"{both[0]:.60}" is a positive of this query, too', field="negative")


def _check_summarization(tables: Mapping[str, _Table]) -> None:
    for index, row in enumerate(tables["test"].rows):
        if len(row["relevance"]) != len(row["machine_summaries"]):
            problem = f"has {len(row['relevance'])} numbers for {len(row['machine_summaries'])} machine summaries"
            raise tables["test"].error(index, problem, field="relevance")
    if all(len(set(row["relevance"])) < 2 for row in tables["test"].rows):
        raise DataError(tables["test"].file, "is constant within every row", field="relevance")


_CHECKS: dict[str, Callable[[dict[str, _Table]], None]] = {
    "sts": _check_varied("score"),
    "pair_classification": _check_varied("label"),
    "classification": _check_classification,
    "clustering": _check_varied("label"),
    "retrieval": _check_retrieval,
    "reranking": _check_reranking,
    "summarization": _check_summarization,
}


def _fingerprint(folder: Path, about: Mapping[str, Any], tables: Mapping[str, _Table]) -> Fingerprint:
    """One hash over what the scores depend on: the type, the metric, and each file's name and bytes."""
    digest = hashlib.sha256(f"{about['type']} {about['metric']}\n".encode())
    if about["ignore_identical_ids"]:
        digest.update(b"ignore_identical_ids\n")
    for stem, table in sorted(tables.items()):
        digest.update(f"{stem} {fingerprint(table.file, len(table.rows)).sha256}\n".encode())
    main = tables.get("test") or tables["queries"]
    return Fingerprint(about["name"], digest.hexdigest(), len(main.rows), about["licence"])


def texts_of(task: TaskFolder) -> list[str]:
    """The distinct texts of a task's rows, in their order; labels and ids are none."""
    found: dict[str, None] = {}
    for stem, rows in task.tables.items():
        for row in rows if stem != "qrels" else ():
            values = [value for column, value in row.items() if column not in ("_id", "label", "title", "relevance")]
            for value in values:
                found |= dict.fromkeys(text for text in (value if isinstance(value, list) else [value]) if text)
    return [text for text in found if isinstance(text, str)]


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
        tables = {stem: _stratified(rows, count, least[stem], rng) for stem, rows in sorted(task.tables.items())}
    else:
        tables = {"test": _draw(task.tables["test"], count, rng)}
    whole = all(len(tables[stem]) == len(rows) for stem, rows in task.tables.items())
    if task.type == "sts" and len({row["score"] for row in tables["test"]}) < 2:
        raise DataError(task.path, f"a sample of {count} has one score only", "take a larger sample")
    return task if whole else replace(task, tables=tables, sampled=True)


def _draw(rows: tuple[Row, ...], count: int, rng: random.Random) -> tuple[Row, ...]:
    """``count`` rows at random, in their order."""
    return tuple(rows[i] for i in sorted(rng.sample(range(len(rows)), min(count, len(rows)))))


def _stratified(rows: tuple[Row, ...], count: int, least: int, rng: random.Random) -> tuple[Row, ...]:
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


def _sample_retrieval(
    tables: Mapping[str, tuple[Row, ...]], count: int, rng: random.Random
) -> dict[str, tuple[Row, ...]]:
    judged = {row["query"] for row in tables["qrels"]}
    candidates = tuple(row for row in tables["queries"] if row["_id"] in judged)
    if count >= len(candidates):
        return dict(tables)
    queries = _draw(candidates, count, rng)
    ids = {row["_id"] for row in queries}
    qrels = tuple(row for row in tables["qrels"] if row["query"] in ids)
    needed = {row["document"] for row in qrels}
    others = _draw(tuple(r for r in tables["corpus"] if r["_id"] not in needed), DISTRACTORS_PER_QUERY * count, rng)
    kept = needed | {row["_id"] for row in others}
    return {"corpus": tuple(r for r in tables["corpus"] if r["_id"] in kept), "queries": queries, "qrels": qrels}
