"""Contrastive LoRA training on sentence-transformers' trainer: the sets, the checkpoints, the merge.

:mod:`secateur.heal` is the command around it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from secateur.artifacts import LossRow
from secateur.blocks import linear_names
from secateur.data import Pair, Pairs
from secateur.errors import ConfigError, DataError, TrainingDiverged
from secateur.progress import Progress, quiet

WARMUP = 0.3
"""Share of the steps in which the learning rate rises: the paper's 300 of 1,000."""

CHECKPOINTS = 10
"""How many a training writes on its way, so that a killed one loses at most a tenth."""

LOGGED = 100
"""About how many losses a training logs."""

LENGTH_STEP = 16
TRAINED_WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training; the defaults are the paper's (L3Prune, arXiv 2410.14578, section 4).

    ``precision`` is ``float32``, ``bfloat16`` (autocast) or ``auto``: bfloat16 where the processor multiplies in it.
    ``gradient_checkpointing`` saves memory, costs time, and changes no number.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-4
    scale: float = 50.0
    max_length: int = 512
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = False
    precision: str = "auto"
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse numbers that no training can run with."""
        for name in ("steps", "learning_rate", "scale", "max_length", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(name, value, f"is {value}", "it must be positive")
        if self.batch_size < 2:
            raise ConfigError(
                "batch_size", self.batch_size, f"is {self.batch_size}", "in-batch negatives need at least 2"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError("lora_dropout", self.lora_dropout, f"is {self.lora_dropout}", "it is a share below 1")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError("precision", self.precision, f"is {self.precision!r}", "auto, float32 or bfloat16")

    @property
    def in_bfloat16(self) -> bool:
        """``precision``, with ``auto`` decided for this machine."""
        if self.precision != "auto":
            return self.precision == "bfloat16"
        if torch.cuda.is_available():
            return bool(torch.cuda.is_bf16_supported())
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class Outcome:
    """What a training did: the logged losses, seconds since the (re)start, and how many numbers were trained."""

    losses: tuple[LossRow, ...]
    seconds: float
    trained_parameters: int


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


Objective = Callable[[SentenceTransformer, Recipe], torch.nn.Module]
"""Makes the loss of a training, as sentence-transformers has them: a module with
``forward(sentence_features, labels) -> scalar``.

``sentence_features`` has one dictionary of tokens for each text column of the set that the batch is from, in the order
of its columns (anchor, positive, negative_1, …); ``labels`` is the column ``label`` of that set as a tensor, or None.
Parameters of its own are trained and kept in the checkpoints with those of the model. The module must embed through
its attribute ``model``, which the trainer replaces by the wrapped one when there are several processes.
"""


def make_loss(model: SentenceTransformer, recipe: Recipe) -> torch.nn.Module:
    """The paper's objective: each anchor finds its positive among all positives and negatives of the batch."""
    loss: torch.nn.Module = MultipleNegativesRankingLoss(model, scale=recipe.scale)
    return loss


def train(
    model: SentenceTransformer,
    sets: Sequence[TrainingSet],
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    objective: Objective = make_loss,
) -> Outcome:
    """Train adapters and merge them into the model, in place.

    Args:
        model: The model; its own modules pool and normalise.
        sets: Each batch comes from one of them, drawn in proportion to their rows. Columns are texts, but for one
            that is called ``label``: numbers, or lists of numbers of equal length, which the objective is given.
        recipe: The numbers.
        folder: Where checkpoints go; a training that stopped there goes on.
        progress: Told after each step.
        objective: Makes the loss.

    Raises:
        TrainingDiverged: The loss is not finite.
    """
    _add_adapters(model, recipe)
    model.max_seq_length, own_length = min(recipe.max_length, model.max_seq_length), model.max_seq_length
    watch = _Watch(folder, progress)
    trainer = _Trainer(
        model=model,
        args=_arguments(sets, recipe, folder),
        train_dataset=DatasetDict({item.name: item.rows for item in sets}),
        loss=objective(model, recipe),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    with quiet():
        trainer.go_on(last_checkpoint(folder))
    # The trainer left its autocast around the model: what is saved and compared is the model without it.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.max_seq_length = own_length
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    merge_adapters(model)
    return Outcome(tuple(_loss_rows(trainer.state)), time.monotonic() - started, trained)


def _add_adapters(model: SentenceTransformer, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    model.add_adapter(
        LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            bias="none",
            target_modules=list(linear_names(model[0].auto_model)),
        )
    )


def _arguments(sets: Sequence[TrainingSet], recipe: Recipe, folder: Path) -> SentenceTransformerTrainingArguments:
    log_every = max(1, recipe.steps // LOGGED)
    # A logged loss is the mean since the one before: a checkpoint between two would lose the steps that led to it.
    save_every = log_every * math.ceil(recipe.steps / CHECKPOINTS / log_every)
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=round(WARMUP * recipe.steps),
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
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


class _Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Keeps in a checkpoint only the weights that are trained.

    The stock one saves a model folder whose adapters point at the base by path; that path may be gone on resuming.
    """

    def get_data_collator(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        collator = super().get_data_collator(model, *args, **kwargs)
        collator.preprocess_fn = rounded_lengths(model)
        return collator

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The card is the report's; the stock one would tokenize the data for its examples."""

    def go_on(self, checkpoint: str | None) -> None:
        """Train what is left. The stock trainer takes a step more from the checkpoint of the last one."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
        if state is None or state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=checkpoint)
        else:
            self._load_from_checkpoint(str(checkpoint))
            self.state = state

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trained().items()}, folder / TRAINED_WEIGHTS)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        saved = load_file(Path(checkpoint_path) / TRAINED_WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(saved[name])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What is trained: of the model by its own names, and of the loss what it has besides."""
        of_model = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        known = {id(parameter) for parameter in self.model.parameters()}
        own = {f"loss.{name}": p for name, p in self.loss.named_parameters() if id(p) not in known and p.requires_grad}
        return of_model | own


def rounded_lengths(model: SentenceTransformer) -> Callable[..., dict[str, Any]]:
    """``model.preprocess`` with batches padded to a multiple of :data:`LENGTH_STEP` tokens.

    On a CPU every new shape costs time and memory for a kernel of its own, and no kernel is ever given back.
    """
    tokenizer = model.tokenizer
    left = tokenizer.padding_side == "left"
    fill = {"input_ids": tokenizer.pad_token_id or 0}

    def preprocess(texts: list[str], **options: Any) -> dict[str, Any]:
        features: dict[str, Any] = dict(model.preprocess(texts, **options))
        length = features["input_ids"].shape[1]
        missing = -length % LENGTH_STEP
        for key, value in features.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == (len(texts), length):
                sides = (missing, 0) if left else (0, missing)
                features[key] = torch.nn.functional.pad(value, sides, value=fill.get(key, 0))
        return features

    return preprocess


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Tells the progress, and stops a training whose loss is not a number any more."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress("heal", state.global_step, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingDiverged(state.global_step, loss, last_checkpoint(self.folder))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; those that were cut off while being written are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if _is_whole(path)]
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    return str(whole[-1]) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer's state, the last file of a checkpoint that the trainer writes, is there to its end."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _loss_rows(state: TrainerState) -> list[LossRow]:
    logged = [entry for entry in state.log_history if "loss" in entry]
    return [LossRow(entry["step"], entry["loss"], entry["learning_rate"]) for entry in logged]


def merge_adapters(model: SentenceTransformer) -> None:
    """Fold each adapter into the layer it stands on, and put that layer back in its place."""
    transformer = model[0].auto_model
    adapted = [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        owner, _, attribute = name.rpartition(".")
        setattr(transformer.get_submodule(owner), attribute, layer.get_base_layer())
    # transformers would otherwise go on to save an adapter in place of the model.
    transformer._hf_peft_config_loaded = False
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
    for parameter in transformer.parameters():
        parameter.requires_grad_(True)
    model.eval()
