"""What ``secateur encode`` gains on ``SentenceTransformer.encode``, and how near it comes to what the processor can do.

    python benchmarks/encode.py FULL OTHER --depths 24 7  # ratios; cuts of the first model are divided by it
    python benchmarks/encode.py FULL OTHER --depths 7 --texts 48 --rounds 2    # the same in some ten minutes
    python benchmarks/encode.py FULL OTHER --depths 24 7 --ways auto int8    # what auto takes at 0.9999 and at 0.98
    python benchmarks/encode.py FULL --depths 24 7 --only-cuts    # what depth costs, alone
    python benchmarks/encode.py --rows 1000000            # memory of a large run, killed five times and resumed

Ratios, for each model: ``encode`` to the model's own ``encode`` at its best batch size, on texts of mixed lengths and
on short queries under one instruction, with the least cosine between their vectors; useful FLOPs per second to those of
a matrix product in the same number format; and for each cut, documents per second to those of the first model, divided
by the ratio of FLOPs.

Every variant runs in turn, round by round, in one process, which keeps freed memory as the command does (the model's
own ``encode`` is quicker for it, too); the median of the rounds counts.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from secateur import open_model, prune
from secateur.inference.backends import choose
from secateur.inference.encode import SAMPLE, SHARD
from secateur.inference.encoders import AUTO, Opening
from secateur.inference.workers import keep_freed_memory
from secateur.measures.costs import flops_per_token
from secateur.measures.metrics import paired_cosines
from secateur.models import model_label
from secateur.runtime.core import CPU_BATCH, Encoder

WORDS = ("the", "of", "and", "to", "a", "hedge", "shears", "branch", "root", "graft", "bud", "leaf", "bark", "soil")
INSTRUCTION = "Given a question of somebody who keeps a garden, retrieve the passages that answer it best;\n"
BATCH_SIZES = (4, 8, 16, 32, 64)
MARKS = (10_000, 30_000, 100_000, 200_000, 300_000, 500_000, 700_000)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WAYS = {
    "auto": (Opening("", AUTO), 0.9999),
    "int8": (Opening("", AUTO), 0.98),
    "torch": (Opening("", AUTO, backend="torch"), 0.9999),
    "float32": (Opening("", "float32", backend="torch"), 0.9999),
    "bfloat16": (Opening("", "bfloat16", backend="torch"), 0.999),
}
"""How each is opened, and the cosine that it is to keep; ``int8`` is what ``auto`` takes with a lower one."""
AIM = 3.5
"""Times as many texts per second as the model's own ``encode`` in float32."""


def main() -> None:
    args = arguments()
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors before, {torch.get_num_threads()} threads")
    if args.rows:
        large(args)
    else:
        keep_freed_memory()
        with tempfile.TemporaryDirectory() as scratch:
            cuts = [str(prune(args.models[0], depth, out=Path(scratch) / f"{depth} layers")) for depth in args.depths]
            ratios(args.models, cuts, Path(scratch), args)
    print(f"load {os.getloadavg()[0]:.2f} after")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="also cut the first model to these depths")
    parser.add_argument("--texts", type=int, default=256, help="texts in a timed round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[CPU_BATCH], help="budgets to try")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--ways", nargs="+", default=["auto", "int8", "torch", "float32"], choices=list(WAYS))
    parser.add_argument("--only-cuts", action="store_true", help="compare the cuts with the first model, and no more")
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


def ratios(models: Sequence[str], cuts: Sequence[str], scratch: Path, args: argparse.Namespace) -> None:
    names = (*models[:1], *cuts) if args.only_cuts else (*models, *cuts)
    opened = {name: open_all(name, scratch, args) for name in names}
    for name, (own, ways) in () if args.only_cuts else opened.items():
        print(f"\n{model_label(name)}", flush=True)
        compare("mixed lengths", own, ways, mixed_lengths(args.texts), "", args)
        compare("queries under an instruction", own, ways, queries(args.texts), INSTRUCTION, args)
        against_peak(own, ways, args)
    for way in opened[models[0]][1] if cuts else ():
        against_first({model_label(name): opened[name] for name in (models[0], *cuts)}, way, args)


def open_all(name: str, scratch: Path, args: argparse.Namespace) -> tuple[Any, dict[str, Encoder]]:
    """The model itself; and its encoders, whose conversions are kept in a copy of its folder."""
    print(f"\nopens {model_label(name)}", flush=True)
    own, copy = open_model(name, device="cpu", dtype="float32"), scratch / f"{model_label(name)} copied"
    own.save(str(copy))
    sample = [*mixed_lengths(SAMPLE // 2), *(INSTRUCTION + text for text in queries(SAMPLE // 2))]
    ways = {}
    for budget in args.batch_tokens:
        for way in args.ways:
            opening, least = WAYS[way]
            opening = replace(opening, model=str(copy), device="cpu", batch_tokens=budget)
            chosen = choose(opening, least, sample)
            taken = chosen.told or f"{chosen.opening.backend} {chosen.opening.dtype}"
            print(f"  {way} takes {taken}", flush=True)
            ways[f"{way}, {budget} tokens"] = chosen.encoder
    return own, ways


def compare(
    what: str,
    own: Any,
    ways: dict[str, Any],
    texts: Sequence[str],
    prompt: str,
    args: argparse.Namespace,
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
        cosine = WAYS[way.partition(",")[0]][1]
        gain = f"{best.median / found.median:.2f} times (aim {AIM}; each round {each})"
        kept = f"cosine ≥ {least:.6f} (aim {cosine})"
        print(f"    {way:24} {len(texts) / found.median:8.1f} texts/s, {gain}, {kept}")


def own_encode(model: Any, size: int) -> Callable[[Sequence[str], str], np.ndarray]:
    return lambda texts, prompt: model.encode(list(texts), prompt=prompt, batch_size=size, show_progress_bar=False)


def fast_encode(encoder: Encoder) -> Callable[[Sequence[str], str], np.ndarray]:
    return lambda texts, prompt: encoder.encode_texts(list(texts), prompt)


def run_in_turn(variants: dict[str, Variant], texts: Sequence[str], prompt: str, args: argparse.Namespace) -> None:
    clock = CLOCKS[args.clock]
    for variant in variants.values():
        variant.run(texts[: max(32, len(texts) // 8)], prompt)  # prepares kernels
    for _ in range(args.rounds):
        for variant in variants.values():
            start = clock()
            variant.vectors = variant.run(texts, prompt)
            variant.seconds.append(clock() - start)


def peaks(args: argparse.Namespace) -> dict[torch.dtype, float]:
    return {dtype: peak(dtype, CLOCKS[args.clock]) for dtype in (torch.float32, torch.bfloat16)}


def peak(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations per second of a matrix product of the size that models ask for, at its quickest."""
    states, weights = torch.randn(1024, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    seconds = []
    for _ in range(20):
        start = clock()
        torch.nn.functional.linear(states, weights)
        seconds.append(clock() - start)
    return 2 * 1024 * 1024 * 4096 / min(seconds)


def against_peak(own: Any, ways: dict[str, Any], args: argparse.Namespace) -> None:
    """Useful operations per second on documents of some 200 tokens, to those of matrix products before and after."""
    texts = documents(max(16, args.texts // 8))
    variants = {way: Variant(fast_encode(fast), []) for way, fast in ways.items()}
    before = peaks(args)
    run_in_turn(variants, texts, "", args)
    after = peaks(args)
    for way, variant in variants.items():
        rate = flops_of(own, texts) / variant.median
        dtype = precision_of(ways[way])
        of = (before[dtype] + after[dtype]) / 2
        told = f"{rate / of:.2f} of the {of / 1e9:.0f} of matrix products (aim 0.6)"
        print(f"  documents: {way:24} {rate / 1e9:6.1f} useful GFLOP/s, {told}")


def against_first(opened: dict[str, tuple[Any, dict[str, Any]]], way: str, args: argparse.Namespace) -> None:
    """Documents per second of each cut to those of the first model, all in turn, beside the ratio of operations."""
    texts = documents(max(16, args.texts // 8))
    variants = {label: Variant(fast_encode(ways[way]), []) for label, (_, ways) in opened.items()}
    run_in_turn(variants, texts, "", args)
    costs = {label: flops_of(own, texts) for label, (own, _) in opened.items()}
    first, *cuts = variants
    for cut in cuts:
        quicker = statistics.median(a / b for a, b in zip(variants[first].seconds, variants[cut].seconds, strict=True))
        cheaper = costs[first] / costs[cut]
        print(
            f"{cut} ÷ {first}, {way}: {quicker:.2f} times the texts for 1/{cheaper:.2f} of the FLOPs: "
            f"{quicker / cheaper:.2f} (aim 0.9)"
        )


def flops_of(own: Any, texts: Sequence[str]) -> float:
    tokens = [len(ids) for ids in own.tokenizer(texts, truncation=True, max_length=own.max_seq_length)["input_ids"]]
    (each,), _ = flops_per_token(own, round(statistics.mean(tokens)))
    return float(each * sum(tokens))


def precision_of(encoder: Encoder) -> torch.dtype:
    """Of int8, too, the rate of bfloat16 is what it is compared with."""
    return torch.float32 if encoder.dtype == "float32" else torch.bfloat16


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
        partial = out.with_name("vectors.npy.partial")
        hundredth = max(1, args.rows // SHARD // 100)
        run_and_watch(command, partial, until=lambda: (partial / "places.npy").exists(), when="while it read")
        for shards in (hundredth, 2 * hundredth, 3 * hundredth):
            file = partial / f"{shards:08d}.npy"
            run_and_watch(command, partial, until=file.exists, when=f"once {file.name} was there")
        memory = run_and_watch(command, partial, until=(partial / "result").exists, when="while it wrote the result")
        tell(memory, args.rows)
        print(f"finishing: {max(each.resident for each in run_and_watch(command, partial)) / 1e6:.0f} MB at most")
        check_rows(model, np.load(out, mmap_mode="r"), args.rows)


@dataclass(frozen=True)
class Memory:
    """What a process held at some moment, in bytes: resident, and of that its own (no files); and its finished rows."""

    rows: int
    resident: int
    own: int


def run_and_watch(
    command: list[str], partial: Path, until: Callable[[], bool] | None = None, when: str = ""
) -> list[Memory]:
    """Run to the end, or until something is so and then kill; its memory, four times a second.

    What is to be killed is watched once it has encoded something: before, it is smaller than it will be.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    known, memory, looked = psutil.Process(process.pid), [], 0.0
    before = len(list(partial.glob("0*.npy")))
    while process.poll() is None and not (until and until()):
        if time.monotonic() - looked > 0.25:
            looked = time.monotonic()
            shards = len(list(partial.glob("0*.npy")))
            found = known.memory_full_info()
            if until is None or shards > before + 1:
                memory.append(Memory(shards * SHARD, found.rss, found.uss))
        time.sleep(0.005)
    if until is None:
        assert process.returncode == 0, "the run failed"
        return memory
    assert process.poll() is None, f"the run ended before it was killed {when}"
    process.kill()
    process.wait()
    print(f"killed {when}", flush=True)
    return memory


def tell(memory: Sequence[Memory], rows: int) -> None:
    """Memory at some numbers of rows: the median of what was seen between the one before and it."""
    before = 0
    for mark in (*(mark for mark in MARKS if mark < rows), rows):
        seen = [each for each in memory if before <= each.rows <= mark + SHARD]
        if seen:
            resident = statistics.median(each.resident for each in seen) / 1e6
            own = statistics.median(each.own for each in seen) / 1e6
            print(f"encoding: to row {mark:9,}: {resident:.0f} MB resident, {own:.0f} MB of them its own")
        before = mark
    print(f"encoding: {max(each.resident for each in memory) / 1e6:.0f} MB at most")


def made(row: int) -> str:
    """A short text that is this row's alone."""
    return f"row {row} {hashlib.sha256(str(row).encode()).hexdigest()[: row % 12]}"


def tiny_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import tiny_transformer

    model = open_model(tiny_transformer(folder.with_name("plain"), "llama", depth=2), pooling="mean", device="cpu")
    model.save(str(folder))
    return folder


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
