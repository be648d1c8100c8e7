"""Training data without the texts of tasks that will judge the model: what a training has seen says nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.sources import Pairs, Source
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import TaskFolder, read_task_folder, texts_of
from secateur.provenance import Fingerprint


@dataclass(frozen=True)
class Excluded:
    """The texts of some task folders, and their fingerprints."""

    texts: frozenset[str] = frozenset()
    tasks: tuple[Fingerprint, ...] = ()

    def settings(self) -> dict[str, list[dict[str, Any]]]:
        """For ``training.json`` and ``done.json``; nothing where nothing is excluded."""
        return {"exclude": [{"name": task.name, "sha256": task.sha256} for task in self.tasks]} if self.tasks else {}

    def leave_out(self, sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
        """Data without rows that hold one of the texts as anchor, positive or text; of negatives, these alone go.

        Returns:
            The data that have rows left, and a note for each that had more.

        Raises:
            DataError: No row is left at all.
        """
        if not self.texts:
            return list(sources), []
        kept: list[Source] = []
        notes: list[str] = []
        for source in sources:
            rows: Any
            negatives = 0
            if isinstance(source, Pairs):
                clean = [row for row in source.rows if self.texts.isdisjoint((row.anchor, row.positive))]
                rows = [replace(r, negatives=tuple(t for t in r.negatives if t not in self.texts)) for r in clean]
                negatives = sum(len(r.negatives) for r in clean) - sum(len(r.negatives) for r in rows)
            else:
                rows = [text for text in source.rows if text not in self.texts]
            parts = [(len(source.rows) - len(rows), f"of {len(source.rows)} rows"), (negatives, "other negatives")]
            if told := ", ".join(f"{count} {what}" for count, what in parts if count):
                notes.append(f"{source.source.name}: not trained on, as texts of excluded tasks: {told}")
            if rows:
                left: Any = tuple(rows)
                kept.append(replace(source, rows=left, source=replace(source.source, rows=len(rows))))
        if not kept:
            raise DataError("data", "every row holds a text of an excluded task", "other data, or exclude less")
        return kept, notes


def read_excluded(tasks: Sequence[object]) -> Excluded:
    """The texts of task folders. A document counts with its title before it, too, as it is encoded.

    Raises:
        ConfigError: One is no folder: the texts of mteb's own tasks are not on this disk.
        DataError: A folder is not right.
    """
    folders: list[TaskFolder] = []
    for task in tasks:
        if not isinstance(task, (str, Path)) or not Path(task).exists():
            hint = "name a task folder; the texts of mteb's own tasks are not here to compare with"
            raise ConfigError("exclude", str(task), f"{task} is no folder or file", hint)
        folders.append(read_task_folder(task))
    texts = {text for folder in folders for text in texts_of(folder)}
    for folder in folders:
        titled = [row for row in folder.tables.get("corpus", ()) if row["title"]]
        texts |= {f"{row['title']} {row['text']}".strip() for row in titled}
    return Excluded(frozenset(texts), tuple(folder.source for folder in folders))
