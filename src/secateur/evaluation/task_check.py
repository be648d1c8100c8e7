"""What task folders and files are, and what is wrong with them, without encoding anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.errors import DataError
from secateur.evaluation.task_folder import TaskFolder, read_task_folder
from secateur.options import CheckTasksOptions, step


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
        asides: What else was left out.
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
    asides: tuple[str, ...] = ()


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
        shared = {key: getattr(task, key) for key in ("what", "name", "type", "metric", "instruction", "asides")}
        checks.append(TaskCheck(str(path), counts=_counts(task), notes=task.note, **shared))
    return checks


def _counts(task: TaskFolder) -> dict[str, int]:
    tables = task.tables
    if task.type == "retrieval":
        relevant = [row for row in tables["qrels"] if row["score"]]
        grades = {row["score"] for row in relevant}
        counts = {"queries": len(tables["queries"]), "documents": len(tables["corpus"]), "relevant": len(relevant)}
        return counts | ({"grades": len(grades)} if len(grades) > 1 else {})
    test = tables["test"]
    if task.type == "reranking":
        documents = {role: sum(len(row[role]) for row in test) for role in ("positive", "negative")}
        return {"queries": len(test), **documents}
    if task.type == "summarization":
        return {"texts": len(test), "summaries": sum(len(row["machine_summaries"]) for row in test)}
    if task.type == "sts":
        return {"pairs": len(test), "different scores": len({row["score"] for row in test})}
    if task.type == "pair_classification":
        return {"pairs": len(test), "of label 1": sum(row["label"] for row in test)}
    trained = {"training texts": len(tables["train"])} if "train" in tables else {}
    return {**trained, "texts": len(test), "labels": len({row["label"] for row in test})}
