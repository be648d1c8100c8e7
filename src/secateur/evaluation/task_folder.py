"""Task folders and files: somebody's own evaluation data, checked before anything is encoded; and made of texts.

``docs/reference/data.md`` has the keys of a folder's ``task.json``; :mod:`.task_formats` reads the files beside it, and
those that need none.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.rows import TABLES, TEXT, Row, as_text_or_empty, parse_rows, read_rows
from secateur.data.sources import read_beside, stem
from secateur.errors import DataError
from secateur.evaluation.task_formats import ABOUT, TYPES, read_content
from secateur.files import new_folder, read_json, write_text
from secateur.options import CheckTasksOptions, MakeTaskOptions, step
from secateur.provenance import Fingerprint, sha256_of

Tables = Mapping[str, tuple[Row, ...]]

TRAIN_PER_LABEL = 8
"""A sampled classification task keeps so many training texts of each label: what mteb fits one classifier on."""
DISTRACTORS_PER_QUERY = 4
"""A sampled retrieval task keeps, besides all judged documents of its queries, so many others for each query."""
TITLES = ("title", "headline", "heading")
BODIES = (TEXT, "body", "content", "abstract", "passage", "document", "sentence")
LEAST_TEXT, LEAST_QUERY = 40, 12
"""Bytes in UTF-8 of a document and of a query: a Chinese character has three, and says as much as three letters."""
_SENTENCE = re.compile(r"(?s)\s*(.{6,}?(?:[.!?…](?=\s)|[。！？]|(?=\n)))(.*)")
"""Up to the first end of a sentence or line, beyond what may be an abbreviation; and the rest."""
_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{,119}")


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
    tables = {name: tuple(rows) for name, rows in content.tables.items()}
    ignore, notes = about["ignore_identical_ids"], [about["caution"], *content.notes]
    if not isinstance(ignore, bool | None) or (ignore and content.type != "retrieval"):
        problem = f"is {ignore!r:.60} in a task of type {content.type}"
        raise DataError(place / ABOUT, problem, "true or false, of retrieval", field="ignore_identical_ids")
    metric = about["metric"] or TYPES[content.type].metric
    if content.type == "reranking" and metric in ("map", "mrr"):  # the paper's and sentence-transformers' names
        metric += "_at_1000"
    if not re.fullmatch(TYPES[content.type].metrics, metric):
        problem = f"{content.type} has no metric {metric!r}"
        raise DataError(place / ABOUT, problem, f"such as {TYPES[content.type].metric}", field="metric")
    labels = [{row["label"] for row in rows} for rows in tables.values()] if metric in ("ap", "ap_weighted") else []
    if any(len(own) != 2 for own in labels):
        raise DataError(place / ABOUT, f"{metric} needs exactly two labels", "accuracy", field="metric")
    if content.type == "retrieval":
        tables, left_out = _leave_out(tables, look_for_identical=ignore is None)
        notes += left_out
    digest = hashlib.sha256(f"{content.type} {about['metric']}\n".encode())
    digest.update(b"ignore_identical_ids\n" if ignore else b"")
    for name, file in sorted(content.files.items()):
        digest.update(f"{name} {sha256_of(file)}\n".encode())
    rows = len(tables.get("test") or tables["queries"])
    return TaskFolder(
        path=place,
        **{key: about[key] for key in ("name", "instruction", "notes")},
        type=content.type,
        metric=metric,
        tables=tables,
        source=Fingerprint(about["name"], digest.hexdigest(), rows, about["licence"]),
        ignore_identical_ids=bool(ignore),
        note="; ".join(filter(None, notes)),
        what=content.what,
    )


def texts_of(task: TaskFolder) -> list[str]:
    """The distinct texts of a task's rows, in their order, as mteb encodes them: documents after their titles."""
    found: dict[str, None] = {}
    for name, rows in task.tables.items():
        for row in rows if name != "qrels" else ():
            if name == "corpus":
                found[f"{row['title']} {row['text']}".strip()] = None
                continue
            for column, value in row.items():
                if column not in ("_id", "label", "relevance", "score"):
                    found |= dict.fromkeys(value if isinstance(value, list) else [value])
    return list(found)


def _read_about(place: Path) -> dict[str, Any]:
    """``task.json``, or the JSON file beside a data file, with defaults."""
    if not place.exists():
        raise DataError(place, "no such file or folder")
    file = place / ABOUT
    content: Any = read_json(file, strict=True) if file.is_file() else {}
    if place.is_file() and place.name.lower().endswith(TABLES):  # as beside training data
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
    if not _NAME.fullmatch(about["name"]):
        problem = f"{about['name']!r:.60} cannot be a part of file names"
        where = file if "name" in content else place
        raise DataError(where, problem, "at most 120 characters, no slash, no dot in front", field="name")
    if about["type"] not in ("", *TYPES):
        raise DataError(file, f"unknown type {about['type']!r}", f"one of {', '.join(TYPES)}", field="type")
    about["ignore_identical_ids"] = content.get("ignore_identical_ids")
    return about


def _leave_out(tables: Tables, *, look_for_identical: bool) -> tuple[dict[str, tuple[Row, ...]], list[str]]:
    """Retrieval without queries that nobody judged and documents that are empty; and notes that say so.

    mteb, too, encodes only queries that are judged. A model of which no token is asked may answer anything, even NaN.
    Where the judgments call an empty document relevant (Cranfield's do), it stays one that no model can find.
    """
    corpus, queries, qrels = (tables[name] for name in ("corpus", "queries", "qrels"))
    judged, answered = ({row["query-id"] for row in qrels if row["score"] >= least} for least in (0, 1))
    documents = tuple(row for row in corpus if (row["title"] + row["text"]).strip())
    asked = tuple(row for row in queries if row["_id"] in judged)
    counts = {
        "queries without a relevant document, which score 0 as in mteb": (len(judged) - len(answered), len(judged)),
        "documents without text, left out": (len(corpus) - len(documents), len(corpus)),
        "queries without a judgment, left out": (len(queries) - len(asked), len(queries)),
    }
    notes = [f"{what}: {some:,} of {many:,}" for what, (some, many) in counts.items() if some]
    texts = {row["_id"]: row["text"] for row in documents} if look_for_identical else {}
    if same := sum(texts.get(row["_id"]) == row["text"] for row in asked):  # each of these finds itself first
        hint = '"ignore_identical_ids": true in task.json leaves out these hits'
        notes.append(f"queries that are in the corpus under the same id: {same:,}; {hint}")
    return {"corpus": documents, "queries": asked, "qrels": qrels}, notes


# Samples --------------------------------------------------------------------------------------------------------------


def sample_task(task: TaskFolder, count: int, seed: int) -> TaskFolder:
    """Draw at most ``count`` test rows by ``seed``; what is drawn depends on nothing else.

    Where there are labels, rows are drawn in proportion to them, at least one of each (of training rows, at least
    :data:`TRAIN_PER_LABEL`). Retrieval draws ``count`` judged queries, keeps *all* documents judged for them, and
    :data:`DISTRACTORS_PER_QUERY` others for each query: its score is higher than the full one.
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


# Descriptions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskCheck:
    """A folder or file that was looked at: the task that it is, or what is wrong, with file, line and column."""

    path: str
    task: TaskFolder | None
    problem: str = ""


@step(CheckTasksOptions)
def check_tasks(options: CheckTasksOptions) -> list[TaskCheck]:
    """Read task folders and files as ``evaluate`` does, and say what each is, or what is wrong with it.

    Returns:
        One check for each, in their order; a broken task is no error, but has a ``problem``.
    """
    checks = []
    for path in options.tasks:
        try:
            checks.append(TaskCheck(str(path), read_task_folder(path)))
        except DataError as error:
            checks.append(TaskCheck(str(path), None, str(error)))
    return checks


# Tasks from texts alone -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeTask:
    """A task that was made of so many ``texts``: its folder, and the name that scores will have.

    ``how`` says where its queries are from: ``title → body``, or ``first sentence → rest``.
    """

    folder: Path
    name: str
    how: str
    texts: int
    documents: int
    queries: int


@step(MakeTaskOptions)
def make_task(options: MakeTaskOptions) -> MadeTask:
    """Make a retrieval task of texts: find each by its title or, where there are none, its rest by its first sentence.

    All texts are the corpus, without those titles or sentences. It is a task to begin with: a title is nearer to its
    text than what people ask. The task is called ``<folder>-from-titles`` or ``<folder>-from-sentences``, and each of
    its scores has a note that says so.

    Raises:
        DataError: The file is broken or has no texts; or no text can have a query.
        OutputError: ``out`` cannot be written, or holds something.
    """
    pairs = _read(options.texts, options.title, options.text)
    titled = any(title.strip() for title, _ in pairs)
    made = _documents(pairs, titled)
    asked = Counter(_plain(query) for query, _ in made)
    able = [index for index, (query, _) in enumerate(made) if query and asked[_plain(query)] == 1]
    if not able:
        hint = "name the columns with --title and --text" if titled else "texts need two sentences or a title"
        raise DataError(options.texts, "none of its texts can have a query", hint)
    chosen = sorted(random.Random(options.seed).sample(able, min(options.queries, len(able))))  # noqa: S311
    how, suffix = ("title → body", "titles") if titled else ("first sentence → rest", "sentences")
    name = f"{options.out.resolve().name.lstrip('.')}-from-{suffix}"
    about = {
        "name": name,
        "type": "retrieval",
        "metric": "ndcg_at_10",
        "notes": f"Made from {options.texts.name} ({how}), seed {options.seed}; no person judged what is relevant.",
        "caution": f"made from texts alone ({how}): easier than what people ask, and no person judged it",
        "made_from": {"file": options.texts.name, "sha256": sha256_of(options.texts)},
    }
    with new_folder(options.out) as partial:
        corpus = {f"d{index}": document for index, (_, document) in enumerate(made)}
        queries = {f"q{index}": made[index][0] for index in chosen}
        write_retrieval(partial, about, queries, corpus, ((f"q{index}", f"d{index}", 1) for index in chosen))
    return MadeTask(options.out, name, how, len(pairs), len(made), len(chosen))


def write_retrieval(
    folder: Path,
    about: Mapping[str, Any],
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    judgments: Iterable[tuple[str, str, int]],
) -> None:
    """Write a retrieval task: ``task.json``, texts by id, and (query, document, score)."""
    tables = {
        "corpus": [{"_id": id_, "title": "", "text": text} for id_, text in corpus.items()],
        "queries": [{"_id": id_, "text": text} for id_, text in queries.items()],
    }
    for name, rows in tables.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    lines = [f"{query}\t{document}\t{score}\n" for query, document, score in judgments]
    write_text(folder / "qrels.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))
    write_text(folder / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _read(file: Path, title: str | None, text: str | None) -> list[tuple[str, str]]:
    """Title, which may be empty, and text of each row."""
    names = {"title": (title,) if title else TITLES, "text": (text,) if text else BODIES}
    fields = {"title": as_text_or_empty, "text": as_text_or_empty}
    optional, needed = () if title else ("title",), "the columns are named by --title and --text; "
    rows = parse_rows(file, read_rows(file), fields, names, optional=optional, needed=needed)
    return [(row["title"], row["text"]) for _, row in rows]


def _documents(pairs: Sequence[tuple[str, str]], titled: bool) -> list[tuple[str, str]]:
    """Query, which may be empty, and document of each text that is neither nearly empty nor a copy of another.

    Where none is ``titled``, every text that has two sentences gives up its first one, whether or not it is drawn as a
    query: otherwise those that are drawn would be known by it.
    """
    found: dict[str, tuple[str, str]] = {}
    for title, text in pairs:
        query, document = " ".join(title.split()), text.strip()
        if query:  # a text that begins with its title would be found by that
            document = document.removeprefix(query).lstrip(" \t\n:-—")
        elif not titled and (parts := _SENTENCE.match(text)) and len(parts[2].strip().encode()) >= LEAST_TEXT:
            query, document = " ".join(parts[1].split()), parts[2].strip()
        if len(document.encode()) >= LEAST_TEXT:
            found.setdefault(_plain(document), (query if len(query.encode()) >= LEAST_QUERY else "", document))
    return list(found.values())


def _plain(text: str) -> str:
    """A text by which copies are known: without case and kinds of white space."""
    return " ".join(text.split()).casefold()
