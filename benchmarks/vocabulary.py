"""How fast tokens are counted and chosen, and in how much memory: made texts, SIZE megabytes and four times as many.

python benchmarks/vocabulary.py MODEL [--megabytes 50]
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from secateur.vocabulary.choice import count_tokens, read_vocabulary

WORDS = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--megabytes", type=int, default=50)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    vocabulary = read_vocabulary(str(args.model), tokenizer)
    for megabytes in (args.megabytes, 4 * args.megabytes):
        started = time.perf_counter()
        counts = count_tokens(vocabulary.tokenizer, [made(megabytes * 1_000_000)])
        counted = time.perf_counter()
        order = list(vocabulary.order(counts.counted, vocabulary.needed(counts.counted)))
        chosen = time.perf_counter() - counted
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        rate = megabytes / (counted - started)
        print(
            f"{megabytes} MB: {rate:.2f} MB/s, so {1000 / rate / 60:.0f} minutes for 1 GB; "
            f"order of {len(order)} tokens {chosen:.1f} s; peak {peak:.2f} GB",
            flush=True,
        )


def made(characters: int) -> Iterator[str]:
    """Texts of some 400 characters: words of three to nine letters, as frequent as Zipf's law has it."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("etaoinshrdlucmfwypvbgkqjxz", k=drawn.randint(3, 9))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    done = 0
    while done < characters:
        for start in range(0, 64_000, 64):
            if start == 0:
                block = drawn.choices(words, weights, k=64_000)
            text = " ".join(block[start : start + 64])
            done += len(text)
            yield text
            if done >= characters:
                return


if __name__ == "__main__":
    main()
