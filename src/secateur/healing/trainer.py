"""sentence-transformers' trainer: with checkpoints that hold only what is trained, and a watch on the losses."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import load_fsdp_model
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import DatasetDict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import get_rank
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from secateur.errors import ConfigError, DataError, OutputError, SecateurError, TrainingDiverged
from secateur.healing.losses import LENGTH_STEP, Loss
from secateur.healing.processes import device_of, gather, is_sharded, shard_by_blocks, sharded_copy
from secateur.healing.recipes import (
    SCORE,
    TrainingConfig,
    attention_in_float32,
    decide,
    finish,
    prepare,
    training_arguments,
)
from secateur.healing.training_data import TrainingSet
from secateur.models.compat import encode_alone
from secateur.progress import Progress, quiet, silent
from secateur.results import EvaluationRow, LossRow
from secateur.runtime.core import is_out_of_memory, padded_length

FIRST_LOSSES = 10
EXPLODED = 10.0
"""A loss this many times the largest of the :data:`FIRST_LOSSES` logged first has exploded."""
NEAR_ZERO = 1e-3
"""Losses below count as this: a student that is its teacher has a loss of 0, or by rounding a little below."""

TRAINED_WEIGHTS = "trained.safetensors"
SECONDS, PROCESSES = "seconds", "processes"

Score = Callable[[SentenceTransformer], float]
"""Higher for a better model."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training did, as :class:`.Training` has it; ``best_step`` is None without scores."""

    steps: int
    seconds: float
    trained_parameters: int
    losses: tuple[LossRow, ...]
    evaluations: tuple[EvaluationRow, ...]
    best_step: int | None


def train(
    model: SentenceTransformer,
    sets: Sequence[TrainingSet],
    config: TrainingConfig,
    folder: Path,
    make_loss: Callable[[SentenceTransformer, TrainingConfig], nn.Module] = Loss,
    score: Score | None = None,
    *,
    report_to: str = "none",
    progress: Progress = silent,
) -> TrainingResult:
    """Train a model in place, from the start or from the last checkpoint in ``folder``.

    Each batch comes from one of ``sets``, drawn in proportion to their rows. ``make_loss`` makes the loss, which embeds
    by its attribute ``model``. ``score`` is called every ``eval_every`` steps (by default, as often as a checkpoint is
    written) and after the last; the model is left at the best. ``progress`` is called with the rows seen.

    Raises:
        TrainingDiverged, DataError: The loss exploded, or was 0 in every step; or the data had too few batches.
        ConfigError: A batch does not fit into memory; or with FSDP, the loss has weights of its own.
    """
    config = decide(model, config)
    dtypes = prepare(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    length = model.max_seq_length
    model.max_seq_length = min(config.max_length, length or config.max_length)
    prompts = {item.name: item.prompts for item in sets}
    # Before the loss, which may ask how many processes there are: the arguments join them.
    given: Any = {"device": device_of(model), "evaluated": score is not None, "report_to": report_to}
    arguments = training_arguments(config, folder, prompts, **given)
    own = sharded_copy(model) if is_sharded() else model
    trainer = Trainer(
        model=own,
        args=arguments,
        train_dataset=DatasetDict({item.name: item.rows for item in sets}),
        loss=make_loss(own, config),
        evaluator=Evaluator(score, length, dtypes) if score else None,
        callbacks=[ProgressCallback(folder, config, progress)],
    )
    if trainer.is_fsdp_enabled:
        shard_by_blocks(own, trainer.accelerator, config, trainer.of_loss())
    trainer.remove_callback(PrinterCallback)
    torch.manual_seed(config.seed + get_rank())  # else all processes would draw the same dropout
    with quiet(), memory_errors(config):
        trainer.train_or_resume(last_checkpoint(folder), config.patience)
    if trainer.is_fsdp_enabled:
        gather(own, model)
    else:  # the trainer left its autocast around the model: what is saved and compared is the model without it
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.max_seq_length = length
    finish(model, dtypes)
    log = trainer.state.log_history
    losses = tuple(LossRow(row["step"], row["loss"], row["learning_rate"]) for row in log if "loss" in row)
    evaluations = tuple(EvaluationRow(row["step"], row[SCORE]) for row in log if SCORE in row)
    best = trainer.state.best_global_step if evaluations else None
    return TrainingResult(trainer.state.global_step, trainer.seconds, trained, losses, evaluations, best)


@contextmanager
def memory_errors(config: TrainingConfig) -> Iterator[None]:
    """Within: what does not fit into memory is told, with the options that need less of it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SecateurError) or not is_out_of_memory(error):  # a scorer tells its own
            raise
        tokens = 4096 if config.mini_batch_tokens is None else max(1, config.mini_batch_tokens // 2)
        ways = [] if is_sharded() else [f"--mini-batch-tokens {tokens}"]
        ways += [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
        hint = f"go on with {' or '.join(ways)}" if ways else "give a smaller --max-length or --batch-size"
        problem = f"a batch of {config.batch_size} rows of up to {config.max_length} tokens does not fit into memory"
        raise ConfigError("batch_size", config.batch_size, problem, hint) from error


class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Keeps in a checkpoint only the weights that are trained, and beside them the seconds that led to them.

    The stock one saves a model folder whose adapters point at the base by path; that path may be gone on resuming.
    """

    _started = _seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Of training: since it was started, and up to the checkpoint that it was resumed from."""
        return self._seconds_before + time.monotonic() - self._started

    def train_or_resume(self, checkpoint: Path | None, patience: int | None) -> None:
        """Train what is left, and refuse a training that ended too early, or learned nothing.

        From the checkpoint of the last step, the stock trainer would take one step more.
        """
        self._started = time.monotonic()
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
        self._seconds_before = max((row.get(SECONDS, 0.0) for row in state.log_history), default=0.0) if state else 0.0
        if state is not None and is_over(state, patience):
            self.state = state
            self._load_from_checkpoint(str(checkpoint))
            self._load_best_model()
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not is_over(self.state, patience):
            after = f"{self.state.global_step} of {self.state.max_steps} steps"
            problem = f"gave no batch of {self.args.train_batch_size} after {after}"
            raise DataError("data", problem, "more rows, whose texts differ, or a smaller batch")
        check_learning(self.state)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, SECONDS: self.seconds, PROCESSES: self.args.world_size}, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        autocast = self.args.bf16 and not self.is_fsdp_enabled
        with attention_in_float32() if autocast and self.args.device.type == "cpu" else nullcontext():
            return super().training_step(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Pass the epoch on to a sampler that is split among processes, too, as accelerate does not: else an epoch that
        they resume has the batches of the first one.
        """
        loader: DataLoader[Any] = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):
            vars(shard)["set_epoch"] = shard.batch_sampler.set_epoch
        return loader

    def get_data_collator(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        collator = super().get_data_collator(model, *args, **kwargs)
        collator.preprocess_fn = rounded_lengths(model)
        return collator

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The card is the report's; the stock one would tokenize the data for its examples."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in self._trained().items()}, folder / TRAINED_WEIGHTS)

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            load_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, checkpoint_path)
            return
        saved = load_file(Path(checkpoint_path) / TRAINED_WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(saved[name])

    def _load_best_model(self) -> None:
        """The weights of the best score; the stock one only logs that it could not."""
        best = self.state.best_global_step
        if best and best != self.state.global_step:
            self._load_from_checkpoint(str(Path(self.args.output_dir) / f"checkpoint-{best}"))

    def _trained(self) -> dict[str, nn.Parameter]:
        """What is trained: of the model by its own names, and of the loss what it has besides."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad} | self.of_loss()

    def of_loss(self) -> dict[str, nn.Parameter]:
        """The weights that the loss has itself; FSDP has no place for them."""
        known = {id(parameter) for parameter in self.model.parameters()}
        return {f"loss.{name}": p for name, p in self.loss.named_parameters() if id(p) not in known and p.requires_grad}


class Evaluator(BaseEvaluator):  # type: ignore[misc]
    """A score as the trainer asks for it: of a copy of the model, as it would be written.

    That is at its own ``length``, which may be longer than that of the training, and with the ``dtypes`` that its
    weights had before it (:func:`.prepare`).
    """

    def __init__(self, score: Score, length: int | None, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__()
        self.score, self.length, self.dtypes = score, length, dtypes

    def __call__(self, model: SentenceTransformer, *_: Any, **__: Any) -> dict[str, float]:
        """The score, under the name that the trainer looks for."""
        card = model.model_card_data
        own = copy.deepcopy(model, {id(card): card})
        vars(own).pop("forward", None)  # the trainer's autocast, around the model's own
        encode_alone(own)
        own.max_seq_length = self.length
        finish(own, self.dtypes)
        with torch.random.fork_rng():  # what the score draws must not change what the training draws
            return {"score": float(self.score(own))}


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Reports the progress in rows, and stops a training that has diverged, or gets no better."""

    def __init__(self, folder: Path, config: TrainingConfig, progress: Progress) -> None:
        self.folder, self.config, self.progress = folder, config, progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            size = self.config.batch_size
            self.progress(f"heal ({self.config.train})", state.global_step * size, state.max_steps * size)

    on_train_begin = on_step_end

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        first = [entry["loss"] for entry in state.log_history if "loss" in entry][:FIRST_LOSSES]
        if len(first) == FIRST_LOSSES:
            check_learning(state)
        finite = math.isfinite(loss) and math.isfinite(logs.get("grad_norm", 0.0))
        if not finite or loss > EXPLODED * max(*first, NEAR_ZERO):
            raise TrainingDiverged(state.global_step, loss, last_checkpoint(self.folder))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= is_over(state, self.config.patience)


def check_learning(state: TrainerState) -> None:
    """Refuse (:class:`.DataError`) a training in which every loss was 0: nothing is learned."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if losses and not any(losses):
        problem = f"the loss is 0 from the first step to step {state.global_step}: nothing is learned"
        hint = "texts that the tokenizer does not know become the same tokens, and are no negatives of each other"
        raise DataError("data", problem, hint)


def is_over(state: TrainerState, patience: int | None) -> bool:
    """Whether all steps are done, or the last ``patience`` scores are no better than the best before them."""
    scores = [entry[SCORE] for entry in state.log_history if SCORE in entry]
    impatient = bool(scores) and patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience
    return impatient or state.global_step >= state.max_steps


def rounded_lengths(model: SentenceTransformer) -> Callable[..., dict[str, Any]]:
    """``model.preprocess`` with batches padded to few lengths (:data:`.LENGTH_STEP`).

    The tokenizers' own ``pad_to_multiple_of`` refuses a ``max_length`` that is no multiple.
    """
    left = model.tokenizer.padding_side == "left"
    fill = {"input_ids": model.tokenizer.pad_token_id or 0}

    def preprocess(texts: list[str], **options: Any) -> dict[str, Any]:
        features: dict[str, Any] = dict(model.preprocess(texts, **options))
        length = features["input_ids"].shape[1]
        missing = padded_length(length, LENGTH_STEP, model.max_seq_length) - length
        for key, value in features.items():
            if isinstance(value, Tensor) and value.shape[:2] == (len(texts), length):
                sides = (missing, 0) if left else (0, missing)
                features[key] = nn.functional.pad(value, sides, value=fill.get(key, 0))
        return features

    return preprocess


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; those that were cut off while being written, or are damaged, are removed.

    Raises:
        OutputError: One is of a training with sharded weights and this one has whole ones, or the other way round.
    """
    other, how = (TRAINED_WEIGHTS, "whole") if is_sharded() else (f"{FSDP_MODEL_NAME}_0", "sharded")
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        if (checkpoint / other).exists():
            raise OutputError(checkpoint, f"has {how} weights", "resume it as it was begun, or name another --out")
        if _is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether what a training goes on with can be read; without the optimizer's, the stock trainer would use a new one.

    Of sharded parts, which torch alone reads, each one's last file is looked for.
    """
    names = [SCHEDULER_NAME] if is_sharded() else [SCHEDULER_NAME, OPTIMIZER_NAME]
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if is_sharded():
            for part in (FSDP_MODEL_NAME, "optimizer"):
                (checkpoint / f"{part}_0" / ".metadata").stat()
        else:
            with safe_open(checkpoint / TRAINED_WEIGHTS, framework="pt"):
                pass
        states = {file.name for file in checkpoint.glob("rng_state*.pth")}  # one of each process, numbered from two on
        count = state.log_history[-1].get(PROCESSES, len(states))
        for file in (checkpoint / name for name in (*names, *states)):
            with ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return False
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise
        return False
    except Exception:  # whatever a reader makes of bytes that are not its own
        return False
    numbered = {f"rng_state_{number}.pth" for number in range(count)} if count > 1 else {"rng_state.pth"}
    return checkpoint.name == f"checkpoint-{state.global_step}" and states == numbered


def check_tracker(name: str) -> None:
    """Refuse (:class:`.ConfigError`) a tracker that transformers does not know, or that is not installed."""
    if name not in ("none", "all", *(found := get_available_reporting_integrations())):
        problem = f"{name} is none of transformers' trackers that are installed here"
        raise ConfigError("report_to", name, problem, ", ".join(["none", "all", *found]))
