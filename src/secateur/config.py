"""The options of every command, once: the command line and YAML files are both made from these models.

An unknown key is refused. The Python functions of the same names take the same options; a test holds their defaults
together. This module imports nothing heavy, so that ``secateur --help`` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticUndefined

from secateur.errors import ConfigError, DataError

SavedPooling = Literal["weighted_mean", "mean", "lasttoken", "cls"]
"""Poolings that a saved folder can have: sentence-transformers' own."""
PoolingName = Literal["weighted_mean", "mean", "lasttoken", "cls", "l3prune"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Arithmetic = Literal["auto", "float32", "mixed", "bfloat16", "float16"]

MODEL = "A Hub id, a model folder, a .gguf file, or smollm2."
ONE: JsonDict = {"argument": True}
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""As numpy takes it."""


@dataclass(frozen=True)
class Names:
    """What an option names: a mistake in it is told before anything heavy is imported (:mod:`.cli.places`).

    ``what`` is the blocks that stay, a model, data, a task, a file, a profile, a run folder, or an output: of one that
    may hold earlier results, ``own`` are the names of these.
    """

    what: Literal[
        "blocks", "model", "data", "task", "file", "profile", "run", "study", "new folder", "new file", "results"
    ]
    own: tuple[str, ...] | None = None


PROFILE_FILES = (
    *("profile.json", "choice.json"),
    *(f"{name}.{kind}" for name in ("curve", "cka", "angles", "solved") for kind in ("png", "svg")),
)
STUDY_FILES = (
    *("study.yaml", "plan.json", "steps.jsonl", "table.csv", "costs.json", "report.html", "report.md"),
    *("data", "tasks", "models", "profiles", "pruned", "scores", "figures", "cache", "logs"),
)
SELECTOR_NAMES = (
    *("small", "large", "l3prune-small", "l3prune-large", "l3prune-interior-small", "l3prune-interior-large"),
    *("knee", "best-task", "block-influence", "angular", "uniform", "random", "first"),
)
"""Ways of choosing blocks (:mod:`.selectors`), by name."""
ModelName = Annotated[str, Names("model")]
Data = Annotated[list[Path], Names("data")]
Tasks = Annotated[list[str], Names("task")]
Files = Annotated[list[Path], Names("file")]


class Options(BaseModel):
    """What all commands' options have in common."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)


O = TypeVar("O", bound=Options)  # noqa: E741 - the letter that reads as Options


def _model() -> Any:
    return Field(description=MODEL, json_schema_extra=ONE)


def _out(what: str) -> Any:
    return Field(description=what, json_schema_extra={"short": "-o"})


def _pairs_of_words(given: Any) -> Any:
    """Take ``query=question,positive=answer`` for a mapping."""
    if not given or not isinstance(given, (str, list)):
        return given or None
    words = [word for item in ([given] if isinstance(given, str) else given) for word in str(item).split(",")]
    parts = {word: word.partition("=") for word in words}
    for word, (role, _, column) in parts.items():
        if not role.strip() or not column.strip():
            raise ValueError(f"{word!r} is not of the form query=question")
    return {role.strip(): column.strip() for role, _, column in parts.values()}


Columns = Annotated[dict[str, str] | None, BeforeValidator(_pairs_of_words)]


def _columns() -> Any:
    names = "query=question,positive=answer,negative=wrong, or text=body"
    return Field(None, description=f"What the data call these columns, where otherwise: {names}.")


_DATA = (
    "Files of query (or anchor), positive and optional negative: .jsonl, .jsonl.gz, .csv or .parquet; folders of them; "
    "or data sets of the Hub: hf:NAME:CONFIG[SPLIT]."
)
_TEXTS = " Or of texts alone: .txt, or .jsonl with text."
_INSTRUCTION = "Goes before each query, in place of the one that comes with the data."
_POOLING = (
    "How a bare language model pools its tokens [default: weighted_mean, or mean where attention goes both ways]."
)
_LENGTH = "Tokens after which a text is cut, for a bare language model."
_TRUST = "Run the model code that a repository brings along."
_CACHE = "Folder that keeps vectors, so that no text is encoded twice by the same model."
_ARITHMETIC = "Of the arithmetic; auto: the quickest that keeps a cosine of 0.9999 to float32."
_BATCH = "Tokens in a batch, padding included [default: 1,024 on a CPU, 8,192 on a GPU]."
_DEVICE = "Torch device [default: the GPU where there is one]."


class ProfileOptions(Options):
    """Measure what every depth of a model is worth, in one pass.

    Example: secateur profile smollm2 --data pairs.jsonl --tasks tasks/my-search -o profile
    """

    model: ModelName = _model()
    data: Data = Field(description=_DATA + _TEXTS, min_length=1)
    columns: Columns = _columns()
    out: Annotated[Path, Names("results", PROFILE_FILES)] = _out("Folder for profile.json and its pictures.")
    scale: float = Field(20.0, gt=0, description="Inverse temperature of the contrastive loss.")
    instruction: str | None = Field(None, description=_INSTRUCTION)
    pooling: PoolingName | None = Field(
        None, description=_POOLING + " l3prune: as the paper's own code, to reproduce its curve."
    )
    batch_size: int = Field(64, ge=2, description="Pairs per batch; the loss depends on it.")
    max_examples: int = Field(1280, ge=2, description="Pairs used, drawn by the seed.")
    until_sure: bool = Field(
        False, description="Stop as soon as the choice is settled at 95 %, by a test at fixed looks."
    )
    max_length: int = Field(512, ge=1, description=_LENGTH)
    dtype: Dtype = Field("auto", description="Number format of the arithmetic; auto: by what the processor multiplies.")
    device: str | None = Field(None, description=_DEVICE)
    seed: Seed = Field(42, description="Of the drawing.")
    tasks: Tasks = Field(
        [], description="Score these at every depth too: task folders, or tasks and benchmarks of mteb."
    )
    sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each task.")
    trust_remote_code: bool = Field(False, description=_TRUST)


class ChooseOptions(Options):
    """Show what every selector chooses from a profile, with what it would cost; or choose within a budget.

    Example: secateur choose profile --max-params 100e6
    """

    profile: Annotated[Path, Names("profile")] = Field(description="A profile's file or folder.", json_schema_extra=ONE)
    max_params: float | None = Field(None, gt=0, description="Most parameters, the token table included.")
    max_bytes: float | None = Field(None, gt=0, description="Most bytes of the weights.")
    max_latency_ms: float | None = Field(None, gt=0, description="Most milliseconds for one short text, as profiled.")
    max_loss_increase: float | None = Field(
        None, ge=0, description="Most by which the loss may be above the lowest of all depths; 0.05 is 5 %."
    )


class PruneOptions(Options):
    """Cut a model to its first blocks, or any others, and write it as a plain model folder.

    Example: secateur prune smollm2 --to large --profile profile -o smollm2-large
    """

    model: ModelName = _model()
    to: Annotated[str | None, Names("blocks")] = Field(
        None,
        description="A number of first blocks to keep, a share to remove (0.3), large, small, or another selector.",
    )
    keep: str | None = Field(None, description="In place of --to: the blocks that stay, from 0, such as 0-5,8,11.")
    drop: str | None = Field(None, description="In place of --to: the blocks that go, such as 20-27.")
    out: Annotated[Path, Names("new folder")] = _out("The model folder to write.")
    profile: Annotated[Path | None, Names("profile")] = Field(
        None, description="What selectors choose from: a profile's file or folder."
    )
    pooling: SavedPooling | None = Field(None, description=_POOLING)
    max_length: int = Field(512, ge=1, description=_LENGTH)
    dtype: Dtype = Field("auto", description="Number format of the written weights; auto: as stored.")
    adapter: str | None = Field(None, description="A LoRA adapter to merge into the weights: a folder or a Hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = Field(False, description=_TRUST)


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

    model: ModelName = _model()
    data: Data = Field(description=_DATA + _TEXTS, min_length=1)
    columns: Columns = _columns()
    out: Annotated[Path, Names("new folder")] = _out("The model folder to write.")
    instruction: str | None = Field(None, description=_INSTRUCTION)
    teacher: Annotated[str | None, Names("model")] = Field(
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
    cache: Path | None = Field(None, description=_CACHE)
    bidirectional: bool = Field(False, description="Let a decoder's tokens see those after them, from here on.")
    eval_data: Annotated[list[Path] | None, Names("data")] = Field(
        None, description="Held-out files like --data, measured on the way."
    )
    eval_tasks: Annotated[list[str] | None, Names("task")] = Field(
        None, description="Tasks measured on the way; the best model is kept."
    )
    eval_sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each of them.")
    eval_every: int | None = Field(None, ge=1, description="Steps between measurements [a tenth of all].")
    patience: int | None = Field(None, ge=1, description="Stop after so many measurements without a better one.")
    report_to: str = Field("none", description="A tracker that transformers knows: tensorboard, wandb, mlflow, ...")
    device: str | None = Field(None, description=_DEVICE)
    trust_remote_code: bool = Field(False, description=_TRUST)

    @field_validator("depths", "dims", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Take ``6,12`` for ``6 12``."""
        items = value if isinstance(value, (list, tuple)) else [value]
        return None if value is None else [part for item in items for part in str(item).split(",")]


class EvaluateOptions(Options):
    """Score models on tasks, with mteb's own evaluators.

    Example: secateur evaluate smollm2-large-healed --tasks tasks/my-search -o scores
    """

    models: Annotated[list[str], Names("model")] = Field(description=MODEL, json_schema_extra=ONE, min_length=1)
    tasks: Tasks = Field(description="Task folders, or names of mteb's tasks and benchmarks.", min_length=1)
    out: Annotated[Path, Names("results")] = _out("Folder for scores.json.")
    names: list[str] | None = Field(
        None, description="What to call the models [default: the last part of their paths]."
    )
    sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each task.")
    seed: Seed = Field(42, description="Of the sample.")
    batch_size: int = Field(32, ge=1, description="Texts per batch.")
    cache: Path | None = Field(None, description=_CACHE)


class CostOptions(Options):
    """Count what models cost, and time them side by side.

    Example: secateur cost smollm2 smollm2-large -o costs
    """

    models: Annotated[list[str], Names("model")] = Field(description=MODEL, json_schema_extra=ONE, min_length=1)
    out: Annotated[Path, Names("results")] = _out("Folder for costs.json.")
    repetitions: int = Field(3, ge=1, description="Timed rounds.")
    thorough: bool = Field(False, description="More texts and batches; load time and peak memory in fresh processes.")
    device: str | None = Field(None, description=_DEVICE)


class CompareOptions(Options):
    """Compare models on your data: scores with paired intervals, costs, and the texts whose neighbours changed.

    Example: secateur compare smollm2 smollm2-large --tasks tasks/my-search --texts notes.txt -o comparison
    """

    models: Annotated[list[str], Names("model")] = Field(description=MODEL, json_schema_extra=ONE, min_length=2)
    tasks: Tasks = Field([], description="Task folders, or names of mteb's tasks and benchmarks.")
    texts: Files = Field([], description="Files of texts: .txt, or .jsonl with text [default: the tasks' own].")
    out: Annotated[Path, Names("results")] = _out("Folder for comparison.json and the scores.")
    neighbours: int = Field(10, ge=1, description="Nearest texts compared for each text.")
    max_texts: int = Field(2000, ge=2, description="Texts used for the neighbours, drawn by the seed.")
    sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each task.")
    seed: Seed = Field(42, description="Of the samples.")
    batch_size: int = Field(32, ge=1, description="Texts per batch.")
    timed: bool = Field(True, description="Count and time the models too.")
    cache: Path | None = Field(None, description=_CACHE)


class ExportOptions(Options):
    """Write a model for ONNX Runtime or OpenVINO, and compare it with the original.

    Example: secateur export smollm2-large-healed --to openvino --precision int8 -o smollm2-large-int8
    """

    model: ModelName = _model()
    out: Annotated[Path, Names("new folder")] = _out("The folder to write.")
    to: Literal["onnx", "openvino"] = Field("onnx", description="The runtime.")
    precision: Literal["float32", "float16", "bfloat16", "int8"] = Field("float32", description="Of the graph.")
    quantization: Literal["static", "dynamic"] | None = Field(
        None, description="How int8 rounds activations: by ranges measured on texts, or anew [default: the faster]."
    )
    data: Data = Field(
        default=[],
        description="Files of texts or pairs, or folders of them, to calibrate and compare on "
        "[default: documentation of Python].",
    )
    dimensions: int | None = Field(None, ge=1, description="Keep so many numbers of each vector (Matryoshka).")
    vectors: Literal["float32", "int8", "uint8", "binary", "ubinary"] = Field(
        "float32", description="Form in which the runtime gives vectors."
    )
    tasks: Tasks = Field(default=[], description="Tasks to score both on: folders, or tasks and benchmarks of mteb.")
    sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each task.")
    seed: Seed = Field(42, description="Of the samples.")
    min_cosine: float | None = Field(
        None, ge=-1, le=1, description="Least cosine with the original that any text may have [default: by precision]."
    )
    max_loss: float = Field(0.5, ge=0, description="Points of 100 that the average over the tasks may fall by.")
    pooling: SavedPooling | None = Field(None, description=_POOLING)
    max_length: int = Field(512, ge=1, description=_LENGTH)
    trust_remote_code: bool = Field(False, description=_TRUST)


class ReportOptions(Options):
    """Write a run's report: one HTML page, the same as Markdown, and a model card in each model folder.

    Example: secateur report run
    """

    run: Annotated[Path, Names("run")] = Field(description="A run folder.", json_schema_extra=ONE)
    threshold: float = Field(100.0, gt=0, description="Million parameters that one more point of score may cost.")


class StudyOptions(HealSettings):
    """Go the whole way: profile, choose, prune, heal, evaluate, report; run it again to resume.

    Example: secateur study smollm2 --data pairs.jsonl --tasks tasks/my-search --steps 200 -o run
    """

    models: Annotated[list[str], Names("model")] = Field(default=[], description=MODEL, json_schema_extra=ONE)
    data: Data = Field(default=[], description=_DATA)
    columns: Columns = _columns()
    tasks: Tasks = Field(default=[], description="Task folders, or names of mteb's tasks and benchmarks.")
    out: Annotated[Path, Names("results", STUDY_FILES)] = _out("The run folder.")
    preset: Literal["demo", "paper", "shrink"] | None = Field(
        None,
        description="demo: SmolLM2 on API documentation, in ten minutes; paper: L3Prune's experiments; "
        "shrink: an embedder's parts learn from the whole, on texts alone.",
    )
    depths: Annotated[list[str], Names("blocks")] = Field(
        default=["large", "small"], description="As prune --to; the full depth is always there."
    )
    recipes: dict[str, dict[str, Any]] = Field(
        default={"healed": {}},
        description="Names of trainings; none leaves the cut models as they are. In YAML: name -> options of heal.",
    )
    teacher: str | None = Field(None, description="As heal --teacher; self: the whole model teaches its parts.")
    seeds: list[Seed] = Field(default=[], description="Train once with each [default: --seed].")
    profile_scale: float = Field(20.0, gt=0, description="Inverse temperature of the profile's loss.")
    profile_dtype: Dtype = Field("auto", description="Number format of the profile's arithmetic; auto: the quickest.")
    max_examples: int = Field(1280, ge=2, description="Pairs used by the profile.")
    depth_scores: bool = Field(False, description="Score the tasks at every depth of the models as they came, too.")
    pooling: SavedPooling | None = Field(None, description=_POOLING)
    sample: int | None = Field(None, ge=1, description="Use a seeded sample of this size of each task.")
    cache: Path | None = Field(None, description=_CACHE + " [default: cache in the run folder]")
    jobs: int = Field(1, ge=1, description="Steps at once, each in a process of its own.")
    ray: str | None = Field(None, description="Run the steps on the Ray cluster at this address, or auto, or local.")

    @field_validator("recipes", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """The command line names recipes, and YAML may leave one empty: both without settings of their own."""
        if isinstance(given, list):
            return {name: {} for name in given}
        return {name: own or {} for name, own in given.items()} if isinstance(given, dict) else given

    @field_validator("seeds")
    @classmethod
    def _once(cls, given: list[int]) -> list[int]:
        if len(set(given)) < len(given):
            raise ValueError("each seed once")
        return given


class StatusOptions(Options):
    """Show how far a study is.

    Example: secateur study status run
    """

    run: Annotated[Path, Names("study")] = Field(description="A run folder.", json_schema_extra=ONE)


class ResumeOptions(StatusOptions):
    """Go on with a study that was stopped, or whose steps failed.

    Example: secateur study resume run --jobs 4
    """

    jobs: int = Field(1, ge=1, description="Steps at once, each in a process of its own.")
    ray: str | None = Field(None, description="Run the steps on the Ray cluster at this address, or auto, or local.")


class EncodeOptions(Options):
    """Encode files of texts into one file of vectors; a run that was killed goes on where it stopped.

    Example: secateur encode smollm2-large-healed articles.jsonl -o articles.parquet
    """

    model: ModelName = Field(description=MODEL + " Or a folder that export wrote.", json_schema_extra=ONE)
    files: Files = Field(
        description="Texts: .jsonl, .jsonl.gz, .csv, .parquet, or .txt and .txt.gz with one on each line.",
        json_schema_extra=ONE,
        min_length=1,
    )
    out: Annotated[Path, Names("new file")] = _out("The file to write: .parquet, .arrow (or .feather), or .npy.")
    column: str | None = Field(None, description="Column with the texts [default: text, or the first known name].")
    prompt_name: str | None = Field(None, description="The model's prompt before each text [default: its own default].")
    instruction: str | None = Field(None, description="Goes before each text, in place of a named prompt.")
    normalize: bool = Field(False, description="Make vectors of length 1, also where the model does not.")
    dimensions: int | None = Field(None, ge=1, description="Keep so many numbers of each vector (Matryoshka).")
    precision: Literal["float32", "int8", "binary"] = Field("float32", description="Form of the vectors.")
    ranges: Path | None = Field(None, description="With int8: a file of int8 vectors, whose ranges are taken.")
    batch_tokens: int | None = Field(None, ge=1, description=_BATCH)
    processes: int = Field(1, ge=1, description="Processes of this machine, or workers of the cluster.")
    ray: str | None = Field(None, description="Address of a Ray cluster (auto, ray://host:10001), or local.")
    dtype: Arithmetic = Field("auto", description=_ARITHMETIC)
    pooling: SavedPooling | None = Field(None, description=_POOLING)
    max_length: int = Field(512, ge=1, description=_LENGTH)
    device: str | None = Field(None, description=_DEVICE)
    trust_remote_code: bool = Field(False, description=_TRUST)


class ServeOptions(Options):
    """Serve a model over HTTP, as the OpenAI embeddings API.

    Example: secateur serve smollm2-large-healed --port 8000
    """

    model: ModelName = _model()
    host: str = Field("127.0.0.1", description="Address to listen at; others than loopback need an API key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen at; 0 takes a free one.")
    name: str | None = Field(None, min_length=1, description="What clients call the model [default: its folder].")
    api_key_file: Annotated[Path | None, Names("file")] = Field(
        None, description="API keys, one a line; also in SECATEUR_API_KEYS."
    )
    auth: bool = Field(True, description="--no-auth serves everybody who reaches the address.")
    workers: int = Field(0, ge=0, description="Encoder processes, replaced when they die or hang; 0: a thread.")
    batch_tokens: int | None = Field(None, ge=1, description=_BATCH)
    queue_tokens: int = Field(500_000, ge=1, description="Tokens that may wait; more are answered with 429.")
    max_items: int = Field(2048, ge=1, description="Texts in a request.")
    max_tokens: int = Field(300_000, ge=1, description="Tokens in a request.")
    max_bytes: int = Field(4 << 20, ge=1, description="Bytes of a request's body.")
    timeout: float = Field(60.0, gt=0, description="Seconds that a request may take.")
    truncate: bool = Field(False, description="Cut texts that are too long; else they are refused.")
    pooling: SavedPooling | None = Field(None, description=_POOLING)
    max_length: int = Field(512, ge=1, description=_LENGTH)
    dtype: Arithmetic = Field("auto", description=_ARITHMETIC)
    device: str | None = Field(None, description=_DEVICE)
    trust_remote_code: bool = Field(False, description=_TRUST)


def make(options: type[O], values: dict[str, Any]) -> O:
    """Validate options.

    Raises:
        ConfigError: The first key that is unknown, missing, or of a wrong value.
    """
    try:
        return options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "options"
        if first["type"] == "extra_forbidden":
            known = ", ".join(options.model_fields)
            raise ConfigError(key, first["input"], "no such option", f"one of {known}") from None
        if first["type"] in ("missing", "too_short"):
            raise ConfigError(key, None, "is missing", options.model_fields[key].description or "") from None
        raise ConfigError(key, first["input"], f"{first['input']!r} will not do", first["msg"]) from None


def check(options: type[Options], **values: Any) -> None:
    """Validate what a function was given for some of a command's options. It is used as it is: nothing is converted.

    Raises:
        ConfigError: The first that is of a wrong value.
    """
    blank = options.model_construct()
    for key, value in values.items():
        try:
            options.__pydantic_validator__.validate_assignment(blank, key, value, strict=True)
        except ValidationError as error:
            raise ConfigError(key, value, f"{value!r} will not do", error.errors()[0]["msg"]) from None


def default_of(options: type[Options], key: str) -> Any:
    """An option's default, or None where it must be given."""
    default = options.model_fields[key].get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default


def read_yaml(file: Path) -> dict[str, Any]:
    """Keys and values of a configuration file.

    Raises:
        DataError: It is missing, broken (with its line), or no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(file, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(file, f"cannot be read ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise DataError(file, f"broken YAML ({error.problem})", line=line) from None
    except yaml.YAMLError as error:
        raise DataError(file, f"broken YAML ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not keys and values")
    return {str(key): value for key, value in content.items()}


def read_study(run: Path) -> StudyOptions:
    """The options of the study that a run folder holds.

    Raises:
        DataError: It holds none, or its ``study.yaml`` is broken.
        ConfigError: An option in it will not do.
    """
    if not (run / "study.yaml").is_file():
        raise DataError(run, "holds no study", "name the folder that `secateur study` was given")
    return make(StudyOptions, read_yaml(run / "study.yaml") | {"out": run})


def to_yaml(options: Options) -> str:
    """The resolved options as YAML, which :func:`read_yaml` reads back."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
