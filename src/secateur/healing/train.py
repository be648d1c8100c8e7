"""Training on sentence-transformers' trainer: the sets, the objective, the numbers, the outcome.

:mod:`.heal` is the command around it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import (
    BatchSamplers,
    MultiDatasetBatchSamplers,
    NoDuplicatesBatchSampler,
    ProportionalBatchSampler,
)
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, TrainerState
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from secateur.data.sources import Pair, Pairs
from secateur.errors import ConfigError, DataError
from secateur.healing import processes
from secateur.healing.minibatches import MiniBatchedLoss
from secateur.healing.objectives import Objective
from secateur.healing.recipe import Recipe
from secateur.healing.trainable import decide, finish, prepare
from secateur.healing.trainer import (
    SCORE,
    Judge,
    Trainer,
    Validation,
    Watch,
    check_learning,
    last_checkpoint,
    out_of_patience,
)
from secateur.progress import Progress, quiet
from secateur.results import LossRow, TrialRow

CHECKPOINTS = 10
"""How many a training writes on its way, so that a killed one loses at most a tenth."""

LOGGED = 100
"""About how many losses a training logs."""


@dataclass(frozen=True)
class Outcome:
    """What a training did.

    ``steps`` are those done, ``losses`` those logged, ``trials`` the scores on the way, ``best_step`` the one whose
    weights were kept (None: the last); ``seconds`` are those of the training, without what a kill lost of it;
    ``trained_parameters`` is how many numbers were trained.
    """

    steps: int
    losses: tuple[LossRow, ...]
    seconds: float
    trained_parameters: int
    trials: tuple[TrialRow, ...] = ()
    best_step: int | None = None


@dataclass(frozen=True)
class TrainingSet:
    """Rows of one data file that share a number of negatives, and the prompt of each column.

    ``source`` is the name of the data they are from.
    """

    name: str
    rows: Dataset
    prompts: Mapping[str, str]
    source: str = ""


def training_sets(sources: Sequence[Pairs], batch_size: int) -> list[TrainingSet]:
    """Data as the trainer wants it: within a set, every row has the same number of negatives.

    A file whose rows have a negative here and there becomes two sets; rows with more negatives than the others are
    cut to the fewest. A set that does not fill a batch is left out; :func:`left_out` tells it.

    Raises:
        DataError: Nothing fills a batch, or two files have one name.
    """
    groups = [group for pairs in sources for group in _groups(pairs)]
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise DataError(name, "two data files have this name, and a prompt belongs to a name", "rename one")
    sets = [_training_set(group) for group in groups if apart(group.texts, batch_size) == batch_size]
    if not sets:
        counts = ", ".join(group.told(batch_size) for group in groups)
        hint = "more rows, whose texts differ, or a smaller batch"
        raise DataError("data", f"nothing fills a batch of {batch_size} ({counts})", hint)
    return sets


def left_out(sources: Sequence[Pairs], batch_size: int) -> list[str]:
    """What is odd about data, in words.

    Rows that fill no batch and negatives beyond the fewest are left out by :func:`training_sets`. A text that is
    positive and negative of one query is trained on as both, but within a batch.
    """
    found = [told for pairs in sources if (told := _contradictions(pairs))]
    for group in (group for pairs in sources for group in _groups(pairs)):
        if apart(group.texts, batch_size) < batch_size:
            found.append(f"{group.told(batch_size)}: too few for a batch of {batch_size}, not trained on")
            continue
        cut = [len(row.negatives) for row in group.rows if len(row.negatives) > group.negatives]
        if cut:
            told = f"{len(cut)} rows have up to {max(cut)} negatives, of which {group.negatives} are used"
            found.append(f"{group.pairs.source.name}: {told}, as many as every row has")
    return found


def _contradictions(pairs: Pairs) -> str:
    positives: dict[str, set[str]] = {}
    for row in pairs.rows:
        positives.setdefault(row.anchor, set()).add(row.positive)
    both = [i for i, row in enumerate(pairs.rows, 1) if not positives[row.anchor].isdisjoint(row.negatives)]
    if not both:
        return ""
    return (
        f"{pairs.source.name}: {len(both)} rows have a negative that is a positive of the same query: row {both[0]}"
        + (" and others" if len(both) > 1 else "")
    )


def apart(rows: Sequence[Sequence[str]], most: int) -> int:
    """How many rows, up to ``most``, hold no text of each other: the sampler puts no others into one batch.

    It takes them as they come, in an order that is drawn; here those with the rarest texts come first, where the
    order of the file does not do.
    """
    counts = [_taken(rows, most)]
    if counts[0] < min(most, len(rows)):
        often = Counter(text for row in rows for text in set(row))
        counts.append(_taken(sorted(rows, key=lambda row: max(often[text] for text in row)), most))
    return max(counts)


def _taken(rows: Sequence[Sequence[str]], most: int) -> int:
    texts: set[str] = set()
    count = 0
    for row in rows:
        if count == most:
            break
        if texts.isdisjoint(row):
            texts.update(row)
            count += 1
    return count


@dataclass(frozen=True)
class _Group:
    """Rows of one file, all with negatives or all without; ``negatives`` is the fewest that one has."""

    pairs: Pairs
    name: str
    rows: Sequence[Pair]
    negatives: int
    kind: str

    @property
    def texts(self) -> list[tuple[str, ...]]:
        return [(row.anchor, row.positive, *row.negatives[: self.negatives]) for row in self.rows]

    def told(self, batch_size: int) -> str:
        """How many rows, and where they are many, how many of them can be in one batch."""
        told = f"{self.pairs.source.name}: {len(self.rows)} rows{self.kind}"
        if len(self.rows) < batch_size:
            return told
        return f"{told}, no more than {apart(self.texts, batch_size)} of them without a text in common"


def _groups(pairs: Pairs) -> list[_Group]:
    bare = [row for row in pairs.rows if not row.negatives]
    hard = [row for row in pairs.rows if row.negatives]
    if not bare or not hard:
        return [_Group(pairs, pairs.name, pairs.rows, min((len(row.negatives) for row in hard), default=0), "")]
    fewest = min(len(row.negatives) for row in hard)
    return [
        _Group(pairs, pairs.name, bare, 0, " without negatives"),
        _Group(pairs, f"{pairs.name}-hard", hard, fewest, " with negatives"),
    ]


def _training_set(group: _Group) -> TrainingSet:
    names = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(group.negatives))]
    columns = dict(zip(names, map(list, zip(*group.texts, strict=True)), strict=True))
    pairs = group.pairs
    prompts = {column: pairs.prompt if column == "anchor" else pairs.passage_prompt for column in columns}
    told = {column: text for column, text in prompts.items() if text}
    return TrainingSet(group.name, Dataset.from_dict(columns), told, pairs.name)


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
    rows: str = "pairs",
) -> Outcome:
    """Train a model in place.

    Args:
        model: The model; its own modules pool and normalise.
        sets: Each batch comes from one of them, drawn in proportion to their rows. Columns are texts, but for one
            that is called ``label``: numbers, or lists of numbers of equal length, which the objective is given.
        recipe: The numbers; what is left open in them (:func:`.decide`) is decided here.
        folder: Where checkpoints go; a training that stopped there goes on.
        progress: Told the rows seen, after each step.
        objective: Makes the loss.
        validation: Scores on the way; the model is left at the best.
        report_to: A tracker that the trainer knows: ``tensorboard``, ``wandb``, ``mlflow``, …
        rows: What the rows are, for the progress.

    Raises:
        TrainingDiverged: The loss is not finite, or exploded.
        ConfigError: The launcher asks for FSDP.
        DataError: The data had no batches for all of the steps, or the loss was 0 in every one.
        OutputError: A file of the checkpoint that it would go on from is damaged.
    """
    recipe = decide(model, recipe)
    before = prepare(model, recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own_length = model.max_seq_length
    model.max_seq_length = min(recipe.max_length, own_length or recipe.max_length)
    # They join the processes, whose number a loss may ask for.
    arguments = training_arguments(sets, recipe, folder, validation, report_to)
    patience = validation.patience if validation else None
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=DatasetDict({item.name: item.rows for item in sets}),
        loss=objective(model, recipe),
        evaluator=Judge(validation.score, own_length, before) if validation else None,
        callbacks=[Watch(folder, f"heal ({recipe.train}), {rows}", recipe.batch_size, patience, progress)],
    )
    if trainer.is_fsdp_enabled:
        raise ConfigError("fsdp", True, "weights cannot be sharded", "start the processes without FSDP")
    trainer.remove_callback(PrinterCallback)
    with quiet():
        trainer.go_on(last_checkpoint(folder), patience)
    state = trainer.state
    if state.global_step < recipe.steps and not out_of_patience(state, patience):
        problem = f"gave no batch of {recipe.batch_size} after {state.global_step} of {recipe.steps} steps"
        raise DataError("data", problem, "more rows, whose texts differ, or a smaller batch")
    check_learning(state)
    # The trainer left its autocast around the model: what is saved and compared is the model without it.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.max_seq_length = own_length
    finish(model, before)
    return Outcome(
        steps=state.global_step,
        losses=tuple(_loss_rows(state)),
        seconds=trainer.seconds,
        trained_parameters=trained,
        trials=tuple(TrialRow(row["step"], row[SCORE]) for row in state.log_history if SCORE in row),
        best_step=state.best_global_step if validation else None,
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


def used_rows(sets: Sequence[TrainingSet], recipe: Recipe) -> list[list[int]]:
    """The rows of each set that are in a batch of the training, ascending.

    They come from the samplers that :func:`training_arguments` names, with its seed, epoch by epoch as the trainer
    draws them. The sets must be those that are trained on, in their order; a column ``label`` makes no difference.
    """
    arguments = training_arguments(sets, recipe, Path("checkpoints"))
    generator = torch.Generator()
    own = [
        NoDuplicatesBatchSampler(
            item.rows, arguments.train_batch_size, drop_last=True, generator=generator, seed=arguments.seed
        )
        for item in sets
    ]
    together: ConcatDataset[Any] = ConcatDataset([item.rows for item in sets])
    sampler = ProportionalBatchSampler(together, own, generator, arguments.seed)
    used: set[int] = set()
    left, epoch, drawn = recipe.steps, 0, True
    with quiet():
        while drawn and left and len(used) < len(together):
            sampler.set_epoch(epoch)
            drawn = False
            for batch in islice(sampler, left):
                used.update(batch)
                left, drawn = left - 1, True
            epoch += 1
    starts = [0, *together.cumulative_sizes]
    return [sorted(row - start for row in used if start <= row < end) for start, end in pairwise(starts)]


def _loss_rows(state: TrainerState) -> list[LossRow]:
    logged = [entry for entry in state.log_history if "loss" in entry]
    return [LossRow(entry["step"], entry["loss"], entry["learning_rate"]) for entry in logged]


def check_processes(batch_size: int) -> None:
    """Refuse a batch that does not divide evenly among the processes.

    Raises:
        ConfigError: It does not.
    """
    if batch_size % processes.count():
        problem = f"a batch of {batch_size} does not divide among {processes.count()} processes"
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
