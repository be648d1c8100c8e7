"""Options of the way through: profile, choose, prune, heal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationInfo, field_validator, model_validator

from secateur.errors import ConfigError
from secateur.options.base import (
    DATA,
    ENDPOINT,
    MODEL,
    POOLING,
    AnyName,
    Data,
    Device,
    Dtype,
    HeldOut,
    MaxLength,
    Model,
    Names,
    NewFolder,
    Options,
    Pooling,
    PoolingName,
    Sample,
    SampleSeed,
    Seed,
    Tasks,
    TaskSample,
    Teacher,
    TrustRemoteCode,
    argument,
    comma_separated,
    listed,
    option,
    positional,
)

PROFILE_FILES = (
    *("profile.json", "choice.json"),
    *(f"{name}.{kind}" for name in ("curve", "cka", "angles", "solved") for kind in ("png", "svg")),
)
SCOUT_FILES = (
    *("scout.json", "model", "model.partial", "tasks", "tasks.partial", "draws", "cache", "done.json"),
    *("choice.json", "frontier.png", "frontier.svg"),
)


def _columns(given: Any) -> Any:
    """``query=question,positive=answer`` becomes a mapping."""
    if not given or not isinstance(given, (str, list)):
        return given or None
    pairs = {role.strip(): column.strip() for role, _, column in (w.partition("=") for w in comma_separated(given))}
    if not all((*pairs, *pairs.values())):
        raise ValueError("it is not of the form query=question")
    return pairs


COLUMNS = "Your column names, where they differ: query=question,positive=answer,negative=wrong, or text=body."
Columns = Annotated[dict[str, str] | None, BeforeValidator(_columns), option(COLUMNS)]
Numbers = Annotated[list[int] | None, BeforeValidator(comma_separated)]
Sources = Annotated[list[AnyName], BeforeValidator(listed), Names("data")]
"""As Data; Python takes what was read already, too."""


class ProfileOptions(Options):
    """Measure what every depth of a model is worth, in one pass.

    Example: secateur profile smollm2 --data pairs.jsonl --tasks tasks/my-search -o profile
    """

    model: Annotated[AnyName, Names("model")] = argument(MODEL)
    data: Sources = positional(DATA, min_length=1)
    columns: Columns = None
    out: Annotated[Path | None, Names("results", PROFILE_FILES)] = option("Folder of the results.")
    scale: float = option("Inverse temperature of the contrastive loss.", 20.0, gt=0)
    instruction: str | None = option("Instruction before each query, in place of the data's own.")
    pooling: PoolingName | None = option(POOLING + " l3prune: as the paper's own code, to reproduce its curve.")
    batch_size: int = option("Pairs per batch; the loss depends on it.", 64, ge=2)
    max_examples: int = option("Maximum number of pairs or texts, evenly from all files.", 1280, ge=2)
    early_stopping: bool = option("Stop once L3Prune's choice is significant at 95 %.", False)
    max_length: MaxLength = 512
    dtype: Dtype = option("Data type of the computation; auto: bfloat16 where the CPU has it.", "auto")
    device: Device = None
    seed: SampleSeed = 42
    tasks: Tasks = option("Score every depth on these, too: folders or files, or mteb's tasks and benchmarks.", [])
    sample: TaskSample = None
    trust_remote_code: TrustRemoteCode = False


class VocabularyOptions(Options):
    """Which tokens stay."""

    vocab: Data = option("Cut the vocabulary to the tokens that these texts need: files as for --data.", [])
    vocab_size: int | None = option("Number of tokens to keep, special ones included.", ge=1)
    vocab_coverage: float | None = option("Keep tokens that make up this share of held-out texts [0.995].", gt=0, le=1)
    columns: Columns = None

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether any token is to go."""
        return bool(self.vocab) or self.vocab_size is not None or self.vocab_coverage is not None

    @model_validator(mode="after")
    def _goes_together(self) -> Any:
        given = [name for name in ("vocab_size", "vocab_coverage") if getattr(self, name) is not None]
        if len(given) == 2:
            raise ConfigError("vocab_coverage", self.vocab_coverage, "cannot go with vocab_size", "give one of them")
        others = ("columns", "vocab_multiple", "vocab_tasks")
        given += [name for name in others if getattr(self, name, None) not in (None, 1, [])]
        # A study counts on its own data.
        if given and not self.vocab and "data" not in type(self).model_fields:
            raise ConfigError(given[0], getattr(self, given[0]), "needs texts to count tokens on", "give --vocab FILE")
        return self


class Budget(Options):
    """What a depth may cost, and what it may lose."""

    tolerance: float | None = option(
        "Choose the smallest depth that loses at most this many points of score, at 95 % confidence [1; by texts "
        "alone 5].",
        ge=0,
    )
    best: bool = option("Choose the depth with the highest average score, of those that fit.", False)
    max_params: float | None = option("Maximum number of parameters, with token embeddings.", gt=0)
    max_bytes: float | None = option("Maximum size of the weights in bytes, as stored.", gt=0)
    max_latency_ms: float | None = option("Maximum milliseconds for one text of some 20 tokens.", gt=0)

    @field_validator("best")
    @classmethod
    def _one_rule(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("tolerance") is not None:
            raise ConfigError("best", value, "cannot go with tolerance", "give one of them")
        return value


class ChooseOptions(Budget, VocabularyOptions):
    """Choose a depth, and a vocabulary, by the scores of a scout, or compare what each selector keeps of a profile.

    Example: secateur choose scout --tolerance 1.0 --max-params 50e6 --vocab texts.jsonl
    """

    profile: Annotated[AnyName, Names("profile")] = argument("A scout or a profile: its file or folder.")
    max_loss_increase: float | None = option("Of a profile: share by which the loss may exceed the lowest.", ge=0)
    model: Teacher = option("The model whose vocabulary is cut, if the profile or scout does not say where it is.")


class PruneOptions(VocabularyOptions):
    """Cut a model to some of its layers, its vocabulary to the tokens of your texts, and write a plain model folder.

    Example: secateur prune smollm2 --to large --profile profile --vocab texts.jsonl -o smollm2-large
    """

    model: Model
    to: Annotated[Any, Names("layers")] = positional(
        "Number of first layers to keep (7), share to remove (0.3), chosen (by a scout), or a selector (large, ...). "
        "Optional with --vocab: all are then kept.",
        default=None,
    )
    keep: Any = option("Layers to keep, counted from 0, such as 0-5,8,11; use it in place of --to.")
    drop: Any = option("Layers to remove, counted from 0, such as 20-27; use it in place of --to.")
    out: NewFolder = option("Folder to write the cut model to.", ...)
    profile: Annotated[AnyName | None, Names("profile")] = option(
        "Profile or scout that --to chooses from: file or folder."
    )
    pooling: Pooling = None
    max_length: MaxLength = 512
    vocab_multiple: int = option("Pad the token embeddings with rows of zeros to a multiple of this (64).", 1, ge=1)
    vocab_tasks: Tasks = option("Task folders: report the share of their tokens that stay.", [])
    dtype: Dtype = option("Data type of the written weights; auto keeps the model's own.", "auto")
    adapter: AnyName | None = option("LoRA adapter (folder or Hub id) to merge first.")
    revision: str | None = option("Branch, tag or commit of the model on the Hub.")
    trust_remote_code: TrustRemoteCode = False


class HealSettings(Options):
    """The hyperparameters of a training; those that are not given are the recipe's."""

    recipe: Literal["finetune", "l3prune", "distill"] | None = option(
        "Defaults of the other options: finetune; l3prune: LoRA, as in the paper; distill: for a teacher and texts."
    )
    steps: int | None = option("Optimizer steps [1000].", ge=1)
    batch_size: int | None = option("Rows per step, over all processes [64].", ge=2)
    train: Literal["lora", "blocks", "all", "auto"] | None = option(
        "Weights to train; lora: adapters; blocks: all but token embeddings; auto: blocks if memory allows [auto]."
    )
    learning_rate: float | None = option("Peak learning rate [lora 2e-4, blocks and all 5e-4; distill 1e-3].", gt=0)
    warmup: float | None = option("Share of the steps in which the learning rate rises [0.1; l3prune 0.3].", ge=0, lt=1)
    scale: float | None = option("Inverse temperature of the loss [20; 50 with l3prune].", gt=0)
    max_length: int | None = option("Tokens after which a text is cut [128; 512 with l3prune].", ge=1)
    lora_rank: int | None = option("Rank of the LoRA adapters [16].", ge=1)
    lora_alpha: int | None = option("LoRA alpha; the adapters are scaled by alpha / rank [32].", ge=1)
    lora_dropout: float | None = option("Dropout before the LoRA adapters [0.05].", ge=0, lt=1)
    mini_batch_tokens: int | None = option("Save memory by gradient caching: tokens computed at once.", ge=1)
    gradient_checkpointing: bool = option("Save memory by computing activations again.", False)
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "Precision of the computation; auto: bfloat16 if the processor supports it.", "auto"
    )
    seed: Seed = option("Random seed of adapters, dropout and the order of the data.", 42)
    layers: Literal["first", "uniform"] | None = option(
        "Layers that a smaller depth keeps: the first, or evenly spaced [first; uniform if a model teaches itself]."
    )


class HealOptions(HealSettings):
    """Train a cut model until it encodes well again: on pairs, or on texts by distillation from a teacher.

    Example: secateur heal smollm2-large --data pairs.jsonl --steps 1000 -o smollm2-large-healed
    """

    model: Model
    data: Data = positional(DATA, min_length=1)
    columns: Columns = None
    out: NewFolder = option("The model folder to write.", ...)
    instruction: str | None = option(
        "Prompt before each query or bare text, in place of the data's own; if empty, the model's default prompt goes."
    )
    teacher: Teacher = option("Model whose vectors are to be learned, or " + ENDPOINT)
    teacher_weight: float | None = option("Share of distillation in the loss [0.5; 1 for texts only].", ge=0, le=1)
    distill: Literal["vectors", "similarities", "both"] | None = option(
        "What to learn: the teacher's vectors, to search its index; similarities between texts; or both [vectors]."
    )
    depths: Numbers = option("Train these depths too: the model can later be cut to them without training: 6,12.")
    dims: Numbers = option("Train vectors truncated to these dimensions too (Matryoshka): 64,128.")
    cache: Path | None = option("Folder that keeps the teacher's vectors for other trainings.")
    exclude: Tasks = option("Task folders that will judge the model: rows with their texts are not trained on.", [])
    bidirectional: bool = option("Make a decoder's causal attention bidirectional, in the written model too.", False)
    eval_data: Annotated[list[Path] | None, BeforeValidator(listed), Names("data")] = option(
        "Held-out files like --data, to measure nDCG@10 on during training."
    )
    eval_tasks: Annotated[list[AnyName] | None, BeforeValidator(listed), Names("task")] = option(
        "Tasks to score during training, as for evaluate; the best model on the way is written."
    )
    eval_sample: Sample = None
    eval_every: int | None = option("Steps between two evaluations [a tenth of all].", ge=1)
    patience: int | None = option("Stop after this many evaluations without a better score.", ge=1)
    report_to: str = option("Experiment tracker of transformers: tensorboard, wandb, mlflow, ...", "none")
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


class ScoutOptions(HealOptions):
    """Train several depths of a model at once, briefly, and score each on your tasks: what is every depth worth?

    Example: secateur scout smollm2 --data pairs.jsonl --tasks tasks/my-search --steps 200 -o scout
    """

    out: Annotated[Path, Names("results", SCOUT_FILES)] = option("Folder of the results; run again to score more.", ...)
    depths: Numbers = option("Depths to train: 6,12,24 [default: about eight, from a fifth of the layers to all].")
    score: Numbers = option("More depths to score, between those that are trained.")
    tasks: Tasks = option("Tasks to score the depths on, as for evaluate [default: held-out rows of the data].", [])
    sample: Sample = None
    held_out: HeldOut = 1000
    teacher: Teacher = option("Model whose vectors are to be learned, as for heal; self: the model before training.")

    @model_validator(mode="before")
    @classmethod
    def _self_as_teacher(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "teacher": values.get("model")} if values.get("teacher") == "self" else values
