"""secateur beside other software that encodes texts: the same weights, the same texts, in turn.

    python benchmarks/peers.py MODEL... --cache FOLDER                 # speeds, cosines, memory, loading
    python benchmarks/peers.py MODEL... --cache FOLDER --serving       # servers, under many clients
    python benchmarks/peers.py MODEL --cache FOLDER --seconds 0.2 --rounds 1 --only fastembed    # whether it works

``MODEL`` is a folder; llama.cpp and CTranslate2 want it pooled by its mean (``secateur prune ... --pooling mean``).
Each peer has an environment of its own, made in FOLDER/environments from package registries (4 GB in all; point pip to
a CPU build of torch), and runs in a process of its own (``peers/*_peer.*``), stopped while others run. What it reads
(ONNX, GGUF, ...) is made once, in FOLDER/forms. One that cannot be installed, converted for or loaded gets a row that
says why.

A round is as many texts as sentence-transformers encodes in float32 in ``--seconds``. Rates are medians of the rounds,
ratios medians of ratios within a round, and each peer uses the best of its batch sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from secateur import export, open_model
from secateur.errors import SecateurError
from secateur.measures.metrics import paired_cosines
from secateur.studies.demo import TRAIN_PACKAGES, pairs_of

HERE = Path(__file__).resolve().parent / "peers"
ST, FE, CT2, JS, LLAMA = "sentence-transformers", "fastembed", "ctranslate2", "transformers.js", "llama.cpp"
PYTHON = {
    # With what the converters for CTranslate2 and llama.cpp want.
    ST: ("torch==2.13.0", f"{ST}==6.2.0", "transformers==5.23.0", "ctranslate2==4.8.5", "sentencepiece==0.2.3"),
    FE: ("fastembed==0.9.1",),
    CT2: ("ctranslate2==4.8.5", "tokenizers==0.23.3"),
    "infinity": ("torch==2.13.0", "infinity-emb[server,torch]==0.0.78"),
}
NODE = {
    # What is optional are its builds for GPUs, 640 MB.
    LLAMA: ("--omit=optional", "node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"),
    JS: ("@huggingface/transformers@4.3.2",),
}
CONVERTER = "llama-cpp-python==0.3.36"
"""Its source holds llama.cpp's converter."""
SIZES = (1, 4, 8, 16, 32)
EXACT = 0.9999
SECONDS_AT_MOST = 1800
"""For a peer to load, or to encode."""


class Unavailable(Exception):
    """Why a peer has no figures."""


@dataclass(frozen=True)
class Peer:
    """A row of the table: a script in an environment (none: this one), and the form of model that it reads."""

    label: str
    environment: str
    script: str
    form: str = "model"
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: Sequence[int] = SIZES


REFERENCE = Peer(f"{ST}, float32", ST, "sentence_transformers_peer.py", settings={"dtype": "float32"})
PEERS = (
    Peer(f"{ST}, bfloat16", ST, "sentence_transformers_peer.py", settings={"dtype": "bfloat16"}),
    Peer(f"{FE}, float32", FE, "fastembed_peer.py", "onnx float32", {"file": "onnx/model.onnx"}),
    Peer(f"{FE}, int8", FE, "fastembed_peer.py", "onnx int8", {"file": "onnx/model_quantized.onnx"}),
    Peer(f"{JS}, float32", JS, "transformers_js_peer.mjs", "onnx float32", {"dtype": "fp32"}),
    Peer(f"{JS}, int8", JS, "transformers_js_peer.mjs", "onnx int8", {"dtype": "q8"}),
    Peer(f"{CT2}, float32", CT2, "ctranslate2_peer.py", "ctranslate2", {"dtype": "float32"}),
    Peer(f"{CT2}, int8", CT2, "ctranslate2_peer.py", "ctranslate2", {"dtype": "int8"}),
    Peer(f"{LLAMA}, F16", LLAMA, "llama_cpp_peer.mjs", "gguf f16", sizes=(1, 2)),
    Peer(f"{LLAMA}, Q8_0", LLAMA, "llama_cpp_peer.mjs", "gguf q8_0", sizes=(1, 2)),
)
OURS = tuple(
    Peer(label, "", "secateur_peer.py", settings={"backend": backend, "dtype": dtype, "min_cosine": least}, sizes=(0,))
    for label, backend, dtype, least in (
        ("secateur, --backend torch --dtype float32", "torch", "float32", EXACT),
        ("secateur", "auto", "auto", EXACT),
        ("secateur, --min-cosine 0.98", "auto", "auto", 0.98),
    )
)
WORKLOADS = {
    "queries": lambda rng: rng.randint(4, 12),
    "documents": lambda rng: 130,
    "mixed": lambda rng: int(min(200, max(4, rng.lognormvariate(3.2, 0.8)))),
}
"""Words of a text; 130 are about 200 tokens of documentation."""


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors before; each on {args.threads} of them\n")
    found = {}
    for model in args.models:
        found[model.name] = serving(model, args) if args.serving else compare(model, args)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))
    print(f"load {os.getloadavg()[0]:.2f} after")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=lambda name: Path(name).resolve(), help="model folders")
    parser.add_argument("--cache", required=True, type=lambda name: Path(name).resolve(), help="kept between runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help=f"that a round takes {REFERENCE.label}, about")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names start so, beside the reference")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--serving", action="store_true", help="compare servers instead")
    parser.add_argument("--clients", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--out", type=Path, help="JSON file for all that was measured")
    return parser.parse_args()


def texts_of(workload: str, count: int) -> list[str]:
    """Texts in a row of the documentation of Python, and of packages that are installed."""
    packages = ("", *TRAIN_PACKAGES)
    words = (word for package in packages for pair in pairs_of(package) for text in pair for word in text.split())
    rng = random.Random(0)
    return [" ".join(itertools.islice(words, WORKLOADS[workload](rng))) for _ in range(count)]


# --- environments, and what peers read -------------------------------------------------------------------------------


def environment(name: str, cache: Path) -> Path:
    """The folder of an environment, made where it is not there."""
    folder, packages = cache / "environments" / name, PYTHON.get(name) or NODE[name]
    made, wanted = folder / "made-of.json", json.dumps(packages)
    if not (made.is_file() and made.read_text() == wanted):
        note(f"installs {name}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if name in PYTHON:
            run(sys.executable, "-m", "venv", folder)
            run(folder / "bin/python", "-m", "pip", "install", "--quiet", *packages)
        else:
            (folder / "package.json").write_text('{"private": true, "type": "module"}')
            run("npm", "install", "--prefix", folder, "--ignore-scripts", "--no-audit", "--no-fund", *packages)
        made.write_text(wanted)
    for script in HERE.glob("*.mjs") if name in NODE else ():  # Node looks for packages beside a script
        shutil.copy(script, folder)
    return folder


def note(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def run(*command: Any) -> None:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(str(error)) from error
    if done.returncode:
        raise Unavailable(reason(done.stderr))


def reason(log: str) -> str:
    """The line that tells most of why something failed: that of the last error, or the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it ended without a word"]
    return next((line for line in reversed(lines) if "rror" in line.split(":")[0]), lines[-1])[:300]


def form_of(model: Path, form: str, cache: Path) -> Path:
    """The model as a peer reads it, made where it is not there."""
    if form == "model":
        return model
    digest = hashlib.sha256()
    for file in sorted(path for path in model.rglob("*") if path.is_file() and "conversions" not in path.parts):
        digest.update(file.read_bytes())
    out = cache / "forms" / f"{model.name}-{digest.hexdigest()[:12]}" / form.replace(" ", "-")
    if not out.exists():
        note(f"makes {form} of {model.name}")
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        kind, _, precision = form.partition(" ")
        if kind == "onnx":
            export(str(model), to="onnx", precision=precision, out=partial, min_cosine=-1.0)
        elif kind == "gguf":
            converter = source_of_converter(cache) / "convert_hf_to_gguf.py"
            python = environment(ST, cache) / "bin/python"
            run(python, converter, model, "--outtype", precision, "--outfile", partial)
        else:
            {"ctranslate2": to_ctranslate2, "old": to_old}[kind](model, partial, cache)
        partial.rename(out)
    return out


def source_of_converter(cache: Path) -> Path:
    source, partial = cache / "llama.cpp", cache / "llama.cpp.partial"
    if not source.exists():
        shutil.rmtree(partial, ignore_errors=True)
        package, _, _ = CONVERTER.partition("==")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        run(*pip, f"--no-binary={package}", CONVERTER, "--dest", partial)
        with tarfile.open(next(partial.glob("*.tar.gz"))) as archive:
            archive.extractall(partial, filter="data")
        next(partial.glob("*/vendor/llama.cpp")).rename(source)
        shutil.rmtree(partial)
    return source


def to_ctranslate2(model: Path, out: Path, cache: Path) -> None:
    if json.loads((model / "config.json").read_text())["model_type"] == "llama":
        raise Unavailable("gives logits of decoders, but no states")
    run(environment(ST, cache) / "bin/ct2-transformers-converter", "--model", model, "--output_dir", out)
    shutil.copy(model / "tokenizer.json", out)


def to_old(model: Path, out: Path, cache: Path) -> None:
    """The folder as sentence-transformers 3 and transformers 4 read it, which infinity pins."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("conversions"))
    names = ("1_Pooling/config.json", "sentence_bert_config.json", "config.json", "tokenizer_config.json")
    pooling, limits, config, tokenizer = (json.loads((model / name).read_text()) for name in names)
    modes = {key: value for key, value in pooling.items() if key.startswith(("pooling_mode_", "include_prompt"))}
    width = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension"))
    limits = {key: value for key, value in limits.items() if key in ("max_seq_length", "do_lower_case")}
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    old = {"word_embedding_dimension": width} | modes, limits, config | config.get("rope_parameters", {}), tokenizer
    for name, values in zip(names, old, strict=True):
        (out / name).write_text(json.dumps(values))


# --- peers in processes ----------------------------------------------------------------------------------------------


class Worker:
    """A peer that has loaded, as ``peers/protocol.py`` has it; stopped but while it is asked for something."""

    def __init__(self, peer: Peer, model: Path, texts: Path, args: argparse.Namespace) -> None:
        home = environment(peer.environment, args.cache) if peer.environment else Path(sys.prefix)
        line = ["node", home / peer.script] if peer.environment in NODE else [home / "bin/python", HERE / peer.script]
        pooling, lengths = (model / name for name in ("1_Pooling/config.json", "sentence_bert_config.json"))
        modes = [key for key, value in json.loads(pooling.read_text()).items() if value is True]
        settings = peer.settings | {
            "model": str(form_of(model, peer.form, args.cache)),
            "texts": str(texts),
            "threads": args.threads,
            "max_length": json.loads(lengths.read_text())["max_seq_length"],
            "pooling": next(key.removeprefix("pooling_mode_") for key in modes if key.startswith("pooling_mode_")),
        }
        self.label, self.size, self.seconds = peer.label, peer.sizes[0], []
        self.log = args.cache / "log.txt"
        start = time.perf_counter()
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self.process = subprocess.Popen([*map(str, line), json.dumps(settings)], **pipes)
        self.note = self._read()["note"]
        self.load_seconds = time.perf_counter() - start
        self.process.send_signal(signal.SIGSTOP)

    def encode(self, texts: Path, size: int, vectors: Path | None = None) -> float:
        """Seconds to encode the texts of a file."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # then there is nothing to read, either
            asked = {"texts": str(texts), "batch_size": size, "vectors": vectors and str(vectors)}
            print(json.dumps(asked), file=self.process.stdin, flush=True)
        seconds = self._read()["seconds"]
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def _read(self) -> dict[str, Any]:
        watch = threading.Timer(SECONDS_AT_MOST, self.process.kill)
        watch.start()
        try:
            for line in self.process.stdout:
                if line.startswith('{"peer"'):  # libraries print, too
                    return json.loads(line)
        finally:
            watch.cancel()
        self.close()
        raise Unavailable(reason(self.log.read_text()))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def peak(pid: int) -> int:
    """The most bytes that a process and those it has started have had in memory, each."""
    pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    lines = [line for each in pids for line in Path(f"/proc/{each}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- speeds ----------------------------------------------------------------------------------------------------------


def compare(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all peers on all workloads and print the table; for each workload and peer, what was found of it."""
    peers = [REFERENCE, *(peer for peer in (*PEERS, *OURS) if peer.label.startswith(tuple(args.only)))]
    found = {workload: measure(model, workload, peers, args) for workload in args.workloads}
    print(f"| {model.name} | {' | '.join(found)} | cosine ≥ | mean | MB | load, s | what ran |")
    print("|---" * (len(found) + 6) + "|")
    for peer in peers:
        print(f"| {peer.label} | {' | '.join(cells(peer.label, list(found.values())))} |")
    print()
    for workload, rows in found.items():
        tell_ratios(workload, {label: each for label, each in rows.items() if "seconds" in each})
    print(flush=True)
    return found


def measure(model: Path, workload: str, peers: Sequence[Peer], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Load all peers, and encode the same texts by each in turn, round by round."""
    found: dict[str, dict[str, Any]] = {}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        sample, texts, vectors = (Path(scratch) / name for name in ("sample.json", "texts.json", "vectors"))
        write(sample, texts_of(workload, 16))
        count = 0
        for peer in peers:
            note(f"{model.name}, {workload}: {peer.label}")
            try:
                if peer in OURS:  # it may convert, once
                    Worker(peer, model, texts, args).close()
                worker = Worker(peer, model, texts, args)
                stack.callback(worker.close)
                if not count:
                    worker.encode(sample, 8)
                    count = max(16, int(16 / worker.encode(sample, 8) * args.seconds))
                    write(texts, texts_of(workload, count))
                    write(sample, texts_of(workload, max(16, count // 2)))
                if len(peer.sizes) > 1:
                    worker.size = min(peer.sizes, key=lambda size: worker.encode(sample, size))
                worker.encode(texts, worker.size, vectors)
            except (Unavailable, SecateurError) as error:
                if peer is REFERENCE:
                    raise SystemExit(f"{peer.label}: {error}") from error
                found[peer.label] = {"reason": str(error)}
                continue
            given = np.fromfile(vectors, dtype=np.float32).reshape(count, -1)
            if peer is REFERENCE:
                expected = given
            workers.append(worker)
            cosines = paired_cosines(given, expected)
            about = {"texts": count, "batch_size": worker.size, "note": worker.note, "load": worker.load_seconds}
            found[peer.label] = about | {"least": float(cosines.min()), "mean": float(cosines.mean())}
        for _, worker in itertools.product(range(args.rounds), workers):
            worker.seconds.append(worker.encode(texts, worker.size))
        for worker in workers:
            found[worker.label] |= {"seconds": worker.seconds, "peak": peak(worker.process.pid)}
    return found


def write(file: Path, texts: Sequence[str]) -> None:
    file.write_text(json.dumps(texts), encoding="utf-8")


def cells(label: str, workloads: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """Texts per second and times the reference, by workload; cosines, memory and loading over all of them."""
    pairs = [(rows[label], rows[REFERENCE.label]) for rows in workloads]
    rates = [f"{rate(each):.4g} ({ratio(each, first):.2f})" if "seconds" in each else "none" for each, first in pairs]
    measured = [each for each, _ in pairs if "seconds" in each]
    if not measured:
        return [*rates, "", "", "", "", pairs[0][0]["reason"]]
    least, mean = min(each["least"] for each in measured), statistics.mean(each["mean"] for each in measured)
    most, load = max(each["peak"] for each in measured), statistics.median(each["load"] for each in measured)
    notes = dict.fromkeys(each["note"] or f"batches of {each['batch_size']}" for each in measured)
    return [*rates, f"{least:.5f}", f"{mean:.5f}", f"{most / 1e6:.0f}", f"{load:.1f}", ", ".join(notes)]


def rate(found: dict[str, Any]) -> float:
    return found["texts"] / statistics.median(found["seconds"])


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How many times as fast: the median of the rounds."""
    return statistics.median(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True))


def tell_ratios(workload: str, rows: dict[str, dict[str, Any]]) -> None:
    """What secateur gains on the best peers."""
    labels = [label for label in rows if not label.startswith("secateur")]
    exact = [label for label in labels if rows[label]["least"] >= EXACT]
    _, auto, loose = (peer.label for peer in OURS)
    for ours, theirs in ((auto, exact), (loose, labels), (auto, [REFERENCE.label])):
        if ours in rows:
            best = max(theirs, key=lambda label: rate(rows[label]))
            print(f"- {workload}: {ours} ÷ {best}: {ratio(rows[ours], rows[best]):.2f}")


# --- servers ---------------------------------------------------------------------------------------------------------


def serving(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The servers of secateur and infinity in turn, each asked for one text at a time by many clients."""
    import serve

    texts = texts_of("mixed", int(args.seconds * 100))
    expected = open_model(model, dtype="float32", device="cpu").encode(texts, show_progress_bar=False)
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        servers = {"secateur serve": stack.enter_context(serve.server(str(model), "--truncate"))[:3]}
        try:
            servers["infinity"] = stack.enter_context(infinity(model, args))
        except Unavailable as error:
            found["infinity"] = {"reason": str(error)}
        for clients, number in itertools.product(args.clients, range(args.rounds + 1)):
            for label, (process, host, port) in servers.items():
                seconds, outcomes = serve.crowd_and_wait(host, port, texts, clients)
                serve.check(outcomes, expected)
                each = found.setdefault(
                    f"{label}, {clients} clients", {"texts": len(texts), "seconds": [], "waits": []}
                )
                if number:  # the first round warms up
                    each["seconds"].append(seconds)
                    each["waits"] += outcomes.seconds
                    each |= {"outcomes": dict(outcomes.counts), "peak": peak(process.pid)}
    print(f"| {model.name} | texts/s | p50, ms | p99, ms | MB | outcomes of the last round |")
    print("|---" * 6 + "|")
    for label, each in found.items():
        if "reason" in each:
            print(f"| {label} | none | | | | {each['reason']} |")
            continue
        p50, p99 = np.percentile(each["waits"], [50, 99]) * 1e3
        outcomes = ", ".join(f"{count} {what}" for what, count in each["outcomes"].items() if count)
        print(f"| {label} | {rate(each):.4g} | {p50:.0f} | {p99:.0f} | {each['peak'] / 1e6:.0f} | {outcomes} |")
    for clients in args.clients if len(servers) > 1 else ():
        ours, theirs = (found[f"{label}, {clients} clients"] for label in servers)
        print(f"- {clients} clients: secateur serve ÷ infinity: {ratio(ours, theirs):.2f}")
    return found


@contextlib.contextmanager
def infinity(model: Path, args: argparse.Namespace) -> Iterator[tuple[psutil.Process, str, int]]:
    """Its server, once it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    line = [environment("infinity", args.cache) / "bin/infinity_emb", "v2", "--engine", "torch", "--device", "cpu"]
    line += ["--model-id", form_of(model, "old", args.cache), "--served-model-name", "model", "--dtype", "float32"]
    line += ["--url-prefix", "/v1", "--host", host, "--port", port]
    log = args.cache / "log.txt"
    with log.open("w") as stream:
        variables = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(args.threads)}
        process = subprocess.Popen([str(part) for part in line], stdout=stream, stderr=stream, env=variables)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
                break
            time.sleep(0.2)
        else:
            raise Unavailable(reason(log.read_text()))
        yield psutil.Process(process.pid), host, port
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
