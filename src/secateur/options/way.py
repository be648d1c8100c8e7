"""Options of the way through: profile, choose, prune, heal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from secateur.options.base import (
    AnyName,
    Columns,
    Data,
    ModelName,
    Names,
    Options,
    Seed,
    Tasks,
    argument,
    listed,
    output,
    path_text,
    positional,
)
from secateur.options.shared import (
    CACHE,
    COLUMNS,
    DATA,
    DEVICE,
    INSTRUCTION,
    LENGTH,
    MODEL,
    POOLING,
    PROFILE_FILES,
    TEXTS,
    TRUST,
    Dtype,
    PoolingName,
    SavedPooling,
)


def _sources(value: Any) -> Any:
    """One file, or one data set that was read already, becomes a list of one."""
    return listed(value) if value is None or isinstance(value, (str, list, tuple, set)) else [value]


Sources = Annotated[list[AnyName], BeforeValidator(_sources), Names("data")]
"""As Data; Python takes what was read already, too."""


class ProfileOptions(Options):
    """Measure what every depth of a model is worth, in one pass.

    Example: secateur profile smollm2 --data pairs.jsonl --tasks tasks/my-search -o profile
    """

    model: ModelName = argument(MODEL)
    data: Sources = positional(DATA + TEXTS, min_length=1)
    columns: Columns = Field(None, description=COLUMNS)
    out: Annotated[Path | None, Names("results", PROFILE_FILES)] = output(
        "Folder for profile.json and its pictures.", needed=False
    )
    scale: float = Field(20.0, gt=0, description="Inverse temperature of the contrastive loss.")
    instruction: str | None = Field(None, description=INSTRUCTION)
    pooling: PoolingName | None = Field(
        None, description=POOLING + " l3prune: as the paper's own code, to reproduce its curve."
    )
    batch_size: int = Field(64, ge=2, description="Pairs per batch; the loss depends on it.")
    max_examples: int = Field(
        1280, ge=2, description="Maximum number of pairs or texts, sampled evenly from the files with the seed."
    )
    early_stopping: bool = Field(
        False,
        description="Stop early, once L3Prune's choice is significant at 95 % (tested after 5, 10, 20, ... batches).",
        json_schema_extra={"old": "--until-sure"},
    )
    max_length: int = Field(512, ge=1, description=LENGTH)
    dtype: Dtype = Field(
        "auto", description="Data type of the computation; auto: bfloat16 where the CPU has instructions for it."
    )
    device: str | None = Field(None, description=DEVICE)
    seed: Seed = Field(42, description="Seed of the sampling.")
    tasks: Tasks = Field(
        [], description="Score these at every depth too: task folders, or tasks and benchmarks of mteb."
    )
    sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each task.")
    trust_remote_code: bool = Field(False, description=TRUST)

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"early_stopping" if key == "until_sure" else key: value for key, value in values.items()}


class ChooseOptions(Options):
    """Compare what every selection method keeps and what it costs; or choose the depth that fits a budget.

    Example: secateur choose profile --max-params 100e6
    """

    profile: Annotated[AnyName, Names("profile")] = argument("A profile's file or folder.")
    max_params: float | None = Field(
        None, gt=0, description="Maximum number of parameters, the token embeddings included."
    )
    max_bytes: float | None = Field(None, gt=0, description="Maximum size of the weights in bytes, as stored.")
    max_latency_ms: float | None = Field(
        None, gt=0, description="Maximum milliseconds for one text of some 20 tokens, as measured by the profile."
    )
    max_loss_increase: float | None = Field(
        None, ge=0, description="Maximum increase of the loss over the lowest of all depths; 0.05 is 5 %."
    )


class PruneOptions(Options):
    """Cut a model to its first blocks, or any others, and write it as a plain model folder.

    Example: secateur prune smollm2 --to large --profile profile -o smollm2-large
    """

    model: ModelName = argument(MODEL)
    to: Annotated[Any, Names("layers")] = positional(
        "Number of first blocks to keep (7), share to remove (0.3), or a selector (large, small, knee, ...).",
        default=None,
    )
    keep: Any = Field(None, description="Blocks to keep, counted from 0, such as 0-5,8,11; use it in place of --to.")
    drop: Any = Field(None, description="Blocks to remove, counted from 0, such as 20-27; use it in place of --to.")
    out: Annotated[Path, Names("new folder")] = output("Folder to write the cut model to.")
    profile: Annotated[Any, Names("profile")] = Field(
        None, description="Profile of the model (a file, or its folder), for selectors that choose from one."
    )
    pooling: SavedPooling | None = Field(None, description=POOLING)
    max_length: int = Field(512, ge=1, description=LENGTH)
    dtype: Dtype = Field("auto", description="Data type of the written weights; auto keeps the model's own.")
    adapter: Annotated[Any, BeforeValidator(path_text)] = Field(
        None, description="LoRA adapter (a folder or a Hub id) to merge into the weights."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = Field(False, description=TRUST)


class HealSettings(Options):
    """The numbers of a training; those that are not given are the recipe's."""

    recipe: Literal["l3prune", "everyday", "distill"] | None = Field(
        None, description="Where the numbers not given come from [l3prune; distill for a teacher and texts alone]."
    )
    steps: int | None = Field(None, ge=1, description="Optimizer steps [1000].")
    batch_size: int | None = Field(None, ge=2, description="Pairs per step, of all processes together [64].")
    train: Literal["lora", "blocks", "all", "auto"] | None = Field(
        None, description="What is trained: adapters, the blocks' weights, everything; auto: by memory [lora]."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Peak of the schedule [by what is trained; 2e-4 for lora, 5e-4 for the rest]."
    )
    warmup: float | None = Field(
        None, ge=0, lt=1, description="Share of the steps in which the learning rate rises [0.3]."
    )
    scale: float | None = Field(None, gt=0, description="Inverse temperature of the contrastive loss [50].")
    max_length: int | None = Field(None, ge=1, description="Tokens per text while training [512].")
    lora_rank: int | None = Field(None, ge=1, description="Rank of the adapters [16].")
    lora_alpha: int | None = Field(None, ge=1, description="Scale of the adapters times their rank [32].")
    lora_dropout: float | None = Field(None, ge=0, lt=1, description="Dropout before the adapters [0.05].")
    mini_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in memory at once, for batches that do not fit; the numbers stay the same."
    )
    gradient_checkpointing: bool = Field(False, description="Save memory for time; the numbers stay the same.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the arithmetic; auto: bfloat16 where the processor has it."
    )
    seed: Seed = Field(42, description="Of adapters, dropout and the order of the data.")


class HealOptions(HealSettings):
    """Train a cut model on pairs, or let a teacher teach it on texts, until it encodes well again.

    Example: secateur heal smollm2-large --data pairs.jsonl --steps 1000 -o smollm2-large-healed
    """

    model: ModelName = argument(MODEL)
    data: Data = positional(DATA + TEXTS, min_length=1)
    columns: Columns = Field(None, description=COLUMNS)
    out: Annotated[Path, Names("new folder")] = output("The model folder to write.")
    instruction: str | None = Field(None, description=INSTRUCTION)
    teacher: Annotated[str | None, BeforeValidator(path_text), Names("model")] = Field(
        None, description="Whose vectors are imitated: a model, or a server's http://host/v1."
    )
    teacher_model: str | None = Field(None, description="What a server calls its model [the only one it has].")
    teacher_weight: float | None = Field(
        None, ge=0, le=1, description="Of the teacher beside the pairs [0.5; texts alone leave it all]."
    )
    distill: Literal["vectors", "similarities", "both"] | None = Field(
        None, description="What of the teacher is imitated: vectors stay in its space [vectors]."
    )
    depths: list[int] | None = Field(None, description="Train these depths too, to be cut later: 6,12,24.")
    dims: list[int] | None = Field(None, description="Train vectors cut to these sizes too: 64,128.")
    cache: Path | None = Field(None, description=CACHE)
    bidirectional: bool = Field(False, description="Let a decoder's tokens see those after them, from here on.")
    eval_data: Annotated[list[Path] | None, BeforeValidator(listed), Names("data")] = Field(
        None, description="Held-out files like --data, measured on the way."
    )
    eval_tasks: Annotated[list[AnyName] | None, BeforeValidator(listed), Names("task")] = Field(
        None, description="Tasks measured on the way; the best model is kept."
    )
    eval_sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each of them.")
    eval_every: int | None = Field(None, ge=1, description="Steps between measurements [a tenth of all].")
    patience: int | None = Field(None, ge=1, description="Stop after so many measurements without a better one.")
    report_to: str = Field("none", description="A tracker that transformers knows: tensorboard, wandb, mlflow, ...")
    device: str | None = Field(None, description=DEVICE)
    trust_remote_code: bool = Field(False, description=TRUST)

    @field_validator("depths", "dims", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Take ``6,12`` for ``6 12``."""
        items = value if isinstance(value, (list, tuple)) else [value]
        return None if value is None else [part for item in items for part in str(item).split(",")]
