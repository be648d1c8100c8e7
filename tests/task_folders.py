"""Small task folders of every type, written for a test."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = ("oak", "ash", "elm", "fir", "yew", "plum", "pear", "rose", "fern", "moss", "reed", "ivy", "hazel", "birch")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of three to six words."""
    rng = random.Random(seed)
    return [f"{i} {' '.join(rng.choices(WORDS, k=rng.randint(3, 6)))}" for i in range(count)]


def write_lines(file: Path, rows: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_task(folder: Path, type_: str, rows: dict[str, list[Any]], **about: Any) -> Path:
    """``task.json`` and one file for each table; ``qrels`` are (query, document, score)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"type": type_, **about}))
    for name, table in rows.items():
        if name == "qrels":
            lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in table)]
            (folder / "qrels.tsv").write_text("\n".join(lines) + "\n")
        else:
            write_lines(folder / f"{name}.jsonl", table)
    return folder


def example_rows(type_: str, size: int = 24) -> dict[str, list[Any]]:
    """The tables of a task of that type, with ``size`` test rows (retrieval: queries, on 3 × ``size`` documents)."""
    rng, texts = random.Random(7), sentences(8 * size)
    first, second = texts[:size], texts[size : 2 * size]
    pairs = [{"sentence1": a, "sentence2": b} for a, b in zip(first, second, strict=True)]
    labelled = [{"text": text, "label": f"class {i % 3}"} for i, text in enumerate(texts)]
    if type_ == "sts":
        return {"test": [pair | {"score": rng.uniform(0, 5)} for pair in pairs]}
    if type_ == "pair_classification":
        return {"test": [pair | {"label": i % 2} for i, pair in enumerate(pairs)]}
    if type_ == "classification":
        return {"train": labelled[size : 3 * size], "test": labelled[:size]}
    if type_ == "clustering":
        return {"test": labelled[:size]}
    if type_ == "retrieval":
        corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts[: 3 * size])]
        queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(texts[-size:])]
        qrels = [(f"q{i}", f"d{(5 * i + j) % (3 * size)}", 1) for i in range(size) for j in range(1 + i % 3)]
        return {"corpus": corpus, "queries": queries, "qrels": qrels}
    groups = [texts[size + 6 * i : size + 6 * (i + 1)] for i in range(size)]
    if type_ == "reranking":
        return {
            "test": [{"query": q, "positive": g[:2], "negative": g[2:]} for q, g in zip(first, groups, strict=False)]
        }
    grades = [[rng.uniform(1, 5) for _ in range(4)] for _ in groups]
    summaries = [
        {"text": text, "human_summaries": group[:2], "machine_summaries": group[2:], "relevance": grade}
        for text, group, grade in zip(first, groups, grades, strict=True)
    ]
    return {"test": summaries}


TYPES = ("sts", "pair_classification", "classification", "clustering", "retrieval", "reranking", "summarization")
