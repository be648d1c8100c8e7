"""A cut model → a healed one: trained on pairs, or on texts alone, and written as a plain model folder.

What is trained is the folder's own pooling and length rules, and its default prompt where the data bring no
instruction (:mod:`.prompts`); the written folder has the prompts of the training, so that training and use agree.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from secateur.data.sources import Data, Source, Texts, read_sources
from secateur.data.vectors import fingerprint_model
from secateur.errors import ConfigError
from secateur.files import empty_folder, output_errors, partial_folder, rename_into_place
from secateur.healing import processes
from secateur.healing.held_out import read_held_out
from secateur.healing.lessons import Aim, dropout_of, find_aim, make_objective, not_trained_on, sets_of, teach
from secateur.healing.objectives import check_views
from secateur.healing.prompts import check_room, default_prompt, keep_prompts, prompts_of
from secateur.healing.recipe import make_recipe
from secateur.healing.resuming import only_run, take_up
from secateur.healing.teacher import Teacher, open_teacher
from secateur.healing.train import Outcome, TrainingSet, check_processes, check_tracker
from secateur.healing.train import train as run_training
from secateur.healing.trainable import decide
from secateur.models.blocks import depth_of
from secateur.models.open_model import make_bidirectional, model_label, open_model, save_model
from secateur.progress import Progress, silent
from secateur.provenance import provenance
from secateur.pruning.prune import origin_of
from secateur.results import Training


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
    that was killed goes on from its last checkpoint when the same command runs again, on the same model and data.
    Started by ``torchrun`` or ``accelerate launch``, all processes train one model, and the first writes it.

    Args:
        model: A model folder, usually a pruned one; or anything :func:`.open_model` opens.
        data: Files of pairs (see :mod:`.sources`), or folders of them; their instructions take the place of the model's
            prompts, but for its default prompt, which stays where one of them has none. Or files of texts alone (see
            :mod:`.sources`). Or data sets by name (see :mod:`.hub`). What fills no batch is left out, and told
            under ``notes`` in ``training.json``.
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
        instruction: Goes before each anchor, in place of those that come with the data; before each text alone. An
            empty one: nothing does, not even the model's default prompt. What the data put before passages stays.
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
        ModelError, DataError, ConfigError: Bad input; ``out`` was begun with another model, data or settings; or the
            loss is 0 from the first step, so that nothing is learned.
        OutputError: ``out`` holds something, cannot be written, or another run is writing it; or its newest checkpoint
            is damaged.
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
    held_out = read_held_out(
        eval_data,
        eval_tasks,
        instruction=instruction,
        columns=columns,
        sample=eval_sample,
        every=eval_every,
        patience=patience,
        seed=seed,
    )
    opened = open_model(model, device=device, trust_remote_code=trust_remote_code)
    length = min(numbers.max_length, opened.max_seq_length or numbers.max_length)
    guide = _open_teacher(teacher, teacher_model, cache, length, device, trust_remote_code)
    if bidirectional:
        make_bidirectional(opened, model)
    student = _prepare(opened, sets, sources, aim, default_prompt(opened) if instruction is None else "")
    check_room(opened, (text for own in student.prompts.values() for text in own.values()), numbers.max_length)
    numbers = decide(opened, numbers)
    settings = {"recipe": recipe} | asdict(numbers) | {"data": {item.name: len(item.rows) for item in sets}}
    settings |= {"columns": dict(columns or {}), "bidirectional": bidirectional, "instruction": instruction}
    settings |= held_out.settings | _aim_settings(aim, guide, teacher_model)
    settings["notes"] = not_trained_on(sources, numbers.batch_size, aim)
    with output_errors(out), only_run(Path(out)) as partial:
        if processes.is_first():
            settings["notes"] += take_up(partial, _follows_from(settings, student))
        processes.wait()
        vectors = None
        if guide:
            sets, vectors = teach(sets, numbers, guide, Path(cache or partial / "teacher"), progress)
            guide = None  # its weights are not needed any more
        with dropout_of(opened, aim):
            outcome = run_training(
                opened,
                [replace(item, prompts=student.prompts[item.name]) for item in sets],  # a teacher has its own default
                numbers,
                partial / "checkpoints",
                progress,
                lambda model, recipe: make_objective(model, recipe, aim=aim, teacher=vectors),
                validation=held_out.validation,
                report_to=report_to,
                rows=_rows_of(sources),
            )
        if processes.is_first():
            _write(model, student, settings, outcome, partial / "model")
            rename_into_place(partial / "model", Path(out))
            shutil.rmtree(partial)
        processes.wait()
    return Path(out)


@dataclass(frozen=True, eq=False)
class _Student:
    """A model as it is trained.

    ``sources`` are the data that it is trained on, ``prompts`` those of each set's columns, and ``kept`` those that the
    written folder has from the data.
    """

    model: SentenceTransformer
    sources: Sequence[Source]
    prompts: Mapping[str, Mapping[str, str]]
    kept: Mapping[str, str]


def _prepare(
    model: SentenceTransformer, sets: Sequence[TrainingSet], sources: Sequence[Source], aim: Aim, default: str
) -> _Student:
    """Give a model its modules and prompts for training, ``default`` where the data bring none."""
    check_views(model, aim.depths, aim.dims)
    used = {item.source for item in sets}
    trained_on = [source for source in sources if source.name in used]
    prompts = {item.name: prompts_of(item, default) for item in sets}
    return _Student(model, trained_on, prompts, keep_prompts(model, trained_on, default))


def _rows_of(sources: Sequence[Source]) -> str:
    kinds = {type(source) for source in sources}
    return "rows" if len(kinds) > 1 else "texts" if kinds == {Texts} else "pairs"


def _open_teacher(
    name: str | Path | None,
    model: str | None,
    cache: str | Path | None,
    max_length: int,
    device: str | None,
    trusted: bool,
) -> Teacher | None:
    if name is not None:
        return open_teacher(name, model=model, max_length=max_length, device=device, trust_remote_code=trusted)
    for key, value in (("teacher_model", model), ("cache", cache)):
        if value is not None:
            raise ConfigError(key, value, "there is no teacher", "name one with --teacher")
    return None


def _aim_settings(aim: Aim, teacher: Teacher | None, model: str | None) -> dict[str, Any]:
    """What goes into ``training.json`` of what was aimed at, and of the teacher."""
    settings: dict[str, Any] = {"objective": aim.kind, "depths": aim.depths, "dims": aim.dims}
    if teacher:
        settings |= {"teacher": teacher.name, "teacher_model": model, "teacher_fingerprint": teacher.fingerprint}
        settings |= {"teacher_weight": aim.teacher_weight, "distill": aim.distill}
    return settings


_NAMES = ("notes", "instruction", "teacher", "teacher_model", "name", "licence")
"""Settings that no number follows from: what they name is known by its content."""


def _follows_from(settings: Mapping[str, Any], student: _Student) -> dict[str, Any]:
    """All that decides on the numbers of a training."""
    known = {key: value for key, value in settings.items() if key not in _NAMES}
    for key in ("eval_data", "eval_tasks"):
        known[key] = [{name: value for name, value in item.items() if name not in _NAMES[-2:]} for item in known[key]]
    return {
        "weights": fingerprint_model(student.model),
        "sha256": [source.source.sha256 for source in student.sources],
        "prompts": student.prompts,
        **known,
    }


def _write(model: str | Path, student: _Student, settings: dict[str, Any], outcome: Outcome, folder: Path) -> None:
    """Write the trained model, and what made it."""
    folder.mkdir(exist_ok=True)
    empty_folder(folder)
    depth = depth_of(student.model[0].auto_model)
    save_model(student.model, folder, origin_of(model, depth, range(depth)))
    Training(
        provenance=provenance([source.source for source in student.sources], settings["seed"]),
        model=model_label(model),
        steps=outcome.steps,
        seconds=outcome.seconds,
        trained_parameters=outcome.trained_parameters,
        settings=settings,
        prompts=student.kept,
        losses=outcome.losses,
        trials=outcome.trials,
        best_step=outcome.best_step,
    ).save(folder)
