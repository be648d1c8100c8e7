"""A cut model → a healed one: trained on pairs, or on texts alone, and written as a plain model folder.

What is trained is the folder's own pooling, prompt and length rules, so that training and use cannot differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from secateur.architectures.blocks import depth_of
from secateur.artifacts import Training
from secateur.data.pairs import Pairs
from secateur.data.sources import Data, Source, read_sources
from secateur.data.texts import Texts
from secateur.errors import ConfigError, DataError, OutputError
from secateur.evaluation.evaluate import evaluate, open_tasks
from secateur.files import give_name, partial_folder, read_json, write_text, writing
from secateur.healing import processes
from secateur.healing.lessons import Aim, dropout_of, find_aim, make_objective, sets_of, teach
from secateur.healing.objectives import check_views
from secateur.healing.recipe import make_recipe
from secateur.healing.teacher import Teacher, open_teacher
from secateur.healing.train import Outcome, check_processes, check_tracker
from secateur.healing.train import train as run_training
from secateur.healing.trainable import decide
from secateur.healing.trainer import Validation
from secateur.loading.models import attend_both_ways, model_label, open_model, save_model, use_stock_modules
from secateur.measures.metrics import cosines, retrieval
from secateur.progress import Progress, silent
from secateur.provenance import provenance
from secateur.pruning.prune import origin_of


def heal(
    model: str | Path,
    data: Data,
    *,
    columns: Mapping[str, str] | None = None,
    recipe: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    train: str | None = None,
    learning_rate: float | None = None,
    warmup: float | None = None,
    scale: float | None = None,
    max_length: int | None = None,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float | None = None,
    mini_batch_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    precision: str = "auto",
    seed: int = 42,
    instruction: str | None = None,
    teacher: str | Path | None = None,
    teacher_model: str | None = None,
    teacher_weight: float | None = None,
    distill: str | None = None,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    cache: str | Path | None = None,
    bidirectional: bool = False,
    eval_data: Data | None = None,
    eval_tasks: Sequence[str | Path] | None = None,
    eval_sample: int | None = None,
    eval_every: int | None = None,
    patience: int | None = None,
    report_to: str = "none",
    device: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path,
    progress: Progress = silent,
) -> Path:
    """Train a model on pairs, on texts alone, or by a teacher, and write it as a plain model folder.

    Numbers that are not given are the recipe's (:mod:`.recipe`); those named below are the paper's. A training
    that was killed goes on from its last checkpoint when the same command runs again. Started by ``torchrun`` or
    ``accelerate launch``, all processes train one model, and the first writes it.

    Args:
        model: A model folder, usually a pruned one; or anything :func:`.open_model` opens.
        data: Files of pairs (see :mod:`.pairs`), or folders of them; their instructions become the model's
            prompts. Or files of texts alone (see :mod:`.texts`). Or data sets by name (see :mod:`.hub_sets`).
        columns: Role → column, where the data call their ``query``, ``positive``, ``negative`` or ``text`` otherwise;
            for ``eval_data`` too.
        recipe: ``l3prune``, ``everyday`` or ``distill``. Default: ``distill`` where a teacher teaches on texts alone,
            else ``l3prune``.
        steps: Optimizer steps (1,000).
        batch_size: Pairs per step, of all processes together (64).
        train: ``lora``, ``blocks``, ``all`` or ``auto`` (:mod:`.trainable`; ``lora``).
        learning_rate: Peak of the schedule (:data:`.LEARNING_RATES`).
        warmup: Share of the steps in which the learning rate rises (0.3); then it falls linearly to 0.
        scale: Inverse temperature of the loss (50).
        max_length: Tokens per text while training (512).
        lora_rank: Rank of the adapters, on every linear layer of the blocks (16).
        lora_alpha: Their scale times the rank (32).
        lora_dropout: Dropout before them (0.05).
        mini_batch_tokens: Tokens in memory at once, for batches that do not fit; the numbers stay the same.
        gradient_checkpointing: Compute activations twice to save memory; the numbers stay the same.
        precision: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 where the processor computes in it.
        seed: Of adapters, dropout and the order of the data.
        instruction: Goes before each anchor, in place of those that come with the data; before each text alone.
        teacher: A model, or the address of a server (see :mod:`.teacher`), whose vectors are imitated.
        teacher_model: What a server calls its model.
        teacher_weight: Of the teacher beside the contrastive loss (0.5); texts alone leave it all.
        distill: What of the teacher is imitated: its ``vectors`` (the default; the student then stays in its space),
            the ``similarities`` between texts, or ``both``.
        depths: Train these depths too, so that the model can be cut there later without training.
        dims: Train vectors cut to these sizes too.
        cache: Folder that keeps the teacher's vectors (:mod:`.vectors`) beyond this training.
        bidirectional: Let a decoder's tokens see those after them, in training and in the written model.
        eval_data: Held-out files: the nDCG@10 of finding each anchor's positive among all positives and negatives.
        eval_tasks: Tasks as :func:`.evaluate` takes them.
        eval_sample: Use a seeded sample of this size of each of them.
        eval_every: Steps between measurements (a tenth of all). Of all models measured, the best is written, by the
            mean over ``eval_data`` and ``eval_tasks``.
        patience: Stop after so many measurements without a better one.
        report_to: A tracker that transformers' trainer knows (``tensorboard``, ``wandb``, ``mlflow``).
        device: Torch device.
        trust_remote_code: As for ``open_model``.
        out: The folder to write; it must not hold anything yet.
        progress: Told after each step.

    Returns:
        ``out``: reopened in a fresh process and compared, with ``training.json`` beside the model.

    Raises:
        ModelError, DataError, ConfigError, OutputError: Bad input.
        TrainingDiverged: The loss is not finite, or exploded.
        VerificationFailed: The written folder gives other vectors.
    """
    partial_folder(out)
    sources = read_sources(data, instruction, columns)
    aim = find_aim(
        sources,
        taught=teacher is not None,
        teacher_weight=teacher_weight,
        distill=distill,
        depths=depths or (),
        dims=dims or (),
    )
    recipe = recipe or aim.recipe
    numbers = make_recipe(
        recipe,
        steps=steps,
        batch_size=batch_size,
        train=train,
        learning_rate=learning_rate,
        warmup=warmup,
        scale=scale,
        max_length=max_length,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        mini_batch_tokens=mini_batch_tokens,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
        seed=seed,
    )
    check_tracker(report_to)
    processes.join()
    check_processes(numbers.batch_size)
    sets = sets_of(sources, numbers.batch_size, aim)
    validation = _validation(
        _read_pairs(eval_data, instruction, columns), eval_tasks or (), eval_sample, eval_every, patience, seed
    )
    guide = _open_teacher(teacher, teacher_model, device, trust_remote_code)
    opened = open_model(model, device=device, trust_remote_code=trust_remote_code)
    check_views(opened, aim.depths, aim.dims)
    use_stock_modules(opened)
    if bidirectional:
        attend_both_ways(opened, model)
    opened.prompts.update(model_prompts(sources))
    numbers = decide(opened, numbers)
    settings = {"recipe": recipe} | asdict(numbers) | {"data": {item.name: len(item.rows) for item in sets}}
    settings |= {
        "columns": dict(columns or {}),
        "bidirectional": bidirectional,
        "eval_every": eval_every,
        "patience": patience,
    }
    settings |= _aim_settings(aim, guide, teacher_model)
    partial = _claim(Path(out), model, settings, sources)
    with writing(out):
        vectors = None
        if guide:
            sets, vectors = teach(sets, guide, Path(cache or partial / "teacher"), progress)
            guide = None  # its weights are not needed any more
        with dropout_of(opened, aim):
            outcome = run_training(
                opened,
                sets,
                numbers,
                partial / "checkpoints",
                progress,
                lambda model, recipe: make_objective(model, recipe, aim=aim, teacher=vectors),
                validation=validation,
                report_to=report_to,
            )
        if processes.is_first():
            finished = _empty(partial / "model")
            depth = depth_of(opened[0].auto_model)
            save_model(opened, finished, origin_of(model, depth, range(depth)))
            _table(model, sources, settings, outcome).save(finished)
            give_name(finished, Path(out))
            shutil.rmtree(partial)
        processes.wait()
    return Path(out)


def _read_pairs(data: Data | None, instruction: str | None, columns: Mapping[str, str] | None) -> list[Pairs]:
    """Held-out data, which are pairs."""
    found = []
    for source in read_sources(data or (), instruction, columns):
        if isinstance(source, Texts):
            raise DataError(source.source.name, "holds texts alone, and what is measured is how pairs are found")
        found.append(source)
    return found


def _open_teacher(name: str | Path | None, model: str | None, device: str | None, trusted: bool) -> Teacher | None:
    if name is not None:
        return open_teacher(name, model=model, device=device, trust_remote_code=trusted)
    if model is not None:
        raise ConfigError("teacher_model", model, "there is no teacher", "name one with --teacher")
    return None


def _aim_settings(aim: Aim, teacher: Teacher | None, model: str | None) -> dict[str, Any]:
    """What goes into ``training.json`` of what was aimed at, and of the teacher."""
    settings: dict[str, Any] = {"objective": aim.kind, "depths": aim.depths, "dims": aim.dims}
    if teacher:
        settings |= {"teacher": teacher.name, "teacher_model": model, "teacher_fingerprint": teacher.fingerprint}
        settings |= {"teacher_weight": aim.teacher_weight, "distill": aim.distill}
    return settings


def _table(model: str | Path, sources: Sequence[Source], settings: dict[str, Any], outcome: Outcome) -> Training:
    return Training(
        provenance=provenance([pairs.source for pairs in sources], settings["seed"]),
        model=model_label(model),
        steps=settings["steps"],
        seconds=outcome.seconds,
        trained_parameters=outcome.trained_parameters,
        settings=settings,
        prompts=model_prompts(sources),
        losses=outcome.losses,
        trials=outcome.trials,
        best_step=outcome.best_step,
    )


def _validation(
    held_out: Sequence[Pairs],
    tasks: Sequence[str | Path],
    sample: int | None,
    every: int | None,
    patience: int | None,
    seed: int,
) -> Validation | None:
    """How a model is measured on the way: the mean over held-out files and tasks."""
    if not held_out and not tasks:
        for key, value in (("eval_every", every), ("patience", patience), ("eval_sample", sample)):
            if value is not None:
                raise ConfigError(key, value, "there is nothing to measure on the way", "give eval_data or eval_tasks")
        return None
    if tasks:
        open_tasks(tasks, sample, seed)
    sampled = [pairs if sample is None else pairs.sample(sample, seed) for pairs in held_out]

    def score(model: SentenceTransformer) -> float:
        found = [held_out_ndcg(model, pairs) for pairs in sampled]
        if tasks:
            found += [row.score for row in evaluate([model], tasks, sample=sample, seed=seed, names=["model"]).rows]
        return sum(found) / len(found)

    return Validation(score, every, patience)


def held_out_ndcg(model: SentenceTransformer, pairs: Pairs) -> float:
    """nDCG@10 of finding each anchor's positive among all positives and negatives of a file, 0 to 1."""
    options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False}
    anchors = model.encode([row.anchor for row in pairs.rows], prompt=pairs.prompt or None, **options)
    texts = [row.positive for row in pairs.rows] + [text for row in pairs.rows for text in row.negatives]
    candidates: torch.Tensor = model.encode(texts, prompt=pairs.passage_prompt or None, **options)
    return float(retrieval(cosines(anchors, candidates)).ndcg_at_10)


def model_prompts(sources: Sequence[Source]) -> dict[str, str]:
    """The prompts that stay with a model: by data set, and as ``query`` and ``document`` where all data agree.

    Texts alone without an instruction leave the model those that it has.
    """
    told = [source for source in sources if isinstance(source, Pairs) or source.prompt]
    prompts = {source.name: source.prompt for source in told if source.prompt}
    queries = {source.prompt for source in told}
    passages = {source.passage_prompt if isinstance(source, Pairs) else source.prompt for source in told}
    if len(queries) == len(passages) == 1:
        prompts |= {"query": queries.pop(), "document": passages.pop()}
    return prompts


def _claim(out: Path, model: str | Path, settings: dict[str, Any], sources: Sequence[Source]) -> Path:
    """The folder that a training works in; one that an equal training left unfinished is taken up again."""
    partial = partial_folder(out)
    processes.wait()  # or a late one would find what the first one wrote
    if not processes.is_first():
        processes.wait()
        return partial
    wanted = json.loads(json.dumps({"model": str(model), **settings, "sha256": [p.source.sha256 for p in sources]}))
    note = partial / "training.json"
    if note.is_file() and read_json(note) != wanted:
        raise OutputError(
            partial, "holds an unfinished training with other settings", "remove it, or name another --out"
        )
    if not note.is_file():
        shutil.rmtree(partial, ignore_errors=True)
        write_text(note, json.dumps(wanted, indent=1))
    processes.wait()
    return partial


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
