"""What a profile costs beside one plain encoding, and beside the paper's procedure; how soon it can stop early.

    python benchmarks/profile_pass.py cost MODEL PAIRS --examples 640 --repeats 3
    python benchmarks/profile_pass.py sure PROFILE [PROFILE ...] [--batches 20]

``cost`` runs three workers in turn, each in a process of its own, all on the same rows and threads, and prints medians
of their ratios: processor seconds, which other work on the machine disturbs least, and peak resident memory (Linux),
counted from when the model is open, so that what opening takes hides nothing. ``encode`` is
``SentenceTransformer.encode`` of the profile's distinct texts in batches of about the profile's token budget;
``papers`` is L3Prune's procedure as its public code has it, in float32: per batch three padded passes with the states
of all layers kept. ``profile`` has all its columns: fixed costs (checks of the quick ways, the language-model head,
timing the parts) weigh more on few examples than on the usual 1280.

``sure`` replays the rule that stops ``--early-stopping`` on the losses by batch that profiles hold: a batch's losses
depend neither on when the rule stops nor on which batches stand before it, so no text is run again. Each of 20 seeds
draws as many batches as its data (20 are what ``--max-examples`` takes by default), in an order of its own, out of a
profile that holds more: ``secateur profile MODEL --data PAIRS --max-examples 3840 -o PROFILE`` has 60.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from secateur.choosing.selectors import lowest_in_each_half
from secateur.data.sources import Pairs, batches, read_pairs
from secateur.measures.intervals import has_converged, looks
from secateur.measures.metrics import contrastive_loss, cosines
from secateur.models.blocks import final_norm
from secateur.models.forward import BUDGET
from secateur.models.open_model import open_model
from secateur.profiling.profile import auto_dtype, profile
from secateur.results import Profile, load

SIZE = 64
SEEDS = 20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def run_encode(model, data: Pairs) -> None:
    rows = [row for batch in batches(data, SIZE) for row in zip(batch.anchors, batch.positives, strict=True)]
    anchors = sorted({anchor for anchor, _ in rows})
    others = sorted({text for batch in batches(data, SIZE) for text in (*batch.positives, *batch.negatives)})
    for texts, prompt in ((anchors, data.prompt), (others, data.passage_prompt)):
        tokens = model.preprocess(texts, prompt=prompt or None)["attention_mask"].sum(dim=1).float()
        size = max(1, int(BUDGET / tokens.mean()))
        model.encode(texts, prompt=prompt, batch_size=size, show_progress_bar=False)


@torch.inference_mode()
def run_papers(model, data: Pairs) -> None:
    """L3Prune's selection as its public code goes about it.

    Of each batch three passes (anchors, positives, negatives), padded on the left to the longest text; each text is
    tokenized once more alone, to find its part of the sequence; keys and values are kept; so are the states after
    every layer and, beside them, the normed ones; pooling weights are made text by text, at every depth.
    """
    transformer, tokenizer = model[0].auto_model, model.tokenizer
    norm = final_norm(transformer)
    tokenizer.padding_side = "left"
    sums = torch.zeros(transformer.config.num_hidden_layers)
    for batch in batches(data, SIZE):
        vectors = []
        for texts, prompt in ((batch.anchors, batch.prompt), (batch.positives, ""), (batch.negatives, "")):
            limit = {"truncation": True, "max_length": model.max_seq_length}
            whole = [prompt + text for text in texts]
            features = tokenizer(whole, padding=True, return_tensors="pt", **limit)
            lengths = [len(tokenizer(text, add_special_tokens=False, **limit)["input_ids"]) for text in texts]
            states = transformer(**features, output_hidden_states=True, use_cache=True).hidden_states[1:]
            # What transformers calls the last hidden state has gone through the norm already.
            normed = [*(norm(state) for state in states[:-1]), states[-1]]
            vectors.append([weighted_mean(state, lengths) for state in normed])
        for k, (a, p, n) in enumerate(zip(*vectors, strict=True)):
            sums[k] += contrastive_loss(cosines(a, torch.cat([p, n])), 20)


def weighted_mean(states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    weights = torch.zeros(states.shape[:2])
    for row, length in enumerate(lengths):
        weights[row, -length:] = torch.arange(length) + 1
        weights[row] /= weights[row].sum()
    return (states * weights.unsqueeze(-1)).sum(dim=1)


def work(kind: str, model: str, file: str, examples: int, instruction: str, dtype: str) -> dict:
    data = read_pairs(file, instruction=instruction)
    keep = [row for row in data.rows if row.negatives]
    data = Pairs(data.name, tuple(keep), data.prompt, data.passage_prompt, data.source).sample(examples, 0)
    opened = open_model(model, dtype="float32" if kind == "papers" else dtype, device="cpu")
    opened.encode(["warm up"] * 2)
    forget_peak()
    before = peak_megabytes()
    wall, processor = time.perf_counter(), time.process_time()
    if kind == "profile":
        profile(opened, data, max_examples=examples, batch_size=SIZE)
    else:
        {"encode": run_encode, "papers": run_papers}[kind](opened, data)
    return {
        "kind": kind,
        "seconds": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "peak": peak_megabytes(),
        "before": before,
    }


def cost(options: argparse.Namespace) -> None:
    runs: dict[str, list[dict]] = {}
    if options.dtype == "auto":
        options.dtype = str(auto_dtype()).removeprefix("torch.")
    print(f"profile and encode in {options.dtype}, the paper's procedure in float32")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)")
    for repeat in range(options.repeats):
        for kind in ("encode", "profile", "papers"):
            settings = [kind, options.model, options.pairs, str(options.examples), options.instruction, options.dtype]
            command = [sys.executable, __file__, "work", *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            runs.setdefault(kind, []).append(found)
            print(repeat, {key: round(v, 1) if isinstance(v, float) else v for key, v in found.items()}, flush=True)

    def ratio(one: str, other: str, key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(runs[one], runs[other], strict=True))

    for title, one, other, limit in (
        ("profile / encode", "profile", "encode", "at most 1.25"),
        ("papers / profile", "papers", "profile", "at least 2; 4 for short texts under an instruction of 20 tokens"),
    ):
        processor, wall = ratio(one, other, "processor"), ratio(one, other, "seconds")
        print(f"{title}: {processor:.2f} processor, {wall:.2f} wall ({limit})")
    print(f"profile / encode, peak memory: {ratio('profile', 'encode', 'peak'):.2f} (at most 1.3)")


def sure(options: argparse.Namespace) -> None:
    for name in options.profiles:
        pool_of = torch.tensor(load(name, Profile).batch_losses, dtype=torch.float64)
        whole = options.batches
        if whole >= len(pool_of):
            raise SystemExit(f"{name} has {len(pool_of)} batches, too few to draw {whole}: profile more examples")
        same, read = 0, []
        for seed in range(SEEDS):
            losses = pool_of[random.Random(seed).sample(range(len(pool_of)), whole)]
            full = lowest_in_each_half(losses.mean(dim=0)).tolist()
            tests = looks(whole)
            stop = next((n for n in tests if has_converged(losses[:n], len(tests))), whole)
            early = lowest_in_each_half(losses[:stop].mean(dim=0)).tolist()
            same += early == full
            read.append(stop / whole)
            print(f"seed {seed}: {full} of all {whole} batches, {early} after {stop}")
        print(f"{Path(name).name}: the same choice on {same} of {SEEDS} (at least 19)")
        print(f"  read {statistics.mean(read):.0%} on average (at most half), {max(read):.0%} at most;")
        print(f"  at most half on {sum(share <= 0.5 for share in read)} of {SEEDS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cost")
    one.add_argument("model")
    one.add_argument("pairs")
    one.add_argument("--examples", type=int, default=640)
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--instruction", default="")
    one.add_argument("--dtype", default="auto", help="auto: as a profile decides")
    other = commands.add_parser("sure")
    other.add_argument("profiles", nargs="+")
    other.add_argument("--batches", type=int, default=20)
    if sys.argv[1:2] == ["work"]:
        kind, model, file, examples, instruction, dtype = sys.argv[2:]
        print(json.dumps(work(kind, model, file, int(examples), instruction, dtype)))
        return
    options = parser.parse_args()
    {"cost": cost, "sure": sure}[options.command](options)


if __name__ == "__main__":
    main()
