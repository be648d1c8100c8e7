"""What an export gains, and what it costs: int8 beside torch in float32, and the light runtime's cold start and size.

    python benchmarks/export.py FULL OTHER --depths 24 7 --runtime
    python benchmarks/export.py FULL OTHER --depths 7 --sample 0 --texts 8 --rounds 3   # without scores: minutes

Each model, and the first one cut to each depth, is exported in several ways, and documents (about 200 tokens) and short
queries (behind an instruction of about 20) are encoded by every way in turns, in one process, with the same number of
threads: what is printed are medians of the ratios within a turn, so that other work on the machine falls on all alike.
Scores are those of the original and of the int8 exports, on the same samples. The light runtime is installed into an
empty environment (``--runtime``: from the package index that pip is set to), without torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from secateur import prune, runtime
from secateur.exporting.export import Export, export
from secateur.models.open_model import open_model
from secateur.studies.demo import pairs_of

WAYS = (("onnx", "int8", "dynamic"), ("openvino", "int8", "static"), ("openvino", "bfloat16", None))
SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).resolve().parents[2] / "shared"))
INSTRUCTION = "Given a question about a function of a library, retrieve the part of its documentation that answers;\n"
DOCUMENT_WORDS, QUERY_WORDS = 150, 8
LEAST_RATIO, MOST_LOST = 3, 0.5
"""What int8 is to gain on its quickest backend, and what it may lose on the average of all tasks, in points of 100."""
MOST_SECONDS, MOST_MEGABYTES = 2, 400
"""From the start of Python to a vector, and beside Python and pip."""

COLD = """
import sys, time
from secateur import runtime
vector = runtime.load(sys.argv[1]).encode("What does this function return?")
print(len(vector), "torch" in sys.modules)
"""


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, {torch.__version__}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="export-") as name:
        folder = Path(name)
        cuts = [str(prune(args.models[0], depth, out=folder / f"{depth} layers")) for depth in args.depths]
        exports = {model: [make(model, way, folder, args) for way in WAYS] for model in (*args.models, *cuts)}
        for model, made in exports.items():
            compare(model, made, args)
        print(f"\nload at the end {os.getloadavg()[0]:.1f}")
        if args.runtime:
            install(folder, [made for each in exports.values() for made in each])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="also cut the first model to these depths")
    parser.add_argument(
        "--tasks", nargs="*", type=Path, default=None, help="task folders; by default all that are there"
    )
    parser.add_argument("--sample", type=int, default=200, help="rows of each task; 0: no scores")
    parser.add_argument("--texts", type=int, default=48, help="texts of each kind that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--runtime", action="store_true", help="install the light runtime too, and start it cold")
    args = parser.parse_args()
    if args.tasks is None:
        args.tasks = sorted(file.parent for file in (SHARED / "data" / "eval").glob("*/task.json"))
    return args


def make(model: str, way: tuple[str, str, str | None], folder: Path, args: argparse.Namespace) -> tuple[Path, Export]:
    to, precision, quantization = way
    out = folder / f"{Path(model).name}-{to}-{precision}"
    # Scores are compared for the int8 exports alone; what they lose is printed, not refused.
    tasks = args.tasks if args.sample and precision == "int8" else []
    options = {"tasks": tasks, "sample": args.sample or None, "max_loss": 100.0, "min_cosine": -1.0}
    start = time.perf_counter()
    result = export(model, to=to, precision=precision, quantization=quantization, out=out, **options)
    print(f"exported {out.name} in {time.perf_counter() - start:.0f} s", flush=True)
    return out, result


def compare(model: str, made: Sequence[tuple[Path, Export]], args: argparse.Namespace) -> None:
    print(f"\n{model}")
    documents, queries = texts(args.texts)
    reference = open_model(model, dtype="float32", device="cpu")
    for what, rows, prompt in (("documents", documents, ""), ("queries", queries, INSTRUCTION)):
        ways = {"torch": by_torch(reference, rows, prompt)}
        ways |= {folder.name: by_runtime(folder, rows, prompt, args.threads) for folder, _ in made}
        seconds = in_turns(ways, args.rounds)
        print(f"  {what}: torch float32 {len(rows) / statistics.median(seconds['torch']):.1f} texts/s")
        for folder, result in made:
            pairs = zip(seconds["torch"], seconds[folder.name], strict=True)
            ratio = statistics.median(slow / fast for slow, fast in pairs)
            aim = f" (aim {LEAST_RATIO})" if result.precision == "int8" else ""
            print(f"    {result.backend:9s} {result.precision:9s} x{ratio:.2f}{aim}")
    for _, result in made:
        lost = "" if result.points_lost is None else f"; {result.points_lost:+.2f} points lost (aim {MOST_LOST})"
        size = sum(result.files.values()) / 1e6
        cosine = f"cosine {result.cosine_min:.4f} least, {result.cosine_mean:.4f} mean"
        print(f"  {result.backend:9s} {result.precision:9s} {size:.0f} MB, {cosine}{lost}")


def texts(count: int) -> tuple[list[str], list[str]]:
    """Documents of about 200 tokens and short queries, from the documentation of Python."""
    words = [word for summary, body in pairs_of("") for word in f"{summary} {body}".split()]
    documents = [" ".join(words[i * DOCUMENT_WORDS : (i + 1) * DOCUMENT_WORDS]) for i in range(count)]
    queries = [" ".join(words[i * 31 : i * 31 + QUERY_WORDS]) for i in range(count * 4)]
    return documents, queries


def by_torch(model: SentenceTransformer, rows: list[str], prompt: str) -> Callable[[], np.ndarray]:
    """sentence-transformers at the best of its batch sizes."""

    def encode(size: int) -> np.ndarray:
        return model.encode(rows, prompt=prompt, batch_size=size, show_progress_bar=False)

    best = min((4, 16, 32), key=lambda size: timed(lambda: encode(size)))
    return lambda: encode(best)


def by_runtime(folder: Path, rows: list[str], prompt: str, threads: int) -> Callable[[], np.ndarray]:
    encoder = runtime.load(folder, threads=threads)
    return lambda: encoder.encode(rows, prompt=prompt)


def in_turns(ways: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return seconds


def timed(work: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def install(folder: Path, made: Sequence[tuple[Path, Export]]) -> None:
    """The light runtime in environments of its own: megabytes, and seconds from nothing to the first vector."""
    root = Path(__file__).resolve().parents[1]
    for backend, package in (("onnx", f"{root}[runtime]"), ("openvino", "openvino")):
        environment = folder / f"env-{backend}"
        python = environment / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        before = megabytes(environment)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", root / "constraints.txt", root, package], check=True)
        size = megabytes(environment) - before
        print(f"\nlight runtime, {backend}: {size:.0f} MB beside Python and pip (aim {MOST_MEGABYTES})")
        for each, result in made:
            if result.backend == backend:
                cold_start(python, each)


def cold_start(python: Path, folder: Path) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([python, "-c", COLD, folder], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        if done.stdout.split()[1] != "False":
            raise SystemExit("the light runtime imported torch")
    times = ", ".join(f"{each:.2f}" for each in seconds)
    print(f"  {folder.name}: first vector after {statistics.median(seconds):.2f} s (aim {MOST_SECONDS}; each: {times})")


def megabytes(folder: Path) -> float:
    listed = subprocess.run(["du", "-sk", folder], capture_output=True, text=True, check=True).stdout
    return int(listed.split()[0]) / 1024


if __name__ == "__main__":
    main()
