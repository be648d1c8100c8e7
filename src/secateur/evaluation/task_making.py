"""A first retrieval task from texts alone: title → body, or first sentence → the rest.

Nobody judged what is relevant, so the task says so itself: in its name, and in the caution beside each score.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data.rows import TEXT, as_text_or_empty, parse_row, read_rows
from secateur.errors import DataError
from secateur.evaluation.task_formats import ABOUT
from secateur.files import new_folder, write_text
from secateur.options import MakeTaskOptions, step
from secateur.provenance import fingerprint

TITLES = ("title", "headline", "heading")
BODIES = (TEXT, "body", "content", "abstract", "passage", "document", "sentence")
LEAST_TEXT, LEAST_QUERY = 40, 12
"""Bytes in UTF-8 of a document and of a query: a Chinese character has three, and says as much as three letters."""
DROPPED = "texts dropped, nearly empty or copies of others"
UNASKED = "documents not asked for: title or first sentence missing, very short or shared with another"
_SENTENCE = re.compile(r"(?s)\s*(.{6,}?(?:[.!?…](?=\s)|[。！？]|(?=\n)))(.*)")
"""Up to the first end of a sentence or line, beyond what may be an abbreviation; and the rest."""


@dataclass(frozen=True)
class MadeTask:
    """A task that was made.

    Attributes:
        folder: The task folder.
        name: What scores will call it.
        how: Where its queries are from: ``title → body``, or ``first sentence → rest``.
        texts: Rows that were read.
        documents: In its corpus.
        queries: Of which each has one relevant document.
        left_out: Why → how many: rows that are no document, and documents that could have no query.
    """

    folder: Path
    name: str
    how: str
    texts: int
    documents: int
    queries: int
    left_out: Mapping[str, int]


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
    title, pairs = _read(options.texts, options.title, options.text)
    made = _documents(pairs)
    asked = Counter(_plain(query) for query, _ in made if query)
    able = [index for index, (query, _) in enumerate(made) if query and asked[_plain(query)] == 1]
    if not able:
        hint = "name the columns with --title and --text" if title else "texts need two sentences or a title"
        raise DataError(options.texts, "none of its texts can have a query", hint)
    chosen = sorted(random.Random(options.seed).sample(able, min(options.queries, len(able))))  # noqa: S311
    how, suffix = ("title → body", "titles") if title else ("first sentence → rest", "sentences")
    name = f"{options.out.resolve().name.lstrip('.')}-from-{suffix}"
    about = {
        "name": name,
        "type": "retrieval",
        "metric": "ndcg_at_10",
        "notes": f"Made from {options.texts.name} ({how}), seed {options.seed}; no person judged what is relevant.",
        "caution": f"made from texts alone ({how}): easier than what people ask, and no person judged it",
        "made_from": {"file": options.texts.name, "sha256": fingerprint(options.texts, 0).sha256},
    }
    with new_folder(options.out) as partial:
        corpus = {f"d{index}": document for index, (_, document) in enumerate(made)}
        queries = {f"q{index}": made[index][0] for index in chosen}
        write_retrieval(partial, about, queries, corpus, ((f"q{index}", f"d{index}", 1) for index in chosen))
    left_out = {DROPPED: len(pairs) - len(made), UNASKED: len(made) - len(able)}
    told = {why: count for why, count in left_out.items() if count}
    return MadeTask(options.out, name, how, len(pairs), len(made), len(chosen), told)


def write_retrieval(
    folder: Path,
    about: Mapping[str, Any],
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    judgments: Iterable[tuple[str, str, int]],
) -> None:
    """Write a retrieval task: ``task.json``, texts by id, and (query, document, score)."""
    rows = {
        "corpus": [{"_id": id_, "title": "", "text": text} for id_, text in corpus.items()],
        "queries": [{"_id": id_, "text": text} for id_, text in queries.items()],
    }
    for name, table in rows.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table))
    lines = [f"{query}\t{document}\t{score}\n" for query, document, score in judgments]
    write_text(folder / "qrels.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))
    write_text(folder / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _read(file: Path, title: str | None, text: str | None) -> tuple[str, list[tuple[str, str]]]:
    """The column of titles, which may be none, and title and text of each row."""
    rows = list(read_rows(file))
    if not rows:
        raise DataError(file, "has no rows")
    line, first = rows[0]
    optional = [] if title else [*TITLES]
    title = title or next((name for name in TITLES if name in first), "")
    text = text or next((name for name in BODIES if name in first), "")
    if not text:
        hint = f"--text takes one of those that are there: {', '.join(map(str, first))}"
        raise DataError(file, "none of its columns is known to hold texts", hint, line=line)
    fields = {column: as_text_or_empty for column in (title, text) if column}
    parsed = [parse_row(file, line, row, fields, optional=optional) for line, row in rows]
    return title, [(row.get(title, ""), row[text]) for row in parsed]


def _documents(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Query, which may be empty, and document of each text that is neither nearly empty nor a copy of another.

    Where no text has a title, every text that has two sentences gives up its first one, whether or not it is drawn as a
    query: otherwise those that are drawn would be known by it.
    """
    titled = any(title.strip() for title, _ in pairs)
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
