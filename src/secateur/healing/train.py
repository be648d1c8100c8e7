"""Training on sentence-transformers' trainer: the sets, the objective, the numbers, the outcome.

:mod:`.heal` is the command around it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
from transformers import PrinterCallback, TrainerState
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from secateur.artifacts import LossRow, TrialRow
from secateur.data.pairs import Pair, Pairs
from secateur.errors import ConfigError, DataError
from secateur.healing import processes
from secateur.healing.minibatches import MiniBatchedLoss
from secateur.healing.objectives import Objective
from secateur.healing.recipe import Recipe
from secateur.healing.trainable import decide, finish, prepare
from secateur.healing.trainer import SCORE, Judge, Trainer, Validation, Watch, last_checkpoint
from secateur.progress import Progress, quiet

CHECKPOINTS = 10
"""How many a training writes on its way, so that a killed one loses at most a tenth."""

LOGGED = 100
"""About how many losses a training logs."""


@dataclass(frozen=True)
class Outcome:
    """What a training did.

    ``losses`` are those logged, ``trials`` the scores on the way, ``best_step`` the one whose weights were kept (None:
    the last); ``seconds`` since the (re)start, ``trained_parameters`` how many numbers were trained.
    """

    losses: tuple[LossRow, ...]
    seconds: float
    trained_parameters: int
    trials: tuple[TrialRow, ...] = ()
    best_step: int | None = None


@dataclass(frozen=True)
class TrainingSet:
    """Rows of one data file that share a number of negatives, and the prompt of each column."""

    name: str
    rows: Dataset
    prompts: Mapping[str, str]


def training_sets(sources: Sequence[Pairs], batch_size: int) -> list[TrainingSet]:
    """Data as the trainer wants it: within a set, every row has the same number of negatives.

    A file whose rows have a negative here and there becomes two sets; rows with more negatives than the others are
    cut to the fewest. A set that does not fill a batch is left out.

    Raises:
        DataError: Nothing fills a batch, or two files have one name.
    """
    sets = []
    names = [pairs.name for pairs in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(name, "two data files have this name, and a prompt belongs to a name", "rename one")
    for pairs in sources:
        bare = [row for row in pairs.rows if not row.negatives]
        hard = [row for row in pairs.rows if row.negatives]
        for suffix, rows in (("", bare), ("-hard" if bare else "", hard)):
            if len(rows) >= batch_size:
                sets.append(_training_set(pairs, pairs.name + suffix, rows))
    if not sets:
        counts = ", ".join(f"{pairs.source.name}: {len(pairs.rows)} rows" for pairs in sources)
        raise DataError("data", f"nothing fills a batch of {batch_size} ({counts})", "more rows, or a smaller batch")
    return sets


def _training_set(pairs: Pairs, name: str, rows: Sequence[Pair]) -> TrainingSet:
    columns = {"anchor": [row.anchor for row in rows], "positive": [row.positive for row in rows]}
    for i in range(min(len(row.negatives) for row in rows)):
        columns[f"negative_{i + 1}"] = [row.negatives[i] for row in rows]
    prompts = {column: pairs.prompt if column == "anchor" else pairs.passage_prompt for column in columns}
    return TrainingSet(name, Dataset.from_dict(columns), {column: text for column, text in prompts.items() if text})


MakeLoss = Callable[[SentenceTransformer, Recipe], torch.nn.Module]
"""Makes the loss of a training, as sentence-transformers has them: a module with
``forward(sentence_features, labels) -> scalar``.

``sentence_features`` has one dictionary of tokens for each text column of the set that the batch is from, in the order
of its columns (anchor, positive, negative_1, …); ``labels`` is the column ``label`` of that set as a tensor, or None.
Parameters of its own are trained and kept in the checkpoints with those of the model. The module must embed through
its attribute ``model``, which the trainer replaces by the wrapped one when there are several processes.
"""


def make_loss(model: SentenceTransformer, recipe: Recipe) -> torch.nn.Module:
    """The paper's objective: each anchor finds its positive among all positives and negatives of the batch.

    With several processes, the batch is that of all of them. No text is a negative of its own: a batch holds no text
    twice (the sampler sees to that, over all columns), and what is the same once it is cut is left out by the loss.
    """
    if recipe.mini_batch_tokens is None:
        return Objective(model, scale=recipe.scale)
    return MiniBatchedLoss(model, recipe.mini_batch_tokens, recipe.scale)


def train(
    model: SentenceTransformer,
    sets: Sequence[TrainingSet],
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    objective: MakeLoss = make_loss,
    *,
    validation: Validation | None = None,
    report_to: str = "none",
) -> Outcome:
    """Train a model in place.

    Args:
        model: The model; its own modules pool and normalise.
        sets: Each batch comes from one of them, drawn in proportion to their rows. Columns are texts, but for one
            that is called ``label``: numbers, or lists of numbers of equal length, which the objective is given.
        recipe: The numbers; what is left open in them (:func:`.decide`) is decided here.
        folder: Where checkpoints go; a training that stopped there goes on.
        progress: Told the pairs seen, after each step.
        objective: Makes the loss.
        validation: Scores on the way; the model is left at the best.
        report_to: A tracker that the trainer knows: ``tensorboard``, ``wandb``, ``mlflow``, …

    Raises:
        TrainingDiverged: The loss is not finite, or exploded.
        ConfigError: The launcher asks for FSDP.
    """
    recipe = decide(model, recipe)
    before = prepare(model, recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.max_seq_length, own_length = min(recipe.max_length, model.max_seq_length), model.max_seq_length
    # They join the processes, whose number a loss may ask for.
    arguments = training_arguments(sets, recipe, folder, validation, report_to)
    patience = validation.patience if validation else None
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=DatasetDict({item.name: item.rows for item in sets}),
        loss=objective(model, recipe),
        evaluator=Judge(validation.score, own_length) if validation else None,
        callbacks=[Watch(folder, f"heal ({recipe.train}), pairs", recipe.batch_size, patience, progress)],
    )
    if trainer.is_fsdp_enabled:
        raise ConfigError("fsdp", True, "weights cannot be sharded", "start the processes without FSDP")
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    with quiet():
        trainer.go_on(last_checkpoint(folder), patience)
    # The trainer left its autocast around the model: what is saved and compared is the model without it.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.max_seq_length = own_length
    finish(model, before)
    return Outcome(
        losses=tuple(_loss_rows(trainer.state)),
        seconds=time.monotonic() - started,
        trained_parameters=trained,
        trials=tuple(TrialRow(row["step"], row[SCORE]) for row in trainer.state.log_history if SCORE in row),
        best_step=trainer.state.best_global_step if validation else None,
    )


def training_arguments(
    sets: Sequence[TrainingSet],
    recipe: Recipe,
    folder: Path,
    validation: Validation | None = None,
    report_to: str = "none",
) -> SentenceTransformerTrainingArguments:
    """A decided recipe as the trainer takes it."""
    log_every = max(1, recipe.steps // LOGGED)
    # A logged loss is the mean since the one before: a checkpoint between two would lose the steps that led to it.
    save_every = log_every * math.ceil(recipe.steps / CHECKPOINTS / log_every)
    if validation and validation.every:
        save_every = validation.every
        log_every = math.gcd(log_every, save_every)
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        # A batch is drawn whole and divided among the processes, so that their number changes no loss.
        accelerator_config={"split_batches": True},
        learning_rate=recipe.learning_rate,
        warmup_steps=round(recipe.warmup * recipe.steps),
        lr_scheduler_type="linear",
        bf16=recipe.in_bfloat16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_drop_last=True,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
        prompts={item.name: dict(item.prompts) for item in sets if item.prompts} or None,
        eval_strategy="steps" if validation else "no",
        eval_steps=save_every if validation else None,
        load_best_model_at_end=validation is not None,
        metric_for_best_model=SCORE if validation else None,
        greater_is_better=True if validation else None,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=True,
    )


def _loss_rows(state: TrainerState) -> list[LossRow]:
    logged = [entry for entry in state.log_history if "loss" in entry]
    return [LossRow(entry["step"], entry["loss"], entry["learning_rate"]) for entry in logged]


def check_processes(batch_size: int) -> None:
    """Refuse a batch that does not divide evenly among the processes.

    Raises:
        ConfigError: It does not.
    """
    if batch_size % processes.count():
        problem = f"{batch_size} pairs do not divide among {processes.count()} processes"
        raise ConfigError("batch_size", batch_size, problem, f"a multiple of {processes.count()}")


def check_tracker(name: str) -> None:
    """Refuse a tracker that transformers does not know, or that is not installed.

    Raises:
        ConfigError: It is not there.
    """
    if name not in ("none", "all", *INTEGRATION_TO_CALLBACK):
        raise ConfigError("report_to", name, f"is {name!r}", f"none, all, {', '.join(INTEGRATION_TO_CALLBACK)}")
    # Flyte and Azure are not among those that transformers looks for by themselves.
    if name not in ("none", "all", "flyte", "azure_ml", *get_available_reporting_integrations()):
        raise ConfigError("report_to", name, f"{name} is not installed here", f"pip install {name}")
