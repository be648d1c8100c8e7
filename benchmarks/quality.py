"""What a cut and its healing keep: depths trained alone, by one scout, and polished, on the same tasks.

    python benchmarks/quality.py MODEL DATA TASKS -o OUT [--embedder MINILM] [--rows ROW ...] [--steps 200]

MODEL is a bare language model's folder (a trained embedder keeps its own pooling, so rows with another would fail),
DATA a folder of training files, TASKS a folder of task folders. Each row and seed works in a folder of OUT and goes on
where it was stopped; once scored it is a line of OUT/rows.jsonl, and is skipped. Of the folders only the models stay
that other rows start from (--keep-models keeps all). benchmarks/quality holds rows that were measured, its folders
those with other settings: an OUT that is a copy of it goes on from there. At the end, and with --table alone, prints a
Markdown table: the average over task types ± standard error over the seeds, in points.

The first row is the reference: the full depth with the default recipe. Rows have the same steps, or the same compute:
steps that cost what others cost, by counted FLOPs of a training step. Label-free rows see texts alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytrec_eval
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur.choosing.choose import blocks_to_keep
from secateur.data.rows import read_rows
from secateur.data.sources import instruction_prompt, read_pairs
from secateur.files import read_json, write_text
from secateur.healing.losses import Loss
from secateur.healing.recipes import RECIPES, TrainingConfig, prepare
from secateur.healing.trainer import train
from secateur.healing.training_data import training_sets
from secateur.models.blocks import depth_of
from secateur.models.open_model import open_model
from secateur.progress import silent
from secateur.results import Origin, Scores, Training, load

BLOCKS = {"train": "blocks"}
PAPER = {"recipe": "l3prune"}
SEARCHES = ("Cranfield", "PubMedQA-L")
STATIC_LEARNING_RATE = 1e-2
REFERENCE = "full"
RECORDS = "rows.jsonl"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        about: What it says.
        depth: How many layers: ``full``, ``large``, ``middle``, ``small``, ``embedder_small``, ``embedder_middle``, or
            a number.
        settings: Of the training; None: there is none.
        start: What is cut: the ``model``, the ``embedder``, or what one of the rows ``KEPT`` has trained.
        compute: What the training may cost, in trainings of the reference: ``equal`` is one, ``scout`` the share of
            one that a scout gets, ``polish`` the rest; None: the same steps.
        pooling: Of the model.
        vocab: Whether the vocabulary is cut, to --vocab-size tokens, by the texts of the training files.
        own: Whether the tasks' own texts (:func:`own_texts`) are among those that tokens are counted on, and half of
            those that a teacher sees; as where a model is made for its use.
        which: The selector that says which layers.
    """

    about: str
    depth: str = "full"
    settings: dict[str, Any] | None = field(default_factory=lambda: BLOCKS)
    start: str = "model"
    compute: Literal["equal", "scout", "polish"] | None = None
    pooling: str | None = None
    vocab: bool = False
    own: bool = False
    which: Literal["first", "uniform", "random"] = "first"

    def parts(self, args: argparse.Namespace, depth: int, seed: int) -> tuple[int, ...]:
        """The layers that stay, of a model of ``depth``."""
        count = depth if self.depth == "full" else int(getattr(args, self.depth, self.depth))
        drawn = f":{seed}" if self.which == "random" else ""
        return blocks_to_keep(f"{self.which}:{count}{drawn}", depth) if count else ()


ROWS = {
    REFERENCE: Row("full depth"),
    "full-lora": Row("full depth, the paper's recipe", settings=PAPER),
    "large-lora": Row("large, the paper's recipe", "large", PAPER),
    "small-lora": Row("small, the paper's recipe", "small", PAPER),
    "large": Row("large, same steps", "large"),
    "middle": Row("middle, same steps", "middle"),
    "small": Row("small, same steps", "small"),
    "large-compute": Row("large, equal compute", "large", compute="equal"),
    "middle-compute": Row("middle, equal compute", "middle", compute="equal"),
    "small-compute": Row("small, equal compute", "small", compute="equal"),
    "scout": Row("scout, full depth", settings=BLOCKS | {"depths": "ladder"}, compute="scout"),
    "scout-large": Row("scout, large", "large", None, "scout"),
    "scout-middle": Row("scout, middle", "middle", None, "scout"),
    "scout-small": Row("scout, small", "small", None, "scout"),
    "scout-9": Row("scout, 9 layers", "9", None, "scout"),
    "scout-12": Row("scout, 12 layers", "12", None, "scout"),
    "scout-19": Row("scout, 19 layers", "19", None, "scout"),
    "polish-large": Row("scout and polish, large, equal compute", "large", start="scout", compute="polish"),
    "polish-middle": Row("scout and polish, middle, equal compute", "middle", start="scout", compute="polish"),
    "polish-small": Row("scout and polish, small, equal compute", "small", start="scout", compute="polish"),
    "depth-9": Row("9 layers, same steps", "9"),
    "depth-12": Row("12 layers, same steps", "12"),
    "depth-19": Row("19 layers, same steps", "19"),
    "random": Row("random layers, same steps", "small", which="random"),
    "uniform": Row("evenly spaced layers, same steps", "small", which="uniform"),
    "small-both-ways": Row("small, attention both ways", "small", BLOCKS | {"bidirectional": True}),
    "full-weighted": Row("full depth, weighted mean pooling", pooling="weighted_mean"),
    "middle-weighted": Row("middle, weighted mean pooling", "middle", pooling="weighted_mean"),
    "small-weighted": Row("small, weighted mean pooling", "small", pooling="weighted_mean"),
    "small-vocab": Row("small, fewer tokens, same steps", "small", vocab=True),
    "large-vocab": Row("large, fewer tokens, same steps", "large", vocab=True),
    "small-trimmed": Row("small, same steps, then fewer tokens", settings=None, start="small", vocab=True),
    "static": Row("token embeddings alone", "0", {"train": "all", "learning_rate": STATIC_LEARNING_RATE}),
    "embedder": Row("the embedder, as it came", settings=None, start="embedder"),
    "embedder-middle": Row(
        "the embedder's first layers (middle), distilled on texts alone", "embedder_middle", {}, "embedder"
    ),
    "embedder-small": Row(
        "the embedder's first layers (small), distilled on texts alone", "embedder_small", {}, "embedder"
    ),
    "embedder-middle-uniform": Row(
        "evenly spaced layers of the embedder (middle), distilled on texts alone",
        "embedder_middle",
        {},
        "embedder",
        which="uniform",
    ),
    "embedder-small-uniform": Row(
        "evenly spaced layers of the embedder (small), distilled on texts alone",
        "embedder_small",
        {},
        "embedder",
        which="uniform",
    ),
    "embedder-vocab": Row("the embedder, fewer tokens, as they came", settings=None, start="embedder", vocab=True),
    "embedder-vocab-own": Row(
        "the embedder, fewer tokens, by the tasks' own texts too", settings=None, start="embedder", vocab=True, own=True
    ),
    "embedder-full-vocab": Row(
        "the embedder, fewer tokens, distilled on texts alone", "full", {}, "embedder", vocab=True
    ),
    "embedder-small-vocab": Row(
        "the embedder's first layers (small), fewer tokens, distilled on texts alone",
        "embedder_small",
        {},
        "embedder",
        vocab=True,
    ),
    "embedder-small-uniform-vocab": Row(
        "evenly spaced layers of the embedder (small), fewer tokens, distilled on texts alone",
        "embedder_small",
        {},
        "embedder",
        vocab=True,
        which="uniform",
    ),
    "embedder-small-uniform-trimmed": Row(
        "evenly spaced layers of the embedder (small), distilled on texts alone, then fewer tokens",
        settings=None,
        start="embedder-small-uniform",
        vocab=True,
    ),
    "embedder-small-uniform-trimmed-own": Row(
        "evenly spaced layers of the embedder (small), distilled on texts alone, then fewer tokens, by own texts too",
        settings=None,
        start="embedder-small-uniform",
        vocab=True,
        own=True,
    ),
    "embedder-small-uniform-own": Row(
        "evenly spaced layers of the embedder (small), distilled on texts alone, half of them the tasks' own",
        "embedder_small",
        {},
        "embedder",
        own=True,
        which="uniform",
    ),
    "embedder-middle-uniform-own": Row(
        "evenly spaced layers of the embedder (middle), distilled on texts alone, half of them the tasks' own",
        "embedder_middle",
        {},
        "embedder",
        own=True,
        which="uniform",
    ),
    "embedder-small-uniform-own-trimmed": Row(
        "the same, then fewer tokens, by the tasks' own texts too",
        settings=None,
        start="embedder-small-uniform-own",
        vocab=True,
        own=True,
    ),
    "small-trimmed-own": Row(
        "small, same steps, then fewer tokens, by the tasks' own texts too",
        settings=None,
        start="small",
        vocab=True,
        own=True,
    ),
}
KEPT = ("scout", "small", "embedder-small-uniform", "embedder-small-uniform-own")
"""The rows whose models others start from."""


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [] if args.table else run_all(args)
    print(table(args))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run_all(args: argparse.Namespace) -> list[str]:
    """Every row with the first seed, then with the next; a row that fails does not keep the others from running."""
    check_same(args)
    failed = []
    for seed in args.seeds:
        for name in args.rows:
            if ROWS[name].start.startswith("embedder") and args.embedder is None:
                print(f"{name}: left out, no --embedder", flush=True)
            elif seed not in measured(args, name):
                try:
                    run(args, name, seed)
                except Exception:
                    traceback.print_exc()
                    failed.append(f"{name}-{seed}")
    return failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--embedder", type=Path, help="a trained embedder, for the label-free rows")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--small", type=int, default=7, help="layers of the small cuts")
    parser.add_argument("--large", type=int, default=24, help="layers of the large cut")
    parser.add_argument("--middle", type=int, default=15, help="layers of the middle cut")
    parser.add_argument("--ladder", type=int, nargs="+", default=[6, 7, 9, 12, 15, 19, 24, 30], help="of the scout")
    parser.add_argument("--scout-share", type=float, default=0.25, help="of the compute of scout and polish together")
    parser.add_argument("--embedder-small", type=int, default=3, help="layers of the embedder's small cut")
    parser.add_argument("--embedder-middle", type=int, default=4, help="layers of the embedder's larger cut")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48, help="tokens per text in training")
    parser.add_argument("--vocab-size", type=int, default=8000, help="tokens of the rows with fewer tokens")
    parser.add_argument("--distill-steps", type=int, default=1000, help="of the label-free row, whose steps are cheap")
    parser.add_argument("--texts", type=int, default=30000, help="texts of the label-free row")
    parser.add_argument("--sample", type=int, default=100, help="of each task; 0: the whole task")
    parser.add_argument("--eval-length", type=int, default=64, help="tokens per text in scoring, for all rows")
    parser.add_argument("--eval-dtype", default="bfloat16", help="float32 where the processor has no bfloat16")
    parser.add_argument("--keep-models", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    return parser.parse_args()


def check_same(args: argparse.Namespace) -> None:
    """Rows of one folder must be comparable: refuse to go on with other settings."""
    keys = ["small", "middle", "large", "ladder", "scout_share", "embedder_small", "embedder_middle", "steps"]
    keys += ["batch_size", "max_length", "vocab_size", "distill_steps", "texts", "sample", "eval_length", "eval_dtype"]
    settings = {key: getattr(args, key) for key in keys} | {"model": args.model.name}
    note = args.out / "settings.json"
    if note.is_file() and read_json(note) != settings:
        raise SystemExit(f"{note} has other settings: name another --out")
    write_text(note, json.dumps(settings, indent=1))


def run(args: argparse.Namespace, name: str, seed: int) -> None:
    """Cut, heal and score one row with one seed."""
    row, folder = ROWS[name], args.out / f"{name}-{seed}"
    folder.mkdir(exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {folder.name}", flush=True)
    starts = {"model": args.model, "embedder": args.embedder}
    source = starts.get(row.start) or args.out / f"{row.start}-{seed}" / "model"
    blocks = row.parts(args, depth_of(open_model(source, device="cpu")[0].auto_model), seed)
    about: dict[str, Any] = {"layers": len(blocks), "kept": blocks}
    if name == "static":
        score(args, static(args, row, folder, seed, about), folder, seed)
    else:
        cut = folder / "cut"
        if not cut.exists():
            counted = [*training_files(args), *(own_texts(args) if row.own else ())]
            tokens = {"vocab": counted, "vocab_size": args.vocab_size} if row.vocab else {}
            secateur.prune(source, keep=blocks, pooling=row.pooling, out=cut, **tokens)
        about |= {"parameters": parameters(cut)} | vocabulary(cut)
        model = cut if row.settings is None else folder / "model"
        if not model.exists():
            heal(args, row, cut, model, seed)
        about |= {} if row.settings is None else trained(load(model, Training))
        score(args, model, folder, seed)
        if row.start == "embedder" and row.settings is not None:
            about["searches"] = searches(args, model, args.embedder)
    record(args, {"row": name, "seed": seed, **about}, folder)
    kept = "model" if name in KEPT or args.keep_models else ""
    for leftover in folder.iterdir():
        if leftover.name != kept:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not kept:
        folder.rmdir()


def record(args: argparse.Namespace, about: dict[str, Any], folder: Path) -> None:
    """Add a line for a scored row: scores by task, in points, and what they are scores of."""
    table = load(folder, Scores)
    about |= {"scores": {row.task: {"type": row.type, "score": 100 * row.score} for row in table.rows}}
    about |= {"versions": dict(table.provenance.versions), "created": table.provenance.created}
    with (args.out / RECORDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")


def measured(args: argparse.Namespace, name: str) -> dict[int, dict[str, Any]]:
    """Seed → the line of a row."""
    file = args.out / RECORDS
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.is_file() else [])
    return {line["seed"]: line for line in lines if line["row"] == name and line["seed"] in args.seeds}


def parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in open_model(folder, device="cpu").parameters())


def vocabulary(folder: Path) -> dict[str, Any]:
    """How the vocabulary was cut, where it was."""
    cut = load(folder, Origin).vocabulary
    return {"vocabulary": asdict(cut) | {"files": [Path(file).name for file in cut.files]}} if cut else {}


def heal(args: argparse.Namespace, row: Row, cut: Path, out: Path, seed: int) -> None:
    """Train one row's model with one seed."""
    options: dict[str, Any] = {"seed": seed, "batch_size": args.batch_size, "max_length": args.max_length}
    options |= {"steps": args.steps, **(row.settings or {})}
    if options.get("depths"):
        options["depths"] = args.ladder
    if row.compute is not None:
        share = {"equal": 1.0, "scout": args.scout_share, "polish": 1 - args.scout_share}[row.compute]
        options["steps"] = round(share * args.steps * reference_flops(args) / step_flops(args, cut))
        print(f"  {options['steps']} steps in place of {args.steps}", flush=True)
    if row.start == "embedder":
        options |= {"teacher": args.embedder, "steps": args.distill_steps, "cache": args.out / "vectors"}
    data: list[Path] = [texts(args, row.own)] if row.start == "embedder" else training_files(args)
    secateur.heal(cut, data, out=out, progress=silent, **options)


def training_files(args: argparse.Namespace) -> list[Path]:
    return sorted(path for path in args.data.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))


def texts(args: argparse.Namespace, own: bool) -> Path:
    """Texts of the training files, without what belongs to what; with ``own``, half of them are the tasks' own."""
    file: Path = args.out / ("texts-own.jsonl" if own else "texts.jsonl")
    if not file.is_file():
        rows = [row for path in training_files(args) for row in read_pairs(path).rows]
        known = sorted({text for row in rows for text in (row.anchor, row.positive, *row.negatives)})
        drawn = random.Random(0).sample(known, min(args.texts, len(known)))
        if own:
            theirs = sorted({row["text"] for path in own_texts(args) for _, row in read_rows(path)})
            half = random.Random(0).sample(theirs, min(args.texts // 2, len(theirs)))
            drawn[: len(half)] = half
        write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in drawn))
    return file


def own_texts(args: argparse.Namespace) -> list[Path]:
    """A file for each task that has documents, or parts for training and development: their texts, but for sentences
    and queries that any task scores. (Documents are scored, too; whoever searches has them beforehand.)
    """
    scored = {text for stem in ("test", "queries") for text in task_texts(args, stem)}
    files = []
    for task in sorted(args.tasks.iterdir()):
        found = {text for stem in ("corpus", "train", "dev") for text in task_texts(args, stem, task.name)} - scored
        if found:
            files.append(args.out / "own" / f"{task.name}.jsonl")
            write_text(files[-1], "".join(json.dumps({"text": text}) + "\n" for text in sorted(found)))
    return files


def task_texts(args: argparse.Namespace, stem: str, task: str = "*") -> set[str]:
    """The texts of one part of a task, or of all."""
    rows = [dict(row) for part in args.tasks.glob(f"{task}/{stem}.jsonl*") for _, row in read_rows(part)]
    keys = ("title", "text", "sentence1", "sentence2", "query")
    listed = [text for row in rows for key in ("positive", "negative") for text in row.get(key) or ()]
    return {str(row[key]) for row in rows for key in keys if row.get(key)}.union(listed)


def reference_flops(args: argparse.Namespace) -> int:
    """Of a step of the reference."""
    return step_flops(args, args.model)


def step_flops(args: argparse.Namespace, folder: Path) -> int:
    """Counted in one forward and backward pass of a batch of triplets at full length, the layers' weights trained."""
    model = open_model(folder, device="cpu")
    config = TrainingConfig(train="blocks", batch_size=4, precision="float32")
    prepare(model, config)
    loss = Loss(model.train(), config)
    batch = [" ".join(["word"] * 600)] * 4
    model.max_seq_length = args.max_length
    columns = [model.preprocess(batch) for _ in range(3)]
    with FlopCounterMode(display=False) as counted:
        loss(columns, None).backward()
    return int(counted.get_total_flops())


def static(args: argparse.Namespace, row: Row, folder: Path, seed: int, about: dict[str, Any]) -> Any:
    """The model without any layer, its token table trained; in memory, for no plain folder has 0 layers."""
    model = open_model(args.model, device="cpu")
    transformer = model[0].auto_model
    transformer.layers = torch.nn.ModuleList()
    transformer.config.num_hidden_layers = 0
    sources = [read_pairs(file) for file in training_files(args)]
    model.prompts.update({pairs.name: pairs.prompt for pairs in sources if pairs.prompt})
    numbers = {"steps": args.steps, "batch_size": args.batch_size, "max_length": args.max_length, "seed": seed}
    config = TrainingConfig(**{**RECIPES["finetune"], **numbers, **(row.settings or {})})
    sets, _ = training_sets(sources, config)
    outcome = train(model, sets, config, folder / "checkpoints")
    about |= {"steps": args.steps, "seconds": outcome.seconds, "trained_parameters": outcome.trained_parameters}
    return model


def trained(table: Training) -> dict[str, Any]:
    kept = {"steps": table.steps, "seconds": table.seconds, "trained_parameters": table.trained_parameters}
    numbers = {key: value for key, value in table.settings.items() if key in TrainingConfig.__dataclass_fields__}
    return kept | {"settings": numbers, "losses": [(row.step, row.loss) for row in table.losses]}


def score(args: argparse.Namespace, model: Any, folder: Path, seed: int) -> None:
    """Into the row's own folder; one by one, so that a killed scoring goes on."""
    if isinstance(model, Path):
        model = open_model(model, dtype=args.eval_dtype, device="cpu")
    else:
        model.to(getattr(torch, args.eval_dtype))
    model.max_seq_length = min(args.eval_length, model.max_seq_length)
    tasks = sorted(path for path in args.tasks.iterdir() if (path / "task.json").is_file())
    secateur.evaluate([model], tasks, sample=args.sample or None, names=[folder.name], out=folder)


def searches(args: argparse.Namespace, student: Path, teacher: Path) -> dict[str, dict[str, float]]:
    """nDCG@10 of the student alone, of its queries over the teacher's documents, and of the teacher alone."""
    models = [open_model(path, dtype=args.eval_dtype, device="cpu") for path in (student, teacher)]
    for model in models:
        model.max_seq_length = min(args.eval_length, model.max_seq_length)
    found = {}
    for name in SEARCHES:
        if not (args.tasks / name).is_dir():
            continue
        query, document, judged = read_search(args.tasks / name, args.sample)
        prompt = instruction_prompt(read_json(args.tasks / name / "task.json").get("instruction", ""))
        # Prompts as `evaluate` gives them: only to a model that was trained with instructions.
        told = [prompt if any(model.prompts.values()) else "" for model in models]
        queries = [encode(model, query.values(), own) for model, own in zip(models, told, strict=True)]
        documents = [encode(model, document.values(), "") for model in models]
        ways = {"student": (0, 0), "student's queries, teacher's documents": (0, 1), "teacher": (1, 1)}
        found[name] = {
            way: ndcg(queries[i] @ documents[j].T, list(query), list(document), judged) for way, (i, j) in ways.items()
        }
    return found


def encode(model: Any, texts: Iterable[str], prompt: str) -> np.ndarray:
    options = {"normalize_embeddings": True, "show_progress_bar": False, "convert_to_tensor": True}
    vectors: np.ndarray = model.encode(list(texts), prompt=prompt or None, **options).float().numpy()
    return vectors


def read_search(folder: Path, sample: int) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Queries, documents and judgements; of a sample, its judged documents and as many others as fit ten times."""

    def lines(stem: str) -> Iterable[dict[str, Any]]:
        file = next(folder.glob(f"{stem}.jsonl*"))
        return (dict(row) for _, row in read_rows(Path(file)))

    queries = {row["_id"]: row["text"] for row in lines("queries")}
    documents = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in lines("corpus")}
    judged: dict[str, dict[str, int]] = {}
    for line in next(folder.glob("qrels*")).read_text(encoding="utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        judged.setdefault(query, {})[document] = int(grade)
    asked = [query for query in queries if any(judged.get(query, {}).values())]
    if sample:
        asked = sorted(random.Random(42).sample(asked, min(sample, len(asked))))
        needed = {document for query in asked for document in judged[query]}
        others = sorted(set(documents) - needed)
        needed |= set(random.Random(42).sample(others, min(10 * sample, len(others))))
        documents = {key: text for key, text in documents.items() if key in needed}
    return {query: queries[query] for query in asked}, documents, {query: judged[query] for query in asked}


def ndcg(similarity: np.ndarray, queries: list[str], documents: list[str], judged: dict[str, dict[str, int]]) -> float:
    run = {}
    for query, row in zip(queries, similarity, strict=True):
        best = np.argsort(-row)[:10]
        run[query] = {documents[i]: float(row[i]) for i in best}
    found = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run)
    return 100 * statistics.mean(result["ndcg_cut_10"] for result in found.values())


def table(args: argparse.Namespace) -> str:
    """All rows that are there."""
    average = partial(averages, args)
    reference = average(REFERENCE)
    types = sorted({kind for name in ROWS for kinds in average(name).values() for kind in kinds if kind})
    heads = [
        "row",
        "layers",
        "parameters, M",
        "steps",
        "trained, M",
        "train, s",
        "average",
        "− reference",
        *types,
        "seeds",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    extra = []
    for name, row in ROWS.items():
        scores = average(name)
        if not scores:
            continue
        notes = list(measured(args, name).values())
        common = [seed for seed in scores if seed in reference]
        apart = [scores[seed][""] - reference[seed][""] for seed in common]
        cells = [row.about, str(notes[0]["layers"])]
        cells += [f"{notes[0]['parameters'] / 1e6:.1f}" if "parameters" in notes[0] else ""]
        cells += [str(notes[0].get("steps", ""))]
        cells += [f"{notes[0]['trained_parameters'] / 1e6:.1f}" if "trained_parameters" in notes[0] else ""]
        cells += [f"{statistics.mean(note['seconds'] for note in notes):.0f}" if "seconds" in notes[0] else ""]
        cells += [with_error([kinds[""] for kinds in scores.values()]), with_error(apart, "+") if apart else ""]
        cells += [f"{statistics.mean(kinds[kind] for kinds in scores.values()):.1f}" for kind in types]
        lines.append("| " + " | ".join([*cells, str(len(scores))]) + " |")
        for task in SEARCHES:
            found = [note["searches"][task] for note in notes if task in note.get("searches", {})]
            if found:
                ways = (f"{way} {with_error([one[way] for one in found])}" for way in found[0])
                extra.append(f"- {row.about}, nDCG@10 on {task}: {', '.join(ways)}")
    return "\n".join([*lines, "", *extra])


def averages(args: argparse.Namespace, name: str) -> dict[int, dict[str, float]]:
    """Seed → task type → mean score in points; the mean over types under the empty name. Finished rows only."""
    found = {}
    for seed, line in measured(args, name).items():
        kinds: dict[str, list[float]] = {}
        for one in line["scores"].values():
            kinds.setdefault(one["type"], []).append(one["score"])
        means = {kind: statistics.mean(values) for kind, values in kinds.items()}
        found[seed] = means | {"": statistics.mean(means.values())}
    return found


def with_error(values: list[float], sign: str = "") -> str:
    """Mean ± standard error."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    main()
