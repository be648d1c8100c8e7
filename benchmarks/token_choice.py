"""Which tokens a smaller vocabulary should keep: rules compared on texts of other kinds than the counted ones.

    python benchmarks/token_choice.py MODEL DATA TASKS [--size 8000]

MODEL is the folder of an embedder with a WordPiece tokenizer, DATA a folder of training files, whose tokens are
counted, TASKS one of task folders. Of these only the parts for training and development are read, never the test parts.
Prints a Markdown table: for each rule the share of tokens that stay, the mean cosine with the vectors of all tokens,
and the share of each text's ten nearest texts that stay, each averaged over the tasks; for today's rule, frequency
alone and the whole model also the accuracy of a logistic regression on the vectors, in points. No model is trained.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression

from secateur.data.rows import read_rows
from secateur.data.sources import stream_texts
from secateur.models.open_model import open_model
from secateur.vocabulary.choice import Vocabulary, count_tokens, read_vocabulary
from secateur.vocabulary.trim import (
    cut_tokenizer,
    cut_vocabulary,
    keep_tokens,
    named_ids,
    plain_tokenizer,
    token_ids,
)

TEXTS = 800
"""Of each task, for tokens, cosines and neighbours."""
TRAINED, JUDGED = 2500, 1500
"""Texts that a classifier learns from, and others that it is judged by."""
GROUPS = 10
"""A token's pieces are those that it has without itself and a tenth of the others."""
Numbers = NDArray[np.float64]


def main() -> None:
    args = arguments()
    whole = opened(args.model)
    vocabulary = read_vocabulary(str(args.model), whole.tokenizer)
    files = sorted(path for path in args.data.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))
    frequency = count_tokens(vocabulary.tokenizer, stream_texts(files, None)).counted
    needed = vocabulary.needed(frequency, named_ids(whole[0].auto_model))
    texts, labelled = read_parts(args.tasks)
    names = " | ".join(labelled)
    print(f"| | tokens that stay | cosine | neighbours | {names} |\n|---|---:|---:|---:|{'---:|' * len(labelled)}")
    print(f"| all tokens | | | | {' | '.join(f'{score:.1f}' for score in accuracies(whole, labelled))} |", flush=True)
    expected = {name: vectors(whole, part) for name, part in texts.items()}
    for rule, order in orders(vocabulary, frequency, needed, whole).items():
        kept = sorted(order[: args.size])
        small = cut(args.model, vocabulary, kept)
        cells = [f"{100 * stay(vocabulary, kept, texts):.1f} %"]
        found = {name: vectors(small, part) for name, part in texts.items()}
        cells += [f"{np.mean([(found[name] * expected[name]).sum(1).mean() for name in texts]):.3f}"]
        cells += [f"{np.mean([neighbours(found[name], expected[name]) for name in texts]):.3f}"]
        scored = rule in (FREQUENCY, TODAY)
        cells += [f"{score:.1f}" for score in accuracies(small, labelled)] if scored else [""] * len(labelled)
        print(f"| {rule} | {' | '.join(cells)} |", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--size", type=int, default=8000)
    return parser.parse_args()


# ---- rules

FREQUENCY, TODAY = "frequency", "frequency ÷ the better rank: today's rule"


def orders(
    vocabulary: Vocabulary, frequency: Numbers, needed: Sequence[int], model: SentenceTransformer
) -> dict[str, list[int]]:
    """Rule → all ids, the first to stay first."""
    longer = vocabulary.of_several_characters()
    rank = np.full(len(frequency), np.inf)
    rank[longer] = np.arange(1, len(longer) + 1)
    zipf = 1 / (rank + 10)
    zipf /= zipf.sum()
    spare = sorted(set(longer) - set(needed))
    lost = 1 - similarity_to_pieces(vocabulary, spare, model, len(frequency))
    rules = {
        FREQUENCY: frequency,
        "frequency ÷ √ rank in the vocabulary": frequency / np.sqrt(np.where(np.isinf(rank), 1, rank)),
        "frequency + Zipf's law by that rank": frequency + zipf,
        "frequency × what the token's embedding loses by its pieces": frequency * lost,
        "(frequency + Zipf's law) × what it loses": (frequency + zipf) * lost,
    }
    found = {TODAY: list(vocabulary.order(frequency, needed))}
    for rule, use in rules.items():
        others = np.setdiff1d(np.array(sorted(set(vocabulary.ids.values()))), needed)
        found[rule] = [*needed, *others[np.lexsort((rank[others], -use[others]))].tolist()]
    return found


def similarity_to_pieces(vocabulary: Vocabulary, ids: Sequence[int], model: SentenceTransformer, size: int) -> Numbers:
    """(ids,) cosine of each token's embedding with the mean of those of the pieces that it falls into without it."""
    table = model[0].auto_model.get_input_embeddings().weight.detach().float()
    names, prefix = {i: token for token, i in vocabulary.ids.items()}, vocabulary.model["continuing_subword_prefix"]
    found = np.zeros(size)
    for group in range(GROUPS):
        out = ids[group::GROUPS]
        kept = sorted(set(names) - set(out))
        tokenizer = plain_tokenizer(keep_tokens(vocabulary.rules, kept))
        pieces = token_ids(tokenizer, [names[i].removeprefix(prefix) for i in out])
        means = torch.stack([table[[kept[piece] for piece in own]].mean(0) for own in pieces])
        found[out] = torch.cosine_similarity(table[list(out)], means).numpy()
    return found


# ---- what they keep


def opened(folder: Path) -> SentenceTransformer:
    model = open_model(folder, device="cpu", dtype="float32")
    model.max_seq_length = 64
    return model


def cut(folder: Path, vocabulary: Vocabulary, kept: list[int]) -> SentenceTransformer:
    model = opened(folder)
    model[0].processor = cut_tokenizer(model.tokenizer, kept)
    cut_vocabulary(str(folder), model[0].auto_model, kept)
    return model


def read_parts(tasks: Path) -> tuple[dict[str, list[str]], dict[str, list[tuple[str, str]]]]:
    """Task → some texts of its parts for training and development; the same with labels, of those that have some."""
    texts: dict[str, list[str]] = {}
    labelled: dict[str, list[tuple[str, str]]] = {}
    for folder in sorted(tasks.iterdir()):
        parts = [file for stem in ("train", "dev") for file in sorted(folder.glob(f"{stem}.jsonl*"))]
        rows = [dict(row) for file in parts for _, row in read_rows(file)]
        if rows:
            every = {str(row[key]) for row in rows for key in ("text", "sentence1", "sentence2") if key in row}
            texts[folder.name] = random.Random(1).sample(sorted(every), TEXTS)
            if "label" in rows[0]:
                pairs = [(str(row["text"]), str(row["label"])) for row in rows if "text" in row]
                labelled[folder.name] = random.Random(1).sample(pairs, min(len(pairs), TRAINED + JUDGED))
    return texts, labelled


def vectors(model: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    return model.encode(list(texts), normalize_embeddings=True, batch_size=64, show_progress_bar=False)


def stay(vocabulary: Vocabulary, kept: Sequence[int], texts: dict[str, list[str]]) -> float:
    there = set(kept)
    shares = []
    for part in texts.values():
        ids = list(itertools.chain.from_iterable(token_ids(vocabulary.tokenizer, part)))
        shares.append(sum(i in there for i in ids) / len(ids))
    return float(np.mean(shares))


def neighbours(found: NDArray[np.float32], expected: NDArray[np.float32], count: int = 10) -> float:
    """Share of each text's nearest texts that are the same."""
    nearest = []
    for each in (found, expected):
        similarity = each @ each.T
        np.fill_diagonal(similarity, -np.inf)
        nearest.append(np.argsort(-similarity, axis=1)[:, :count])
    return float(np.mean([len(set(one) & set(other)) / count for one, other in zip(*nearest, strict=True)]))


def accuracies(model: SentenceTransformer, labelled: dict[str, list[tuple[str, str]]]) -> list[float]:
    found = []
    for pairs in labelled.values():
        texts, labels = zip(*pairs, strict=True)
        given = vectors(model, texts)
        classifier = LogisticRegression(max_iter=300, C=10).fit(given[:TRAINED], labels[:TRAINED])
        found.append(100 * classifier.score(given[TRAINED:], labels[TRAINED:]))
    return found


if __name__ == "__main__":
    main()
