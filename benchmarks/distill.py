"""A trained embedder made smaller without labels: cut, then taught by itself on texts alone, then measured.

    python benchmarks/distill.py MODEL --to 3 --steps 400 --out run        # MODEL: a folder of all-MiniLM-L6-v2
    python benchmarks/distill.py MODEL --steps 20 --texts 500 --sample 20 --tasks STSBenchmark --out quick

Texts and tasks are those of the folder that SECATEUR_SHARED names, or ``../shared`` beside the repository: texts of all
training files in equal parts, none of them from a task. The table has the model, the cut one, the cut and taught one,
and, on retrieval, the taught one for queries over documents that the whole model encoded.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

import secateur

SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
DEFAULTS = {"recipe": "everyday", "train": "all", "batch_size": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--to", default="3")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--tasks", nargs="*", help="Default: all.")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    texts = given.out / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text in training_texts(given.texts, given.seed)), encoding="utf-8")
    cut, taught = given.out / "cut", given.out / "taught"
    started = time.monotonic()
    if not cut.exists():
        secateur.prune(given.model, to=given.to, out=cut)
    if not taught.exists():
        options = DEFAULTS | {"steps": given.steps, "learning_rate": given.learning_rate, "seed": given.seed}
        secateur.heal(cut, texts, teacher=given.model, cache=given.out / "vectors", **options, out=taught)
    print(f"cut and taught in {time.monotonic() - started:.0f} s")

    tasks = [folder for folder in sorted((SHARED / "eval").iterdir()) if (folder / "task.json").is_file()]
    tasks = [folder for folder in tasks if not given.tasks or folder.name in given.tasks]
    models = {"whole": given.model, "cut": cut, "taught": taught}
    options = {"sample": given.sample, "seed": given.seed, "cache": given.out / "vectors"}
    scores = secateur.evaluate(list(models.values()), tasks, names=list(models), out=given.out / "scores", **options)
    show(scores)
    retrieval = [task for task in tasks if json.loads((task / "task.json").read_text())["type"] == "retrieval"]
    if retrieval:
        both = secateur.evaluate(
            [across(taught, given.model)], retrieval, names=["taught over whole"], sample=given.sample
        )
        show(both)


def training_texts(count: int, seed: int) -> list[str]:
    """Texts of all training files in equal parts, as far as they go."""
    pools = [sorted(texts_of(file)) for file in sorted((SHARED / "train").glob("*.jsonl.gz"))]
    rng = random.Random(seed)
    for pool in pools:
        rng.shuffle(pool)
    mixed = [text for row in itertools.zip_longest(*pools) for text in row if text is not None]
    return mixed[:count]


def texts_of(file: Path) -> set[str]:
    return {" ".join(text.split()) for text in fields_of(file)} - {""}


def fields_of(file: Path) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for key in ("query", "anchor", "positive", "negative"):
                value = row.get(key) or []
                yield from [value] if isinstance(value, str) else value


def across(query: str | Path, document: str | Path) -> SentenceTransformer:
    """One model for queries, another of the same space for documents."""
    small, large = secateur.open_model(query), secateur.open_model(document)
    return SentenceTransformer(modules=[Router.for_query_document(list(small), list(large))]).eval()


def show(scores: object) -> None:
    table = scores.to_dataframe().pivot_table(index=["type", "task"], columns="model", values="score", sort=False)
    print(table.round(4).to_string())
    for model in table.columns:
        print(f"{model}: mean {scores.average(model):.4f}, over task types {scores.average_over_types(model):.4f}")


if __name__ == "__main__":
    main()
