"""Options of the way through: profile, choose, prune, heal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from secateur.errors import ConfigError
from secateur.options.base import (
    DATA,
    ENDPOINT,
    POOLING,
    PROFILE_FILES,
    SCOUT_FILES,
    AnyName,
    Data,
    Device,
    Dtype,
    HeldOut,
    MaxLength,
    Model,
    Names,
    Options,
    Pooling,
    PoolingName,
    Sample,
    SampleSeed,
    Seed,
    Tasks,
    TrustRemoteCode,
    argument,
    comma_separated,
    listed,
    output,
    path_text,
    positional,
)

TEXTS = " Or of texts alone: .txt, or .jsonl with text."


def _columns(given: Any) -> Any:
    """``query=question,positive=answer`` becomes a mapping."""
    if not given or not isinstance(given, (str, list)):
        return given or None
    words = [word for item in ([given] if isinstance(given, str) else given) for word in str(item).split(",")]
    pairs = [word.partition("=") for word in words]
    for word, (role, _, column) in zip(words, pairs, strict=True):
        if not role.strip() or not column.strip():
            raise ValueError(f"{word!r} is not of the form query=question")
    return {role.strip(): column.strip() for role, _, column in pairs}


Columns = Annotated[
    dict[str, str] | None,
    BeforeValidator(_columns),
    Field(
        description="Your column names, where they differ: query=question,positive=answer,negative=wrong, or text=body."
    ),
]


Numbers = Annotated[list[int] | None, BeforeValidator(comma_separated)]


Sources = Annotated[list[AnyName], BeforeValidator(listed), Names("data")]
"""As Data; Python takes what was read already, too."""


class ProfileOptions(Options):
    """Measure what every depth of a model is worth, in one pass.

    Example: secateur profile smollm2 --data pairs.jsonl --tasks tasks/my-search -o profile
    """

    model: Model
    data: Sources = positional(DATA + TEXTS, min_length=1)
    columns: Columns = None
    out: Annotated[Path | None, Names("results", PROFILE_FILES)] = output("Folder of the results.", needed=False)
    scale: float = Field(20.0, gt=0, description="Inverse temperature of the contrastive loss.")
    instruction: str | None = Field(None, description="Instruction before each query, in place of the data's own.")
    pooling: PoolingName | None = Field(
        None, description=POOLING + " l3prune: as the paper's own code, to reproduce its curve."
    )
    batch_size: int = Field(64, ge=2, description="Pairs per batch; the loss depends on it.")
    max_examples: int = Field(1280, ge=2, description="Maximum number of pairs or texts, evenly from all files.")
    early_stopping: bool = Field(False, description="Stop once L3Prune's choice is significant at 95 %.")
    max_length: MaxLength = 512
    dtype: Dtype = Field("auto", description="Data type of the computation; auto: bfloat16 where the CPU has it.")
    device: Device = None
    seed: SampleSeed = 42
    tasks: Tasks = Field([], description="Score every depth on these, too: folders, or mteb's tasks and benchmarks.")
    sample: Sample = None
    trust_remote_code: TrustRemoteCode = False


class VocabularyOptions(Options):
    """Which tokens stay."""

    vocab: Data = Field([], description="Cut the vocabulary to the tokens that these texts need: files as for --data.")
    vocab_size: int | None = Field(None, ge=1, description="Number of tokens to keep, special ones included.")
    vocab_coverage: float | None = Field(
        None, gt=0, le=1, description="Share of the tokens of held-out texts that the kept tokens make up [0.995]."
    )
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
        # A study counts on its own data.
        if given and not self.vocab and "data" not in type(self).model_fields:
            raise ConfigError(given[0], getattr(self, given[0]), "needs texts to count tokens on", "give --vocab FILE")
        return self


class Budget(Options):
    """What a depth may cost, and what it may lose."""

    tolerance: float | None = Field(
        None,
        ge=0,
        description="Choose the smallest depth whose average score is at most this many points below that of the full "
        "depth with the same training, at 95 % confidence [1.0 for a scout].",
    )
    best: bool = Field(False, description="Choose the depth with the highest average score, of those that fit.")
    max_params: float | None = Field(None, gt=0, description="Maximum number of parameters, with token embeddings.")
    max_bytes: float | None = Field(None, gt=0, description="Maximum size of the weights in bytes, as stored.")
    max_latency_ms: float | None = Field(None, gt=0, description="Maximum milliseconds for one text of some 20 tokens.")

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
    max_loss_increase: float | None = Field(
        None, ge=0, description="Maximum increase of a profile's loss over the lowest of all depths; 0.05 is 5 %."
    )
    model: Annotated[str | None, BeforeValidator(path_text), Names("model")] = Field(
        None, description="The model whose vocabulary is cut, if the profile or the scout does not say where it is."
    )


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
    keep: Any = Field(None, description="Layers to keep, counted from 0, such as 0-5,8,11; use it in place of --to.")
    drop: Any = Field(None, description="Layers to remove, counted from 0, such as 20-27; use it in place of --to.")
    out: Annotated[Path, Names("new folder")] = output("Folder to write the cut model to.")
    profile: Annotated[Any, Names("profile")] = Field(
        None, description="Profile or scout of the model (a file, or its folder), for selectors that choose from one."
    )
    pooling: Pooling = None
    max_length: MaxLength = 512
    vocab_multiple: int = Field(1, ge=1, description="Rows of zeros fill the token table to a multiple of this: 64.")
    vocab_tasks: Tasks = Field([], description="Task folders: report the share of their tokens that is covered.")
    dtype: Dtype = Field("auto", description="Data type of the written weights; auto keeps the model's own.")
    adapter: Annotated[Any, BeforeValidator(path_text)] = Field(
        None, description="LoRA adapter (a folder or a Hub id) to merge into the weights."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the Hub.")
    trust_remote_code: TrustRemoteCode = False


class HealSettings(Options):
    """The hyperparameters of a training; those that are not given are the recipe's."""

    recipe: Literal["finetune", "l3prune", "distill"] | None = Field(
        None,
        description="Defaults of the other options: finetune trains the layers' own weights; l3prune LoRA adapters, as "
        "in the paper; distill is for a teacher and texts alone [finetune; distill for the latter].",
    )
    steps: int | None = Field(None, ge=1, description="Optimizer steps [1000].")
    batch_size: int | None = Field(None, ge=2, description="Rows per step, over all processes [64].")
    train: Literal["lora", "blocks", "all", "auto"] | None = Field(
        None,
        description="Weights to train: lora: adapters; blocks: the layers, without the token embeddings; all; auto: "
        "blocks if the optimizer fits into half of the memory, else lora [auto; lora with l3prune].",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate [2e-4 for lora, 5e-4 for blocks and all; 1e-3 with distill]."
    )
    warmup: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the steps with a rising learning rate; then it falls [0.1; l3prune 0.3].",
    )
    scale: float | None = Field(None, gt=0, description="Inverse temperature of the loss [20; 50 with l3prune].")
    max_length: int | None = Field(None, ge=1, description="Tokens after which a text is cut [128; 512 with l3prune].")
    lora_rank: int | None = Field(None, ge=1, description="Rank of the LoRA adapters [16].")
    lora_alpha: int | None = Field(None, ge=1, description="LoRA alpha; the adapters are scaled by alpha / rank [32].")
    lora_dropout: float | None = Field(None, ge=0, lt=1, description="Dropout before the LoRA adapters [0.05].")
    mini_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens computed at once, by gradient caching: saves memory, for one more forward pass."
    )
    gradient_checkpointing: bool = Field(False, description="Save memory by computing activations again.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the computation; auto: bfloat16 if the processor supports it."
    )
    seed: Seed = Field(42, description="Random seed of adapters, dropout and the order of the data.")
    layers: Literal["first", "uniform"] | None = Field(
        None,
        description="Layers that a smaller depth keeps, where several are trained: the first ones, or uniform: evenly "
        "spaced, the first and the last among them [first; uniform where a model teaches itself, on texts alone].",
    )


class HealOptions(HealSettings):
    """Train a cut model until it encodes well again: on pairs, or on texts by distillation from a teacher.

    Example: secateur heal smollm2-large --data pairs.jsonl --steps 1000 -o smollm2-large-healed
    """

    model: Model
    data: Data = positional(DATA + TEXTS, min_length=1)
    columns: Columns = None
    out: Annotated[Path, Names("new folder")] = output("The model folder to write.")
    instruction: str | None = Field(
        None,
        description="Prompt before each query or unlabelled text, in place of the data's own; an empty one removes the "
        "model's default prompt, too.",
    )
    teacher: Annotated[str | None, BeforeValidator(path_text), Names("model")] = Field(
        None, description="Teacher whose vectors the model learns: a model, or " + ENDPOINT
    )
    teacher_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the distillation loss; the contrastive loss has the rest [0.5; 1 for texts only].",
    )
    distill: Literal["vectors", "similarities", "both"] | None = Field(
        None,
        description="What to learn: the teacher's vectors, so that the model can search its index; the similarities "
        "between texts; or both [vectors].",
    )
    depths: Numbers = Field(
        None, description="Train these depths too, so that the model can be cut there later without training: 6,12,24."
    )
    dims: Numbers = Field(None, description="Train vectors truncated to these dimensions too (Matryoshka): 64,128.")
    cache: Path | None = Field(None, description="Folder that keeps the teacher's vectors for other trainings.")
    exclude: Tasks = Field(
        [], description="Task folders that will judge the model: rows with one of their texts are not trained on."
    )
    bidirectional: bool = Field(
        False, description="Turn a decoder's causal attention into bidirectional attention, in the written model too."
    )
    eval_data: Annotated[list[Path] | None, BeforeValidator(listed), Names("data")] = Field(
        None, description="Held-out files like --data, on which nDCG@10 is evaluated during training."
    )
    eval_tasks: Annotated[list[AnyName] | None, BeforeValidator(listed), Names("task")] = Field(
        None, description="Tasks to evaluate during training, as for evaluate; the best model of all is written."
    )
    eval_sample: Sample = None
    eval_every: int | None = Field(None, ge=1, description="Steps between two evaluations [a tenth of all].")
    patience: int | None = Field(None, ge=1, description="Stop after this many evaluations without a better score.")
    report_to: str = Field("none", description="Experiment tracker of transformers: tensorboard, wandb, mlflow, ...")
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


class ScoutOptions(HealOptions):
    """Train several depths of a model at once, briefly, and score each on your tasks: what is every depth worth?

    Example: secateur scout smollm2 --data pairs.jsonl --tasks tasks/my-search --steps 200 -o scout
    """

    out: Annotated[Path, Names("results", SCOUT_FILES)] = output("Folder of the results; run again to score more.")
    depths: Numbers = Field(
        None, description="Depths to train: 6,12,24 [default: about eight, from a fifth of the layers to all of them]."
    )
    score: Numbers = Field(None, description="More depths to score, between those that are trained.")
    tasks: Tasks = Field(
        [], description="Tasks to score the depths on, as for evaluate [default: to find positives of held-out pairs]."
    )
    sample: Sample = None
    held_out: HeldOut = 1000
    teacher: Annotated[str | None, BeforeValidator(path_text), Names("model")] = Field(
        None, description="Teacher whose vectors the model learns, as for heal; or self, the whole model as it came."
    )

    @model_validator(mode="before")
    @classmethod
    def _self_as_teacher(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "teacher": values.get("model")} if values.get("teacher") == "self" else values
