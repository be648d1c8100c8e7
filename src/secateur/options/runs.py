"""Options of what looks at several models: evaluate, cost, compare, report, study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from secateur.errors import DataError
from secateur.options.base import (
    DATA,
    ENDPOINT,
    MODEL,
    STUDY_FILES,
    AnyName,
    Data,
    Device,
    Dtype,
    Files,
    HeldOut,
    Names,
    Options,
    Pooling,
    Sample,
    SampleSeed,
    Seed,
    Tasks,
    argument,
    comma_separated,
    listed,
    make,
    output,
    path_text,
    positional,
    read_yaml,
)
from secateur.options.way import Budget, HealSettings, VocabularyOptions

OTHERS = (
    MODEL
    + " Or something that can be compared, but not cut: a static embedding (model2vec), a folder that export wrote, or "
) + ENDPOINT
Models = Annotated[list[AnyName], BeforeValidator(listed), Names("model")]
ModelNames = Annotated[
    list[str] | None, Field(description="What to call the models [default: the last part of their paths].")
]
Cache = Annotated[
    Path | None, Field(description="Folder that keeps vectors, so that no text is encoded twice by the same model.")
]
Depths = Annotated[list[int], BeforeValidator(lambda given: comma_separated(given) or [])]
Jobs = Annotated[
    int, Field(ge=1, description="Number of steps that run at the same time, each in a process of its own.")
]
Ray = Annotated[
    str | None,
    Field(description="Run the steps on a Ray cluster: its address, auto for this machine's, local for a new one."),
]


def texts(value: Any) -> Any:
    """Numbers and paths in a list become texts."""
    return [str(item) for item in listed(value)]


class EvaluateOptions(Options):
    """Score models on tasks, with mteb's own evaluators.

    Example: secateur evaluate smollm2-large-healed --tasks tasks/my-search -o scores
    """

    models: Models = argument(OTHERS, min_length=1)
    tasks: Tasks = positional(
        "Task folders or files (see `secateur tasks`), or names of tasks and benchmarks of mteb.", min_length=1
    )
    out: Annotated[Path | None, Names("results")] = output(
        "The folder for scores.json; scores that it already holds are computed again only if something changed.",
        needed=False,
    )
    names: ModelNames = None
    sample: Sample = None
    seed: SampleSeed = 42
    batch_size: int = Field(32, ge=1, description="Number of texts encoded at once.")
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
    out: Annotated[Path, Names("new folder")] = output("The task folder to write.")
    title: str | None = Field(None, description="Column of the titles [default: title, headline or heading].")
    text: str | None = Field(None, description="Column of the texts [default: text, body, content or the like].")
    queries: int = Field(500, ge=1, description="Maximum number of queries; all texts are documents.")
    seed: Seed = Field(42, description="Random seed: which texts get a query.")


class CostOptions(Options):
    """Count what models cost, and time them side by side.

    Example: secateur cost smollm2 smollm2-large -o costs
    """

    models: Models = argument(OTHERS, min_length=1)
    out: Annotated[Path | None, Names("results")] = output("Folder for costs.json.", needed=False)
    names: ModelNames = None
    repetitions: int = Field(3, ge=1, description="Number of timed rounds; speeds are their median, with the range.")
    thorough: bool = Field(
        False,
        description="Time sixteen times as many texts and more batch sizes, and measure load time and peak memory.",
    )
    device: Device = None


class CompareOptions(Options):
    """Compare models on your data: scores with paired intervals, costs, and the texts whose neighbours changed.

    Example: secateur compare smollm2 smollm2-large --tasks tasks/my-search --texts notes.txt -o comparison
    """

    models: Models = argument(OTHERS + " The first is the reference.", min_length=2)
    tasks: Tasks = Field([], description="Tasks to score the models on, as for evaluate.")
    texts: Files = Field(
        [], description="Files of texts whose nearest neighbours are compared: .txt or .jsonl [default: of the tasks]."
    )
    out: Annotated[Path | None, Names("results")] = output("Folder for comparison.json and the scores.", needed=False)
    names: ModelNames = None
    neighbours: int = Field(10, ge=1, description="Number of nearest texts compared for each text.")
    max_texts: int = Field(2000, ge=2, description="Maximum number of texts used for the neighbours, sampled by seed.")
    sample: Sample = None
    seed: SampleSeed = 42
    batch_size: int = Field(32, ge=1, description="Texts per batch when encoding.")
    timed: bool = Field(True, description="Also count parameters and measure speed, as `secateur cost` does.")
    cache: Cache = None


class ReportOptions(Options):
    """Write a run's report: one HTML page, the same as Markdown, and a model card in each model folder.

    Example: secateur report run
    """

    run: Annotated[Path, Names("run")] = argument("A run folder.")
    threshold: float = Field(
        100.0, gt=0, description="Million parameters that one more point of score may cost, in the report's advice."
    )


class StudyOptions(VocabularyOptions, HealSettings, Budget):
    """Find the depth that your data need: profile, scout, choose, polish, evaluate, report; run it again to resume.

    Example: secateur study smollm2 --data pairs.jsonl --tasks tasks/my-search --steps 200 -o run
    """

    models: Models = argument(MODEL, default=[])
    data: Data = Field(default=[], description=DATA)
    tasks: Tasks = Field(default=[], description="Task folders, or names of mteb's tasks and benchmarks.")
    baselines: Models = Field([], description="Models to compare with, scored and timed alike; named as for evaluate.")
    vocab: Data = Field(
        default=[],
        description="Cut the vocabulary of the finished models to the tokens that these texts need: files as for "
        "--data [default: --data, with --vocab-size or --vocab-coverage].",
    )
    out: Annotated[Path, Names("results", STUDY_FILES)] = output("The run folder: all results, and what is left to do.")
    preset: Literal["demo", "paper", "shrink"] | None = Field(
        None,
        description="Defaults for the options that you do not set. demo: SmolLM2 on API documentation, about ten "
        "minutes; paper: L3Prune's experiments; shrink: an embedding model teaches some of its own layers, on texts.",
    )
    ladder: Depths = Field(
        default=[], description="Depths that the scout trains: 6,12,24 [default: about eight, as scout --depths]."
    )
    polish: Depths = Field(
        default=[],
        description="Depths to go on training from the scout [default: the one that is chosen by its scores].",
    )
    held_out: HeldOut = 1000
    depths: Annotated[list[str], BeforeValidator(texts), Names("layers")] = Field(
        [],
        description="Instead of a scout: train each of these depths (as for prune --to) and the full model separately.",
    )
    recipes: dict[str, dict[str, Any]] = Field(
        default={"healed": {}},
        description="With --depths: trainings, each done at every depth; none: the cut models are evaluated untrained. "
        "In YAML: name -> options of heal.",
    )
    teacher: Annotated[str | None, BeforeValidator(path_text)] = Field(
        None, description="Model whose vectors are imitated, as heal --teacher; self: the full model of each depth."
    )
    seeds: list[Seed] = Field(default=[], description="Repeat each training with these seeds [default: --seed].")
    profile_scale: float = Field(20.0, gt=0, description="Inverse temperature of the loss that the profile measures.")
    profile_dtype: Dtype = Field("auto", description="Data type of the profile's computation, as profile --dtype.")
    max_examples: int = Field(1280, ge=2, description="Number of pairs used by the profile.")
    depth_scores: bool = Field(False, description="Score the tasks at every depth of the untrained models, too.")
    pooling: Pooling = None
    sample: Sample = None
    cache: Path | None = Field(None, description="Folder that keeps vectors [default: cache in the run folder].")
    jobs: Jobs = 1
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

    jobs: Jobs = 1
    ray: Ray = None


def read_study(run: Path) -> StudyOptions:
    """The options of the study that a run folder holds.

    Raises:
        DataError: It holds none, or its ``study.yaml`` is broken.
        ConfigError: An option in it is not valid.
    """
    if not (run / "study.yaml").is_file():
        raise DataError(run, "holds no study", "name the folder that `secateur study` was given")
    return make(StudyOptions, read_yaml(run / "study.yaml") | {"out": run})
