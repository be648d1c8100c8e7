"""Rows of the data that are held out of a training, as retrieval tasks that judge it: one task folder for each file.

Of pairs, the queries are anchors, and the documents are positives and negatives. Rows that share an anchor or a
positive are held out together or not at all, and of their negatives those are documents that no other row has: so no
row is lost to the training besides. Of texts alone, each is a query and a document; the others are as relevant to it as
they are similar by a teacher's vectors.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from secateur.data.rows import PLAIN, TABLES
from secateur.data.sources import Pair, Pairs, Source, Texts
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import write_retrieval
from secateur.files import new_folder
from secateur.healing.teacher import Teacher, keep_vectors, open_teacher
from secateur.measures.metrics import nearest_rows, similarity_to
from secateur.options import ScoutOptions
from secateur.progress import Progress

SHARE = 10
"""At most one row in so many of a file is held out."""
FEWEST, FEWEST_IN_ALL = 10, 20
"""Queries of a file, and of all files together, below which a score would say nothing."""
NEIGHBOURS = 100
"""So many texts are relevant to one, if they are more similar to it than texts are on average."""

Judgments = Mapping[str, Mapping[str, int]]
"""Query → document → how relevant it is, all by their texts."""


def judge_of(sources: Sequence[Source]) -> str:
    """``pairs`` where there are any, else ``texts``."""
    return "pairs" if any(isinstance(source, Pairs) for source in sources) else "texts"


def _judging(sources: Sequence[Source]) -> list[Source]:
    """The files whose rows judge: where there are pairs, texts alone hold nothing out."""
    return [source for source in sources if isinstance(source, Pairs)] or list(sources)


def _task_name(source: Source) -> str:
    stem = next((source.name[: -len(end)] for end in (*TABLES, *PLAIN) if source.name.endswith(end)), source.name)
    return f"{stem.lstrip('.')}-held-out"


def left_whole(sources: Sequence[Source], names: Collection[str]) -> list[str]:
    """Notes on files of which nothing was held out: all but those whose tasks have these names."""
    files = [source.source.name for source in _judging(sources) if _task_name(source) not in names]
    return [f"{file}: none of its rows is held out, too few share no text with others" for file in files]


def hold_out(options: ScoutOptions, sources: Sequence[Source], folder: Path, progress: Progress) -> None:
    """Write the task folders of held-out rows into a new folder, which is there when it is whole.

    Raises:
        ConfigError: Texts alone, and no teacher.
        DataError: Too few rows can be held out; or two files have one name.
        OutputError: ``folder`` cannot be written.
    """
    if judge_of(sources) == "texts" and options.teacher is None:
        hint = "name one with --teacher (self: the model as it came), or tasks with --tasks"
        raise ConfigError("teacher", None, "texts alone have no answers to find, and there is no teacher", hint)
    drawn = draw(sources, options.held_out, options.seed)
    teacher = open_teacher(options) if judge_of(sources) == "texts" else None
    cache = options.cache or options.out / "cache"
    trained = [row for source, held in drawn if isinstance(source, Pairs) for row in source.rows if row not in held]
    known = {text for row in trained for text in row.texts}
    with new_folder(folder) as partial:
        for source, held in drawn:
            rows: list[Any] = [row for row in dict.fromkeys(source.rows) if row in held]
            if not rows:
                continue
            if teacher:
                judgments, others = _similar(rows, source.prompt, teacher, cache, progress), set[str]()
            else:
                judgments, others = _relevant(rows), {text for row in rows for text in row.negatives} - known
            _write(partial / _task_name(source), source, judgments, others)


def draw(sources: Sequence[Source], count: int, seed: int) -> list[tuple[Source, frozenset[Any]]]:
    """The rows of each file to hold out: ``count`` in all, shared evenly by the files, at most a tenth of each.

    Raises:
        DataError: As :func:`hold_out`.
    """
    own = _judging(sources)
    names = [_task_name(source) for source in own]
    if twice := [source.name for source, name in zip(own, names, strict=True) if names.count(name) > 1]:
        raise DataError(twice[0], "two data files have this name, and so would their tasks", "rename one")
    drawn: list[tuple[Source, frozenset[Any]]] = []
    found = 0
    for source in own:
        rng = random.Random(f"{seed} {source.name}")  # noqa: S311 - not for secrets
        rows: Any = list(dict.fromkeys(source.rows)) if isinstance(source, Texts) else source.rows
        most = min(count // len(own), len(rows) // SHARE)
        taken: list[Any] = []
        if isinstance(source, Texts):
            taken = rng.sample(rows, most)
        else:
            groups = _groups(rows)
            rng.shuffle(groups)
            for group in groups:
                taken += group if len(taken) + len(group) <= most else []
        queries = len(taken) if isinstance(source, Texts) else len(_relevant(taken))
        drawn.append((source, frozenset(taken if queries >= FEWEST else ())))
        found += queries if queries >= FEWEST else 0
    if found < FEWEST_IN_ALL:
        each = f"at most a tenth of each file, and none where that is fewer than {FEWEST}"
        problem = f"{found} queries can be held out to score the depths ({each}), and it takes {FEWEST_IN_ALL}"
        raise DataError("data", problem, "name tasks with --tasks, give more rows, or raise --held-out")
    return drawn


def _groups(rows: Sequence[Pair]) -> list[list[Pair]]:
    """Rows that are joined by a common anchor or positive, over any number of others, in the order of their first."""
    numbers: dict[str, int] = {}
    edges = [[numbers.setdefault(text, len(numbers)) for text in (row.anchor, row.positive)] for row in rows]
    anchors, positives = np.array(edges).T
    graph = coo_array((np.ones(len(rows)), (anchors, positives)), shape=(len(numbers), len(numbers)))
    component = connected_components(graph, directed=False)[1]
    groups: dict[int, list[Pair]] = {}
    for row, anchor in zip(rows, anchors, strict=True):
        groups.setdefault(component[anchor], []).append(row)
    return list(groups.values())


def _relevant(rows: Sequence[Pair]) -> Judgments:
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.anchor != row.positive:  # a text is no answer to itself
            found.setdefault(row.anchor, {})[row.positive] = 1
    return found


def _similar(texts: Sequence[str], prompt: str, teacher: Teacher, cache: Path, progress: Progress) -> Judgments:
    """For each text how similar its nearest others are by a teacher's vectors (:func:`.similarity_to`), from 1 to 100.

    By nDCG@10, ten texts drawn at random score about 0; those that the teacher finds itself, 1; and others that it
    finds nearly as similar, nearly 1.
    """
    kept = keep_vectors(teacher, {prompt: texts}, cache, progress)
    vectors = kept.read(kept.rows(texts, teacher.context(prompt)))
    nearest = nearest_rows(vectors, min(NEIGHBOURS, len(texts) - 1))
    grades = np.rint(100 * similarity_to(nearest, vectors)).astype(int)
    found: dict[str, dict[str, int]] = {}
    for text, own, graded in zip(texts, nearest.tolist(), grades.tolist(), strict=True):
        found[text] = {texts[other]: grade for other, grade in zip(own, graded, strict=True) if grade > 0}
    return found


def _write(folder: Path, source: Source, judgments: Judgments, others: set[str]) -> None:
    """A retrieval task. A text that is query and document has one id, by which it is no answer to itself."""
    documents = dict.fromkeys(text for own in judgments.values() for text in own) | dict.fromkeys(sorted(others))
    ids = {text: f"t{number}" for number, text in enumerate(dict.fromkeys([*judgments, *documents]))}
    what = "anchors, among positives and negatives" if isinstance(source, Pairs) else "judged by a teacher's vectors"
    about = {
        "name": folder.name,
        "type": "retrieval",
        "metric": "ndcg_at_10",
        "instruction": source.prompt.rstrip().removesuffix(";"),
        "licence": source.source.licence,
        "ignore_identical_ids": True,
        "notes": f"Rows of {source.source.name} that are not trained on: {what}.",
    }
    rows = ((ids[query], ids[text], grade) for query, own in judgments.items() for text, grade in own.items())
    queries, corpus = ({ids[text]: text for text in texts} for texts in (judgments, documents))
    write_retrieval(folder, about, queries, corpus, rows)
