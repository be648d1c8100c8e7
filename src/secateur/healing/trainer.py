"""sentence-transformers' trainer with checkpoints that hold only what is trained, and an eye on the losses."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from secateur.errors import DataError, OutputError, TrainingDiverged
from secateur.healing.on_cpu import attention_in_float32
from secateur.healing.trainable import as_written
from secateur.models.forward import padded_length
from secateur.progress import Progress

TRAINED_WEIGHTS = "trained.safetensors"

SECONDS = "seconds"

FIRST_LOSSES = 10
NOTHING = 1e-3
EXPLODED = 10.0
"""A loss this many times the largest of the :data:`FIRST_LOSSES` logged first has exploded."""

SCORE = "eval_score"


@dataclass(frozen=True)
class Validation:
    """Scores of a model while it trains, of which the best is kept.

    ``score`` gives a number that is higher for a better model, asked every ``every`` steps (None: as often as a
    checkpoint is written) and after the last. After ``patience`` scores in a row that are no better than the best
    before them, training stops.
    """

    score: Callable[[SentenceTransformer], float]
    every: int | None = None
    patience: int | None = None


class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Keeps in a checkpoint only the weights that are trained, and beside them the seconds that led to them.

    The stock one saves a model folder whose adapters point at the base by path; that path may be gone on resuming.
    """

    _started = 0.0
    _seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Of training: since :meth:`go_on`, and up to the checkpoint that it went on from."""
        return self._seconds_before + time.monotonic() - self._started

    def get_data_collator(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        collator = super().get_data_collator(model, *args, **kwargs)
        collator.preprocess_fn = rounded_lengths(model)
        return collator

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The card is the report's; the stock one would tokenize the data for its examples."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with attention_in_float32() if self.args.bf16 and self.args.device.type == "cpu" else nullcontext():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            return loss

    def go_on(self, checkpoint: str | None, patience: int | None) -> None:
        """Train what is left. The stock trainer takes a step more from the checkpoint of the last one."""
        self._started = time.monotonic()
        state = _checked_state(Path(checkpoint)) if checkpoint else None
        self._seconds_before = _seconds_of(Path(checkpoint)) if checkpoint else 0.0
        if state is None or (state.global_step < self.args.max_steps and not out_of_patience(state, patience)):
            self.train(resume_from_checkpoint=checkpoint)
        else:
            self.state = state
            self._load_from_checkpoint(str(checkpoint))
            self._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().contiguous() for name, p in self._trained().items()}
        save_file(weights, folder / TRAINED_WEIGHTS, metadata={SECONDS: repr(self.seconds)})

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        saved = load_file(Path(checkpoint_path) / TRAINED_WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(saved[name])

    def _load_best_model(self) -> None:
        """The weights of the best score; the stock one only logs that it could not."""
        best = self.state.best_global_step
        if best and best != self.state.global_step:
            self._load_from_checkpoint(str(Path(self.args.output_dir) / f"checkpoint-{best}"))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What is trained: of the model by its own names, and of the loss what it has besides."""
        of_model = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        known = {id(parameter) for parameter in self.model.parameters()}
        own = {f"loss.{name}": p for name, p in self.loss.named_parameters() if id(p) not in known and p.requires_grad}
        return of_model | own


class Judge(BaseEvaluator):  # type: ignore[misc]
    """A :class:`Validation`'s score as the trainer asks for it: of the model as it would be written, at its own length.

    Args:
        score: Of a model.
        own_length: The model's, which may be longer than that of the training.
        before: The number formats of the model that came (:func:`.prepare`).
    """

    def __init__(
        self, score: Callable[[SentenceTransformer], float], own_length: int, before: Mapping[str, torch.dtype]
    ) -> None:
        super().__init__()
        self.score = score
        self.own_length = own_length
        self.before = before

    def __call__(self, model: SentenceTransformer, *_: Any, **__: Any) -> dict[str, float]:
        """The score, under the name that the trainer looks for."""
        trained_length, model.max_seq_length = model.max_seq_length, self.own_length
        # What the score draws must not change what the training draws.
        with torch.random.fork_rng(), as_written(model, self.before):
            score = float(self.score(model))
        model.max_seq_length = trained_length
        return {"score": score}


class Watch(TrainerCallback):  # type: ignore[misc]
    """Tells the progress in pairs, and stops a training that has diverged, or gets no better."""

    def __init__(self, folder: Path, what: str, batch_size: int, patience: int | None, progress: Progress) -> None:
        self.folder = folder
        self.what = what
        self.batch_size = batch_size
        self.patience = patience
        self.progress = progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tell(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.progress(self.what, state.global_step * self.batch_size, state.max_steps * self.batch_size)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        first = [entry["loss"] for entry in state.log_history if "loss" in entry][:FIRST_LOSSES]
        finite = math.isfinite(loss) and math.isfinite(logs.get("grad_norm", 0.0))
        if len(first) == FIRST_LOSSES:
            check_learning(state)
        # A student that is its teacher has a loss of 0, or by rounding a little below.
        if not finite or loss > EXPLODED * max(*first, NOTHING):
            raise TrainingDiverged(state.global_step, loss, last_checkpoint(self.folder))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if out_of_patience(state, self.patience):
            control.should_training_stop = True


def check_learning(state: TrainerState) -> None:
    """Refuse a training in which nothing is learned.

    Raises:
        DataError: Every loss was 0.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if losses and not any(losses):
        problem = f"the loss is 0 from the first step to step {state.global_step}: nothing is learned"
        hint = "texts that the tokenizer does not know become the same tokens, and are no negatives of each other"
        raise DataError("data", problem, hint)


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Whether the last ``patience`` scores are no better than the best before them."""
    scores = [entry[SCORE] for entry in state.log_history if SCORE in entry]
    return patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience if scores else False


def rounded_lengths(model: SentenceTransformer) -> Callable[..., dict[str, Any]]:
    """``model.preprocess`` with batches padded as :func:`.padded_length` says.

    On a CPU every new shape costs time and memory for a kernel of its own, and no kernel is ever given back.
    """
    tokenizer = model.tokenizer
    left = tokenizer.padding_side == "left"
    fill = {"input_ids": tokenizer.pad_token_id or 0}

    def preprocess(texts: list[str], **options: Any) -> dict[str, Any]:
        features: dict[str, Any] = dict(model.preprocess(texts, **options))
        length = features["input_ids"].shape[1]
        missing = padded_length(length) - length
        for key, value in features.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == (len(texts), length):
                sides = (missing, 0) if left else (0, missing)
                features[key] = torch.nn.functional.pad(value, sides, value=fill.get(key, 0))
        return features

    return preprocess


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; those that were cut off while being written are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if _is_whole(path)]
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    return str(whole[-1]) if whole else None


def _seconds_of(checkpoint: Path) -> float:
    """Those that a checkpoint took; earlier versions did not note them."""
    with safe_open(checkpoint / TRAINED_WEIGHTS, framework="pt") as file:
        return float((file.metadata() or {}).get(SECONDS, 0.0))


def _checked_state(checkpoint: Path) -> TrainerState:
    """The trainer's state in a checkpoint, all of whose files can be read.

    Raises:
        OutputError: One is missing or damaged. Without the optimizer's, the stock trainer would go on with a new one.
    """
    for name in (TRAINED_WEIGHTS, TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state*.pth"):
        found = sorted(checkpoint.glob(name))
        if not found or not all(map(_is_readable, found)):
            problem = f"its {found[0].name if found else name} is {'damaged' if found else 'missing'}"
            hint = "remove this folder; the same command then goes on from the checkpoint before it, or anew"
            raise OutputError(checkpoint, problem, hint)
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _is_readable(file: Path) -> bool:
    """Whether a file of a checkpoint is what it was written as, as far as its own checks tell."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return True
        if file.suffix == ".json":
            state = TrainerState.load_from_json(str(file))
            return file.parent.name == f"checkpoint-{state.global_step}"
        with ZipFile(file) as archive:  # as torch saves
            return archive.testzip() is None
    except OSError:
        raise
    except Exception:  # whatever a reader makes of bytes that are not its own
        return False


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer's state, the last file of a checkpoint that the trainer writes, is there to its end."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True
