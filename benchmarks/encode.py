"""What ``secateur encode`` gains on ``SentenceTransformer.encode``, and how near it comes to what the processor can do.

    python benchmarks/encode.py FULL [CUT ...]            # ratios; the other models are divided by the first
    python benchmarks/encode.py --rows 1000000            # memory of a large run, killed five times and resumed

Ratios: every variant runs in turn, round by round, in one process; the median of the rounds counts.
``--clock cpu`` counts the process's own processor time, for a machine that is busy (with one thread only).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from secateur import accelerate, open_model
from secateur.encoding.engine import BATCH_TOKENS, use_mixed_products
from secateur.loading.models import model_label
from secateur.measures.flops import flops_per_token
from secateur.measures.metrics import paired_cosines

WORDS = ("the", "of", "and", "to", "a", "hedge", "shears", "branch", "root", "graft", "bud", "leaf", "bark", "soil")
INSTRUCTION = "Given a question of somebody who keeps a garden, retrieve the passages that answer it best; "
BATCH_SIZES = (4, 8, 16, 32, 64)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
AIMS = {"float32": 1.5, "mixed": 1.5, "bfloat16": 2.5}


def main() -> None:
    args = arguments()
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors before, {torch.get_num_threads()} threads")
    if args.rows:
        large(args)
    else:
        ratios(args)
    print(f"load {os.getloadavg()[0]:.2f} after")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--texts", type=int, default=256, help="texts in a timed round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[BATCH_TOKENS], help="budgets to try")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--dtypes", nargs="+", default=list(AIMS), choices=list(AIMS))
    parser.add_argument("--rows", type=int, help="rows of the large run, on a tiny random model")
    args = parser.parse_args()
    if not args.rows and not args.models:
        parser.error("name a model, or --rows")
    return args


# --- ratios ----------------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """One way to encode: ``run(texts, prompt)``, and the seconds that it took in each round."""

    run: Callable[[Sequence[str], str], np.ndarray]
    seconds: list[float]
    vectors: np.ndarray | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def mixed_lengths(count: int) -> list[str]:
    """Distinct texts of 3 to 200 words, most of them short."""
    rng = random.Random(0)
    lengths = [int(min(200, max(3, rng.lognormvariate(3.2, 0.8)))) for _ in range(count)]
    return [f"{i} " + " ".join(rng.choices(WORDS, k=length)) for i, length in enumerate(lengths)]


def queries(count: int) -> list[str]:
    rng = random.Random(1)
    return [f"{' '.join(rng.choices(WORDS, k=rng.randint(3, 6)))} {i}?" for i in range(count)]


def documents(count: int) -> list[str]:
    rng = random.Random(2)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=180)) for i in range(count)]


def ratios(args: argparse.Namespace) -> None:
    peaks = {name: peak(dtype) for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
    print("matrix products: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in peaks.items()))
    rates: dict[str, dict[str, float]] = {}
    costs: dict[str, float] = {}
    for name in args.models:
        print(f"\n{model_label(name)}")
        own, ways = open_ways(name, args)
        compare("mixed lengths", own, ways, mixed_lengths(args.texts), "", args)
        compare("queries under an instruction", own, ways, queries(args.texts), INSTRUCTION, args, aim=3)
        rates[name], costs[name] = against_peak(own, ways, peaks, args)
    first = args.models[0]
    for name in args.models[1:]:
        for way, rate in rates[name].items():
            quicker, cheaper = rate / rates[first][way], costs[first] / costs[name]
            print(
                f"{model_label(name)} ÷ {model_label(first)}, {way}: {quicker:.2f} times the texts for "
                f"1/{cheaper:.2f} of the FLOPs: {quicker / cheaper:.2f} (aim 0.9)"
            )


def open_ways(name: str, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    own = open_model(name, device="cpu", dtype="float32")
    ways = {}
    for budget in args.batch_tokens:
        for dtype in args.dtypes:
            model = (
                own if dtype == "float32" else open_model(name, device="cpu", dtype=dtype.replace("mixed", "float32"))
            )
            if dtype == "mixed":
                use_mixed_products(model)
            ways[f"{dtype}, {budget} tokens"] = accelerate(model, batch_tokens=budget)
    return own, ways


def compare(
    what: str,
    own: Any,
    ways: dict[str, Any],
    texts: Sequence[str],
    prompt: str,
    args: argparse.Namespace,
    aim: float = 0,
) -> None:
    """Time all ways on the same texts, and divide the best batch size of the model's own ``encode`` by each."""
    variants = {f"own, batches of {size}": Variant(own_encode(own, size), []) for size in BATCH_SIZES}
    variants |= {way: Variant(fast_encode(fast), []) for way, fast in ways.items()}
    run_in_turn(variants, texts, prompt, args)
    best = min((v for key, v in variants.items() if key.startswith("own")), key=lambda variant: variant.median)
    label = next(key for key, variant in variants.items() if variant is best)
    print(f"  {what}: {label}: {len(texts) / best.median:.1f} texts/s")
    for way in ways:
        found = variants[way]
        each = ", ".join(f"{b / s:.2f}" for b, s in zip(best.seconds, found.seconds, strict=True))
        least = paired_cosines(found.vectors, best.vectors).min()
        goal = aim or AIMS[way.partition(",")[0]]
        gain = f"{best.median / found.median:.2f} times (aim {goal}; each round {each})"
        print(f"    {way:24} {len(texts) / found.median:8.1f} texts/s, {gain}, cosine ≥ {least:.6f}")


def own_encode(model: Any, size: int) -> Callable[[Sequence[str], str], np.ndarray]:
    return lambda texts, prompt: model.encode(list(texts), prompt=prompt, batch_size=size, show_progress_bar=False)


def fast_encode(model: Any) -> Callable[[Sequence[str], str], np.ndarray]:
    return lambda texts, prompt: model.encode(list(texts), prompt=prompt, show_progress_bar=False)


def run_in_turn(variants: dict[str, Variant], texts: Sequence[str], prompt: str, args: argparse.Namespace) -> None:
    clock = CLOCKS[args.clock]
    for variant in variants.values():
        variant.run(texts[: max(32, len(texts) // 8)], prompt)  # prepares kernels
    for _ in range(args.rounds):
        for variant in variants.values():
            start = clock()
            variant.vectors = variant.run(texts, prompt)
            variant.seconds.append(clock() - start)


def peak(dtype: torch.dtype) -> float:
    """Operations per second of a matrix product of the size that models ask for, at its quickest."""
    states, weights = torch.randn(1024, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(states, weights)
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 1024 * 4096 / min(seconds)


def against_peak(
    own: Any, ways: dict[str, Any], peaks: dict[str, float], args: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Useful operations per second on documents of some 200 tokens; texts per second of each way, FLOPs per text."""
    texts = documents(max(16, args.texts // 8))
    tokens = [len(ids) for ids in own.tokenizer(texts, truncation=True, max_length=own.max_seq_length)["input_ids"]]
    each, _ = flops_per_token(own, round(statistics.mean(tokens)))
    variants = {way: Variant(fast_encode(fast), []) for way, fast in ways.items()}
    run_in_turn(variants, texts, "", args)
    for way, variant in variants.items():
        rate = each * sum(tokens) / variant.median
        of = peaks["float32" if way.startswith("float32") else "bfloat16"]
        print(f"  documents: {way:24} {rate / 1e9:6.1f} useful GFLOP/s, {rate / of:.2f} of matrix products (aim 0.6)")
    rates = {way: len(texts) / variant.median for way, variant in variants.items()}
    return rates, each * sum(tokens) / len(texts)


# --- a large run -----------------------------------------------------------------------------------------------------


def large(args: argparse.Namespace) -> None:
    """Encode made rows with a tiny random model, killed five times; memory, order and number of rows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = tiny_model(folder / "model")
        texts, out = folder / "texts.jsonl", folder / "vectors.npy"
        with texts.open("w") as stream:
            for row in range(args.rows):
                stream.write(json.dumps({"text": made(row)}) + "\n")
        command = [sys.executable, "-m", "secateur", "encode", str(model), str(texts), "-o", str(out)]
        shards = -(-args.rows // 2048)
        for kill in range(1, 6):
            wait_and_kill(command, out.with_name("vectors.npy.partial") / f"{shards * kill // 6:08d}.npy")
        memory = watch(command)
        tenth = max(1, len(memory) // 10)
        early, late = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
        told = ", ".join(f"{value / 1e6:.0f} MB {when}" for value, when in ((early, "early"), (late, "at the end")))
        print(f"last run: {told}, {max(memory) / 1e6:.0f} MB at most")
        check_rows(model, np.load(out, mmap_mode="r"), args.rows)


def made(row: int) -> str:
    """A short text that is this row's alone."""
    return f"row {row} {hashlib.sha256(str(row).encode()).hexdigest()[: row % 12]}"


def tiny_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import tiny_transformer

    model = open_model(tiny_transformer(folder.with_name("plain"), "llama", depth=2), pooling="mean", device="cpu")
    model.save(str(folder))
    return folder


def wait_and_kill(command: list[str], file: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not file.exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, f"the run ended before {file.name}"
    process.kill()
    process.wait()
    print(f"killed once {file.name} was there")


def watch(command: list[str]) -> list[int]:
    """Run to the end; its resident memory, ten times a second."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    known, memory = psutil.Process(process.pid), []
    while process.poll() is None:
        memory.append(known.memory_info().rss)
        time.sleep(0.1)
    assert process.returncode == 0
    return memory


def check_rows(model: Path, vectors: np.ndarray, rows: int) -> None:
    """Each row once, in order: a sample over all of them, against the model's own ``encode``."""
    assert len(vectors) == rows, f"{len(vectors)} rows of {rows}"
    sample = sorted(random.Random(0).sample(range(rows), min(rows, 5000)))
    expected = open_model(model, device="cpu").encode([made(row) for row in sample], show_progress_bar=False)
    least = paired_cosines(vectors[sample], expected).min()
    print(f"{rows} rows; {len(sample)} of them compared with the model's own: cosine ≥ {least:.6f}")
    assert least >= 0.9999, "a row has not its own vector"


if __name__ == "__main__":
    main()
