"""What serving costs, and whether every request is answered once: two runs against a server in a process of its own.

    python benchmarks/serve.py MODEL                   # both runs
    python benchmarks/serve.py MODEL --only speed      # throughput at 32 clients ÷ encoding the same texts directly
    python benchmarks/serve.py MODEL --only answers    # 10,000 requests, encoders killed and stopped, clients leaving
    python benchmarks/serve.py MODEL --texts 64 --requests 1000    # both, shorter

Speed: texts of mixed lengths, one a request, in turns with two ways to encode them directly: secateur's own, in the
arithmetic that the server has found to be the quickest, and ``SentenceTransformer.encode`` at the best of several batch
sizes.
Answers: each request has a text of its own and the vector that comes back is compared with the model's.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import queue
import random
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from secateur import open_model
from secateur.inference.backends import open_encoder
from secateur.inference.encoders import Opening

WORDS = (
    "hedge",
    "shears",
    "branch",
    "root",
    "graft",
    "bud",
    "leaf",
    "bark",
    "prune",
    "vine",
    "orchard",
    "frost",
    "soil",
)
BATCH_SIZES = (8, 32, 128)


def main() -> None:
    args = arguments()
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors before; OMP_NUM_THREADS={omp()}")
    if args.only in (None, "speed"):
        speed(args)
    if args.only in (None, "answers"):
        answers(args)
    print(f"load {os.getloadavg()[0]:.2f} after")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--only", choices=["speed", "answers"])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--texts", type=int, default=512, help="texts in a timed round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="encoder processes of the speed run")
    parser.add_argument("--requests", type=int, default=10_000, help="of the answers run")
    parser.add_argument("--kills", type=int, default=6, help="encoders killed or stopped, in turn, in the answers run")
    parser.add_argument("--seconds", type=float, default=600, help="at most this long for the answers run")
    return parser.parse_args()


def omp() -> str:
    return os.environ.get("OMP_NUM_THREADS", "unset")


def made_texts(count: int, words: tuple[int, int], seed: int) -> list[str]:
    """Distinct texts, of uniformly drawn numbers of words."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(*words))) for i in range(count)]


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[tuple[psutil.Process, str, int, Opening]]:
    """A server that listens: its process, host, port, and how it has opened the model."""
    command = [sys.executable, "-m", "secateur", "serve", model, "--name", "model", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        lines = (json.loads(line) for line in process.stderr)
        told = next(line for line in lines if line["event"] == "serving")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        host, _, port = told["address"].removeprefix("http://").rpartition(":")
        yield (
            psutil.Process(process.pid),
            host,
            int(port),
            Opening(model, told["dtype"], device="cpu", backend=told["backend"]),
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@dataclass
class Outcomes:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)


def ask(connection: http.client.HTTPConnection, text: str) -> None:
    body = json.dumps({"model": "model", "input": text, "encoding_format": "base64"})
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})


def client(host: str, port: int, work: queue.SimpleQueue[tuple[int, str]], leaving: float, outcomes: Outcomes) -> None:
    """Ask, one request after the other on one connection; leave some of them before they are answered."""
    rng = random.Random(threading.get_ident())
    connection = http.client.HTTPConnection(host, port, timeout=120)
    while True:
        try:
            number, text = work.get_nowait()
        except queue.Empty:
            return connection.close()
        start = time.perf_counter()
        try:
            ask(connection, text)
            if rng.random() < leaving:
                time.sleep(rng.random() * 0.05)
                connection.close()
                outcomes.counts["left"] += 1
                continue
            with connection.getresponse() as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            outcomes.counts[f"lost ({type(error).__name__})"] += 1
            connection.close()
            continue
        outcomes.seconds.append(time.perf_counter() - start)
        if response.status != 200:
            outcomes.counts[f"lost ({response.status})"] += 1
            continue
        outcomes.counts["answered"] += 1
        raw = base64.b64decode(json.loads(content)["data"][0]["embedding"])
        outcomes.counts["twice"] += number in outcomes.vectors
        outcomes.vectors[number] = np.frombuffer(raw, dtype="<f4")
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            outcomes.counts["twice"] += 1  # something follows the answer


def crowd(host: str, port: int, texts: Sequence[str], clients: int, leaving: float = 0) -> tuple[Outcomes, list]:
    work: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    for item in enumerate(texts):
        work.put(item)
    outcomes = Outcomes()
    arguments = (host, port, work, leaving, outcomes)
    threads = [threading.Thread(target=client, args=arguments, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    return outcomes, threads


def speed(args: argparse.Namespace) -> None:
    model = open_model(args.model, device="cpu")
    texts = made_texts(args.texts, (4, 60), seed=0)
    tokens = sum(len(ids) for ids in model.tokenizer(texts)["input_ids"])
    print(f"speed: {len(texts)} texts, {tokens} tokens, {args.clients} clients, {args.workers} encoder processes")
    rates: dict[str, list[float]] = {"server": [], "encode": [], "sentence-transformers": []}
    waits: list[float] = []
    with server(args.model, "--workers", str(args.workers)) as (_, host, port, opening):
        fast = open_encoder(opening)
        print(f"  the server takes {opening.backend} {opening.dtype}")
        expected = model.encode(texts, batch_size=32)
        crowd_and_wait(host, port, texts[: args.clients * 2], args.clients)  # warm-up
        fast.encode_texts(texts[: args.clients * 2])
        for _ in range(args.rounds):
            seconds, outcomes = crowd_and_wait(host, port, texts, args.clients)
            waits += outcomes.seconds
            check(outcomes, expected)
            if outcomes.counts["answered"] != len(texts) or outcomes.counts["wrong"]:
                raise SystemExit(f"not every text was answered rightly: {dict(outcomes.counts)}")
            best = min(timed(model, texts, size) for size in BATCH_SIZES)
            for way, took in zip(rates, (seconds, timed_fast(fast, texts), best), strict=True):
                rates[way].append(len(texts) / took)
    tell_speed(rates)
    print(f"  latency  p50 {np.percentile(waits, 50) * 1e3:.0f} ms, p99 {np.percentile(waits, 99) * 1e3:.0f} ms")


def tell_speed(rates: dict[str, list[float]]) -> None:
    """Texts per second, medians of the rounds, and the server's as a ratio to each other way within a round."""
    served = rates["server"]
    for way, found in rates.items():
        each = [s / d for s, d in zip(served, found, strict=True)]
        told = ", ".join(f"{ratio:.2f}" for ratio in each)
        ratio = f"; server: {statistics.median(each):.2f} of it (aim 0.9; each round {told})"
        print(f"  {way:22} {statistics.median(found):8.1f} texts/s{'' if way == 'server' else ratio}")


def timed(model, texts: Sequence[str], batch_size: int = 32) -> float:
    start = time.perf_counter()
    model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
    return time.perf_counter() - start


def timed_fast(encoder, texts: Sequence[str]) -> float:
    start = time.perf_counter()
    encoder.encode_texts(texts)
    return time.perf_counter() - start


def crowd_and_wait(host: str, port: int, texts: Sequence[str], clients: int) -> tuple[float, Outcomes]:
    start = time.perf_counter()
    outcomes, threads = crowd(host, port, texts, clients)
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, outcomes


def check(outcomes: Outcomes, expected: np.ndarray) -> None:
    """Every vector is that of its text, and of no other."""
    for number, vector in outcomes.vectors.items():
        cosine = vector @ expected[number] / np.linalg.norm(vector) / np.linalg.norm(expected[number])
        outcomes.counts["wrong"] += not cosine > 0.999


def answers(args: argparse.Namespace) -> None:
    model = open_model(args.model, device="cpu")
    texts = made_texts(args.requests, (1, 6), seed=1)
    expected = model.encode(texts, batch_size=128, show_progress_bar=False)
    start, killed = time.perf_counter(), 0
    with server(args.model, "--workers", "2") as (process, host, port, _):
        outcomes, threads = crowd(host, port, texts, args.clients, leaving=0.05)
        while any(thread.is_alive() for thread in threads) and time.perf_counter() - start < args.seconds:
            done = sum(outcomes.counts.values())
            if killed < args.kills and done >= (killed + 1) * args.requests / (args.kills + 1):
                encoders = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
                unlucky = random.Random(killed).choice(encoders)
                unlucky.send_signal(signal.SIGSTOP if killed % 2 else signal.SIGKILL)
                killed += 1
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        restarts = metric(host, port, "secateur_encoder_restarts_total")
        left_in_queue = metric(host, port, "secateur_queue_tokens")
    check(outcomes, expected)
    asked = sum(count for what, count in outcomes.counts.items() if what not in ("twice", "wrong"))
    print(f"answers: {asked} of {args.requests} requests in {seconds:.0f} s, {args.clients} clients")
    print(
        f"  encoders killed or stopped {killed}, replaced {restarts:.0f}; tokens left in the queue {left_in_queue:.0f}"
    )
    print("  " + ", ".join(f"{what} {count}" for what, count in sorted(outcomes.counts.items())))
    print(f"  latency  p50 {np.percentile(outcomes.seconds, 50) * 1e3:.0f} ms, ", end="")
    print(f"p99 {np.percentile(outcomes.seconds, 99) * 1e3:.0f} ms, max {max(outcomes.seconds):.1f} s")
    good = outcomes.counts["answered"] + outcomes.counts["left"] == args.requests
    if not good or outcomes.counts["twice"] or outcomes.counts["wrong"]:
        raise SystemExit("a request was lost, answered twice, or answered wrongly")


def metric(host: str, port: int, name: str) -> float:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
