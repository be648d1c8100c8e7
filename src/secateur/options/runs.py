"""Options of what judges and runs models: evaluate, cost, compare, report, study; export, encode, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator

from secateur.errors import DataError
from secateur.options.base import (
    DATA,
    ENDPOINT,
    MODEL,
    AnyName,
    Data,
    Device,
    Dtype,
    Files,
    HeldOut,
    MaxLength,
    Model,
    ModelName,
    Names,
    NewFolder,
    Options,
    Pooling,
    Sample,
    SampleSeed,
    Seed,
    Tasks,
    TaskSample,
    TrustRemoteCode,
    argument,
    comma_separated,
    listed,
    make,
    name_only,
    option,
    positional,
    read_yaml,
)
from secateur.options.way import Budget, HealSettings, VocabularyOptions

STUDY_FILES = (
    *("study.yaml", "plan.json", "steps.jsonl", "table.csv", "costs.json", "report.html", "report.md"),
    *("data", "tasks", "models", "profiles", "scouts", "pruned", "trained"),
    *("scores", "figures", "cache", "logs", "done"),
)
TIMED = f"{MODEL} Or what cannot be cut: a static embedding (model2vec), or a folder that export wrote."
OTHERS = f"{TIMED} Or {ENDPOINT}"
Models = Annotated[list[Annotated[str, BeforeValidator(name_only)]], BeforeValidator(listed), Names("model")]
Results = Annotated[Path | None, Names("results")]
NAMES = "What to call the models [default: the last part of their paths]."
ModelNames = Annotated[list[str] | None, BeforeValidator(listed), option(NAMES)]
Cache = Annotated[Path | None, option("Folder that keeps vectors: no text is encoded twice by the same model.")]
SEVERAL = BeforeValidator(lambda given: comma_separated(given) or [])
Depths = Annotated[list[int], SEVERAL]
RAY = "Run the steps on a Ray cluster: its address, auto for this machine's, local for a new one; '' for none."
Ray = Annotated[str | None, BeforeValidator(lambda given: given or None), option(RAY)]
Specs = Annotated[list[str], SEVERAL, Names("layers")]


class EvaluateOptions(Options):
    """Score models on tasks, with mteb's own evaluators.

    Example: secateur evaluate smollm2-large-healed --tasks tasks/my-search -o scores
    """

    models: Annotated[list[AnyName], BeforeValidator(listed), Names("model")] = argument(OTHERS, min_length=1)
    tasks: Tasks = positional(
        "Task folders or files (see `secateur tasks check`), or names of tasks and benchmarks of mteb.", min_length=1
    )
    out: Results = option("Folder for scores.json; scores in it are computed again only if something changed.")
    names: ModelNames = None
    sample: Sample = None
    seed: SampleSeed = 42
    batch_size: int = option("Number of texts encoded at once.", 32, ge=1)
    cache: Cache = None


class CheckTasksOptions(Options):
    """Say what task folders and files are, how they will be scored, and what is wrong where.

    Example: secateur tasks check tasks/my-search pairs.csv
    """

    tasks: Annotated[list[Path], BeforeValidator(listed)] = argument("Task folders or files.", min_length=1)


class MakeTaskOptions(Options):
    """Make a first retrieval task from texts alone: title -> body, or first sentence -> rest.

    Example: secateur tasks make articles.jsonl -o tasks/articles
    """

    texts: Annotated[Path, Names("file")] = argument("A file of texts: .jsonl, .csv, .tsv, .parquet or .txt.")
    out: NewFolder = option("The task folder to write.", ...)
    title: str | None = option("Column of the titles [default: title, headline or heading].")
    text: str | None = option("Column of the texts [default: text, body, content or the like].")
    queries: int = option("Maximum number of queries; all texts are documents.", 500, ge=1)
    seed: Seed = option("Random seed: which texts get a query.", 42)


class CostOptions(Options):
    """Count what models cost, and time them side by side.

    Example: secateur cost smollm2 smollm2-large -o costs
    """

    models: Models = argument(TIMED, min_length=1)
    out: Results = option("Folder for costs.json.")
    names: ModelNames = None
    repetitions: int = option("Number of timed rounds; speeds are their median, with the range of several.", 3, ge=1)
    thorough: bool = option("Time more texts and batch sizes, and measure load time and peak memory.", False)
    device: Device = None


class CompareOptions(Options):
    """Compare models on your data: scores with paired intervals, costs, and the texts whose neighbours changed.

    Example: secateur compare smollm2 smollm2-large --tasks tasks/my-search --texts notes.txt -o comparison
    """

    models: Models = argument(OTHERS + " The first is the reference.", min_length=2)
    tasks: Tasks = option("Tasks to score the models on, as for evaluate.", [])
    texts: Files = option("Files of texts whose nearest neighbours are compared [default: texts of the tasks].", [])
    out: Results = option("Folder for comparison.json and the scores.")
    names: ModelNames = None
    neighbours: int = option("Number of nearest texts compared for each text; at most half of the others.", 10, ge=1)
    max_texts: int = option("Maximum number of texts used for the neighbours, sampled by seed.", 2000, ge=3)
    sample: TaskSample = None
    seed: SampleSeed = 42
    batch_size: int = option("Texts per batch when encoding.", 32, ge=1)
    timed: bool = option("Also count parameters and measure speed, as `secateur cost` does.", True)
    cache: Cache = None


class ReportOptions(Options):
    """Write a run's report: one HTML page, the same as Markdown, and a model card in each model folder.

    Example: secateur report run
    """

    run: Annotated[Path, Names("run")] = argument("A run folder.")
    threshold: float = option("Million parameters that one more point of score may cost, for the advice.", 100.0, gt=0)


class StudyOptions(VocabularyOptions, HealSettings, Budget):
    """Find the depth that your data need: profile, scout, choose, polish, evaluate, report; run it again to resume.

    Example: secateur study smollm2 --data pairs.jsonl --tasks tasks/my-search --steps 200 -o run
    """

    models: Models = argument(MODEL, default=[])
    steps: int | None = option(
        "Training budget in steps of the full model, a quarter for the scout; with --depths, of each training [1000].",
        ge=1,
    )
    data: Data = option(DATA, [])
    tasks: Tasks = option("Task folders or files, or names of mteb's tasks and benchmarks.", [])
    baselines: Models = option("Models to compare with, scored and timed alike; named as for evaluate.", [])
    vocab: Data = option("Cut the finished models' vocabulary by these texts [with a size or coverage: --data].", [])
    out: Annotated[Path, Names("results", STUDY_FILES)] = option("The run folder, for all results.", ...)
    preset: Literal["demo", "paper", "shrink"] | None = option(
        "Defaults for: demo: SmolLM2 in 15 minutes; paper: L3Prune's experiments; shrink: an embedder, on texts alone."
    )
    ladder: Depths = option("Depths that the scout trains: 6,12,24 [default: about eight, as scout --depths].", [])
    polish: Depths = option("Depths to train further after the scout [default: the one that its scores choose].", [])
    held_out: HeldOut = 1000
    depths: Specs = option("Without a scout: train each of these depths (as for prune --to) and the full model.", [])
    recipes: dict[str, dict[str, Any]] = option(
        "With --depths: trainings of every depth; none: only cut. In YAML: name -> options of heal.", {"healed": {}}
    )
    teacher: Annotated[str, BeforeValidator(name_only)] | None = option(
        "Model whose vectors are to be learned, as for heal; self: the full model of each depth."
    )
    seeds: Annotated[list[Seed], SEVERAL] = option("Repeat each training with these seeds [default: --seed].", [])
    profile_scale: float = option("Inverse temperature of the loss that the profile measures.", 20.0, gt=0)
    profile_dtype: Dtype = option("Data type of the profile's computation, as profile --dtype.", "auto")
    max_examples: int = option("Number of pairs used by the profile.", 1280, ge=2)
    depth_scores: bool = option("Score the tasks at every depth of the untrained models, too.", False)
    pooling: Pooling = None
    sample: Sample = None
    cache: Path | None = option("Folder that keeps vectors [default: cache in the run folder].")
    jobs: int = option("Number of steps that run at the same time, each in a process of its own.", 1, ge=1)
    ray: Ray = None

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
    """Show which steps of a study are done, and how long the others will take.

    Example: secateur study status run
    """

    run: Annotated[Path, Names("study")] = argument("A run folder.")


class ResumeOptions(StatusOptions):
    """Resume a study that was stopped, or in which steps failed.

    Example: secateur study resume run --jobs 4
    """

    jobs: int | None = option("Number of steps that run at the same time [default: the study's own].", ge=1)
    ray: Ray = None


def read_study(run: Path) -> StudyOptions:
    """The options of the study that a run folder holds; DataError if it holds none, ConfigError if one is not valid."""
    if not (run / "study.yaml").is_file():
        raise DataError(run, "holds no study", "name the folder that `secateur study` was given")
    file = run / "study.yaml"
    values = read_yaml(file)
    if not values.get("models"):
        raise DataError(file, "names no model", "bring the file back, or name a new run folder")
    return make(StudyOptions, values | {"out": run}, file, ["out"])


# Export, encode, serve ------------------------------------------------------------------------------------------------

BACKEND = "What runs it on a CPU; onnx and openvino convert the model once; auto: the fastest that keeps --min-cosine."
ARITHMETIC = "Data type of matrix products; stored: the weights' own; auto: the fastest that keeps --min-cosine."
ENCODED = f"{MODEL} Or a folder that export wrote."
COSINE = "Lowest cosine to PyTorch's float32 vectors that auto accepts, on test texts; 0.98 allows int8."
BATCH_TOKENS = "Tokens in a batch, padding included [default: 1,024 on a CPU, 8,192 on a GPU]."
Backend = Annotated[Literal["auto", "torch", "onnx", "openvino"], option(BACKEND)]
Arithmetic = Annotated[Literal["auto", "float32", "bfloat16", "float16", "int8", "stored"], option(ARITHMETIC)]
MinCosine = Annotated[float, option(COSINE, ge=-1, le=1)]
BatchTokens = Annotated[int | None, option(BATCH_TOKENS, ge=1)]


class ExportOptions(Options):
    """Write a model for ONNX Runtime or OpenVINO, and compare it with the original.

    Example: secateur export smollm2-large-healed --to openvino --precision int8 -o smollm2-large-int8
    """

    model: Model
    out: NewFolder = option("The folder to write.", ...)
    to: Literal["onnx", "openvino"] = option("Backend that will run the model.", "onnx")
    precision: Literal["float32", "float16", "bfloat16", "int8"] = option(
        "Precision of the exported weights; int8 is the smallest and the fastest.", "float32"
    )
    quantization: Literal["static", "dynamic"] | None = option(
        "With int8, ranges of activations: calibrated on texts, or of each batch [default: the faster on the backend]."
    )
    data: Data = option("Texts or pairs to calibrate on and compare vectors of [default: Python's documentation].", [])
    dimensions: int | None = option("Truncate vectors to this many dimensions (Matryoshka).", ge=1)
    vectors: Literal["float32", "int8", "uint8", "binary", "ubinary"] = option(
        "Precision of the vectors that the light runtime returns by default.", "float32"
    )
    tasks: Tasks = option("Tasks to score the original and the export on, as for evaluate.", [])
    sample: TaskSample = None
    seed: SampleSeed = 42
    min_cosine: float | None = option("Fail if a text's cosine to the original is lower [by precision].", ge=-1, le=1)
    max_loss: float = option("Fail if the average score falls by more points (of 100) than this.", 0.5, ge=0)
    pooling: Pooling = None
    max_length: MaxLength = 512
    trust_remote_code: TrustRemoteCode = False


class EncodeOptions(Options):
    """Encode files of texts into one file of vectors; a run that was killed goes on where it stopped.

    Example: secateur encode smollm2-large-healed articles.jsonl -o articles.parquet
    """

    model: ModelName = argument(ENCODED)
    files: Files = argument("Texts: .jsonl, .csv, .tsv or .txt, one on each line, also .gz; or .parquet.", min_length=1)
    out: Annotated[Path, Names("new file")] = option("The file to write: .parquet, .arrow (or .feather), or .npy.", ...)
    column: str | None = option("Column (or key) with the texts [default: text, or the first known].")
    prompt_name: str | None = option("The model's prompt before each text [default: its default one].")
    instruction: str | None = option("Instruction to put before each text, instead of a named prompt.")
    normalize: bool = option("Normalize vectors to length 1, also where the model does not.", False)
    dimensions: int | None = option("Truncate vectors to this dimension (Matryoshka).", ge=1)
    precision: Literal["float32", "int8", "binary"] = option(
        "Quantize the vectors: int8 takes a quarter of the room, binary a thirty-second.", "float32"
    )
    ranges: Annotated[Path | None, Names("file")] = option(
        "With int8: a file of int8 vectors that these are to be compared with."
    )
    batch_tokens: BatchTokens = None
    processes: int = option("Processes on this machine, or workers on the cluster (1: one per machine).", 1, ge=1)
    ray: str | None = option("Ray cluster that encodes: auto, ray://host:10001, or local.")
    backend: Backend = "auto"
    dtype: Arithmetic = "auto"
    min_cosine: MinCosine = 0.9999
    pooling: Pooling = None
    max_length: MaxLength = 512
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


class ServeOptions(Options):
    """Serve a model over HTTP, as the OpenAI embeddings API.

    Example: secateur serve smollm2-large-healed --port 8000
    """

    model: ModelName = argument(ENCODED)
    host: str = option("Address to listen on; any other than loopback needs an API key.", "127.0.0.1")
    port: int = option("Port to listen on; 0 picks a free one, which the log names.", 8000, ge=0, le=65535)
    name: str | None = option("Model name for clients [default: the folder's name].", min_length=1)
    api_key_file: Annotated[Path | None, Names("file")] = option(
        "File of API keys, one per line, besides those in the variable SECATEUR_API_KEYS."
    )
    auth: bool = option("--no-auth serves without API keys, whatever the address.", True)
    workers: int = option("Encoding processes, restarted when they crash or hang; 0: a thread encodes.", 0, ge=0)
    batch_tokens: BatchTokens = None
    queue_tokens: int = option("Tokens waiting or in work, beyond which requests get 429.", 500_000, ge=1)
    max_items: int = option("Maximum number of texts in a request.", 2048, ge=1)
    max_tokens: int = option("Maximum number of tokens in a request.", 300_000, ge=1)
    max_bytes: int = option("Maximum size of a request's body, in bytes.", 4 << 20, ge=1)
    timeout: float = option("Seconds after which a request is answered with 503.", 60.0, gt=0)
    truncate: bool = option("Truncate texts that are too long for the model; else they are refused.", False)
    pooling: Pooling = None
    max_length: MaxLength = 512
    backend: Backend = "auto"
    dtype: Arithmetic = "auto"
    min_cosine: MinCosine = 0.9999
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
