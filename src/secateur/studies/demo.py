"""The demo's data: semantic search over API documentation, made from the docstrings that are installed here.

A pair is the first line of a docstring and the rest of it. Packages are split into training and test, so that the
search is over libraries that the model was not healed on. Source files are parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import DataError
from secateur.evaluation.task_folder import write_retrieval
from secateur.files import write_text
from secateur.models import DEMO_MODEL
from secateur.options import StudyOptions
from secateur.progress import Progress

TRAIN_PACKAGES = ("numpy", "sklearn", "networkx", "matplotlib", "pandas")
TEST_PACKAGES = ("scipy",)
INSTRUCTION = "Given what a function does, retrieve the rest of its documentation"
SUMMARY_WORDS = (4, 24)
BODY_WORDS = (12, 32)
"""Docstrings with a shorter body are left out, longer bodies are cut."""

TRAIN_PAIRS = 4000
TEST_PAIRS = 400
SETTINGS = {"steps": 60, "batch_size": 32, "learning_rate": 5e-4, "max_length": 32, "max_examples": 320}
"""For a quarter of an hour on two cores: 15 steps are the scout's, the polish costs 45. By default 1,000 of 64."""


def demo_study(given: StudyOptions, run: Path, progress: Progress) -> StudyOptions:
    """Fill in what the demo decides: model, data, task and small settings. What the user gave stays.

    Raises:
        DataError: Too few docstrings are installed.
    """
    data, task = run / "data" / "api-docs.jsonl", run / "tasks" / "api-docs"
    if not (task / "task.json").is_file():
        write_demo_data(data, task, given.seed, progress)
    decided = {"models": [DEMO_MODEL], "data": [data], "tasks": [str(task)], **SETTINGS}
    return given.model_copy(update={key: value for key, value in decided.items() if key not in given.model_fields_set})


def write_demo_data(data: Path, task: Path, seed: int, progress: Progress) -> None:
    """Write a training file and a retrieval task folder; ``task.json`` comes last and tells that all is there."""
    packages = ("", *TRAIN_PACKAGES, *TEST_PACKAGES)
    found: dict[str, list[tuple[str, str]]] = {}
    for done, package in enumerate(packages, 1):
        found[package] = list(pairs_of(package))
        progress("read docstrings", done, len(packages))

    def draw(pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
        return random.Random(seed).sample(pairs, min(count, len(pairs)))  # noqa: S311 - not for secrets

    train = draw([pair for name in ("", *TRAIN_PACKAGES) for pair in found[name]], TRAIN_PAIRS)
    known = {text for pair in train for text in pair}
    test = [pair for name in TEST_PACKAGES for pair in found[name] if not known.intersection(pair)]
    test = draw(test, TEST_PAIRS)
    if len(train) < 1000 or len(test) < 100:
        raise DataError("docstrings", f"only {len(train)} for training and {len(test)} for the test are installed")
    about = {
        "name": "api-docs",
        "type": "retrieval",
        "metric": "ndcg_at_10",
        "instruction": INSTRUCTION,
        "licence": "as the packages: BSD-3-Clause",
        "notes": f"First line of a docstring → the rest of it; packages {', '.join(TEST_PACKAGES)}.",
    }
    rows = [{"query": summary, "positive": body} for summary, body in train]
    write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(data.with_suffix(".json"), json.dumps({"query_instruction": INSTRUCTION}) + "\n")
    queries = {f"q{i}": summary for i, (summary, _) in enumerate(test)}
    corpus = {f"d{i}": body for i, (_, body) in enumerate(test)}
    write_retrieval(task, about, queries, corpus, ((f"q{i}", f"d{i}", 1) for i in range(len(test))))


def pairs_of(package: str) -> Iterator[tuple[str, str]]:
    """(first line, rest) of the docstrings of an installed package; ``""`` is the standard library."""
    seen: set[str] = set()
    for file in _source_files(package):
        for docstring in _docstrings(file):
            summary, _, body = (" ".join(part.split()) for part in docstring.partition("\n\n"))
            words = body.split()
            if not SUMMARY_WORDS[0] <= len(summary.split()) <= SUMMARY_WORDS[1] or len(words) < BODY_WORDS[0]:
                continue
            body = " ".join(words[: BODY_WORDS[1]])
            if not {summary, body} & seen and summary not in body:
                seen |= {summary, body}
                yield summary, body


def _source_files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package) if package else None
    if package and not (spec and spec.origin):
        return []
    root = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    found = []
    for folder, within, files in os.walk(root):
        within[:] = set(within) - skip  # not looked into: all that is installed may lie there
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted(found)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):  # a file of another Python version or encoding is no documentation
        return
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and not node.name.startswith("_") and (docstring := ast.get_docstring(node)):
            yield docstring
