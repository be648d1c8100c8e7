"""The whole way over one or more models, in one run folder, resumable.

A study is a plan (:mod:`.plan`) that is run (:mod:`.runner`). Each step has an output in the run folder that is there
whole or not at all, and a record of what it was made from, so that running the study again, after any interruption,
does only what is missing:

    RUN/study.yaml                      the resolved options
    RUN/plan.json                       the models, and the steps with their commands and times
    RUN/steps.jsonl                     the journal: what was begun, how it ended, how long it took
    RUN/done/<step>.json                what each output was made from
    RUN/logs/                           the output of steps that failed, and of those that ran in their own process
    RUN/profiles/<model>/               profile.json, curve.png, choice.json
    RUN/scouts/<model>/                 model, scout.json, frontier.png, choice.json, tasks of held-out rows
    RUN/models/<variant>                models as plain folders: as they came (zero-shot), and trained
    RUN/pruned/<model>-<depth>          cut, not trained
    RUN/trained/<variant>               trained, before the vocabulary is cut
    RUN/scores/<variant>/scores.json    evaluated
    RUN/cache/                          vectors of the evaluations and of teachers
    RUN/costs.json                      counted and timed, all models side by side
    RUN/table.csv                       all of it in one table, a row for each model and task
    RUN/report.html, report.md          the report
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, TypeAdapter

from secateur.choosing.budgets import choose_rung
from secateur.choosing.choose import CHOSEN, CHOSEN_FROM, choose, losses_fingerprint
from secateur.data.embedders import open_embedder
from secateur.data.sources import Texts, check_data, read_sources
from secateur.errors import ConfigError, DataError, OutputError, SecateurError, StudyFailed
from secateur.evaluation.tasks import expand, open_tasks
from secateur.files import lock, make_folder, read_json, results_folder, write_text
from secateur.healing.recipes import training_config
from secateur.healing.training_data import training_sets
from secateur.models import is_endpoint, model_label, resolve
from secateur.options import STUDY_FILES, StudyOptions, read_study, step, to_yaml
from secateur.progress import Progress, silent
from secateur.provenance import acting_as
from secateur.reporting.report import report
from secateur.reporting.run import CHOICE, PLAN, TRIMMED, UNTRAINED, read_journal, read_run, read_scout
from secateur.reporting.verdict import coverage_notes
from secateur.results import Costs, Origin, Profile, Scores, load
from secateur.scouting.held_out import draw
from secateur.studies import runner
from secateur.studies.demo import demo_study
from secateur.studies.estimate import Amounts, estimate, measure_amounts, measure_base
from secateur.studies.plan import BY_TASKS, ITSELF, NO_TRAINING, SCOUTS, first_scout, plan_steps, recipe_options
from secateur.studies.runner import RECORDS, Scheduler, is_done, taken_seconds
from secateur.studies.steps import LAST, MODELS, Base, Plan, State, Step

SETTINGS, TABLE = "study.yaml", "table.csv"
HOW = frozenset({"out", "jobs", "ray"})
"""Options that say how a study is run, not what it is; they may change when it goes on."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {  # the experiments of L3Prune, arXiv 2410.14578, sections 4 and 5; the data are left to the user
        "models": [
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "mistralai/Mistral-7B-Instruct-v0.2",
            "Qwen/Qwen2-7B-Instruct",
            "microsoft/Phi-3-mini-4k-instruct",
        ],
        "depths": ["large", "small", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"],
        "tasks": ["MTEB(eng, v1)"],
        "pooling": "weighted_mean",
        "recipe": "l3prune",
        "gradient_checkpointing": True,
    },
    "shrink": {"teacher": ITSELF},
}
"""Options that a preset decides, where the user has not; the demo's come with its data."""


@step(StudyOptions)
def study(
    options: StudyOptions, *, progress: Progress = silent, callback: Callable[[State], None] = lambda _: None
) -> Path:
    """Profile, scout, choose, polish, evaluate and report; a study that was stopped goes on where it was.

    Without any options but ``out``, ``jobs`` and ``ray``, it goes on with the study that ``out`` holds.

    Returns:
        The report's page.

    Raises:
        StudyFailed: Steps failed; all that does not depend on them is done, and reported.
        SecateurError: The study cannot be begun as it is described.
    """
    out = options.out.resolve()
    if any(Path(model).resolve() in (out, *out.parents) for model in options.models):
        # Once there, the run folder would be taken for the model.
        raise ConfigError("out", str(options.out), "is the name of the model, or lies in it", "name another folder")
    run = results_folder(options.out, *STUDY_FILES)
    outline = _prepare(options, progress)
    with lock(make_folder(run / RECORDS), of=options.out):
        jobs, address = outline.study.jobs, outline.study.ray
        executor = runner.in_this_process(progress) if jobs == 1 else runner.in_processes(jobs)
        if address is not None:
            executor = runner.on_ray(address, jobs)
        if not (run / SETTINGS).is_file():  # only now: options that cannot be followed do not claim the folder
            _make_plan(outline, keep=True)
            write_text(run / SETTINGS, to_yaml(outline.study))
        failed = Scheduler(run, lambda failed: _make_plan(outline, failed, keep=True), executor, callback).go()
        page = None
        if not failed or (run / Costs.file).is_file() or any(run.glob(f"*/*/{Scores.file}")):
            page = _write_view(run)
    if failed or page is None:
        raise StudyFailed(run, failed, page)
    return page


@step(StudyOptions)
def plan_study(options: StudyOptions, *, progress: Progress = silent) -> State:
    """What :func:`study` would do with these options, and what of it is done: nothing is run.

    Nothing is written either, but the demo's data, which have to be there to be counted.

    Raises:
        SecateurError: The study cannot be begun as it is described.
    """
    plan = _make_plan(_prepare(options, progress))
    done = [step.name for step in plan.steps if is_done(step, plan, options.out)]
    return State(plan, done, failed=plan.failed, seconds=taken_seconds(read_journal(options.out)), slots=options.jobs)


def read_status(run: str | Path) -> State:
    """How far a study is, from what it left in its folder; steps that run are told from those that were stopped.

    What is there counts as done: whether it is still of the present options and files is looked at when the study goes
    on, or is planned.

    Raises:
        DataError: The folder holds no study, or a file of it is broken.
    """
    run = Path(run)
    settings, kept, entries = read_study(run), _read_plan(run), read_journal(run)
    last = {entry["step"]: entry for entry in entries}
    failed = {name: entry["error"] for name, entry in last.items() if entry["outcome"] == "failed"}
    plan = _make_plan(_Outline(settings, kept["models"], kept["amounts"]), failed)
    done: set[str] = set()
    for planned in plan.steps:
        if planned.output.exists() and planned.name not in failed and done.issuperset(planned.depends_on):
            done.add(planned.name)
    left = {step.name for step in plan.steps} - done
    begun = {name: entry["started"] for name, entry in last.items() if entry["outcome"] == "started" and name in left}
    begun = begun if _is_locked(run / RECORDS) else {}
    running = {name: datetime.fromisoformat(started).timestamp() for name, started in begun.items()}
    failed = {name: reason for name, reason in failed.items() if name in left} | plan.failed
    return State(plan, done, running, failed, taken_seconds(entries), settings.jobs)


def _is_locked(folder: Path) -> bool:
    try:
        with lock(folder):
            return False
    except OutputError:
        return folder.exists()


# Before it runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outline:
    """What a plan is made of: the options, the models' sizes, and the amount of data."""

    study: StudyOptions
    bases: tuple[Base, ...]
    amounts: Amounts


def _prepare(given: StudyOptions, progress: Progress) -> _Outline:
    """The options of this run and what was measured for it, when the study has been found to be possible.

    ``plan.json`` keeps both, so that nothing needs to be checked again while the options stay.
    """
    run, settings = given.out, _settings(given, progress)
    kept = _read_plan(run) if (run / SETTINGS).is_file() and (run / PLAN).is_file() else {}
    same = kept.get("study") == _what(settings)
    outline = _Outline(settings, kept["models"], kept["amounts"]) if same else _check_and_measure(settings)
    runner.check_done(_make_plan(outline), run)
    return outline


def _settings(given: StudyOptions, progress: Progress) -> StudyOptions:
    """The options of this run: those that an earlier start left in the folder, with which those given must agree."""
    if (given.out / SETTINGS).is_file():
        earlier = read_study(given.out)
        for key in sorted(given.model_fields_set - HOW):
            there, here = getattr(earlier, key), getattr(given, key)
            if _plain(key, there) != _plain(key, here):
                problem = f"is {here} here, but {there} in {given.out / SETTINGS}"
                raise ConfigError(key, here, problem, "name a new run folder")
        return earlier.model_copy(update={key: getattr(given, key) for key in HOW & given.model_fields_set})
    if given.preset == "demo":
        given = demo_study(given, given.out, progress)
    decided = PRESETS.get(given.preset or "", {})
    given = given.model_copy(update={key: v for key, v in decided.items() if key not in given.model_fields_set})
    if not given.models:
        raise ConfigError("models", None, "no model given, and no study to go on with in the run folder")
    return given.model_copy(update={"tasks": [str(task) for task in expand(given.tasks)]})


def _plain(key: str, value: Any) -> Any:
    """An option to be compared: a file or folder may be spelled in several ways, a benchmark stands for its tasks."""
    if isinstance(value, list):
        return [_plain(key, item) for item in (expand(value) if key == "tasks" else value)]
    places = ("models", "baselines", "data", "tasks", "vocab", "cache")
    is_place = key in places and value is not None and Path(value).exists()
    return str(Path(value).resolve()) if is_place else value


def _check_and_measure(settings: StudyOptions) -> _Outline:
    """Look at all that a study reads, and refuse one that cannot be done."""
    names = [model_label(model) for model in (*settings.models, *settings.baselines)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("models", settings.models, f"two models are called {name}", "rename one of the folders")
    if not settings.data:
        raise ConfigError("data", None, "no data to profile and heal with", "give --data FILE")
    sources = read_sources(settings.data, columns=settings.columns)
    if settings.vocab:
        check_data(settings.vocab, settings.columns)
    texts_alone = all(isinstance(source, Texts) for source in sources)
    if texts_alone and not settings.depths:
        settings = settings.model_copy(update={"teacher": settings.teacher or ITSELF})
        if settings.teacher == ITSELF and settings.layers is None:
            settings = settings.model_copy(update={"layers": "uniform"})
    for name, recipe in recipe_options(settings).items():
        if name != NO_TRAINING:
            training_sets(sources, training_config(recipe, sources))
            if recipe.teacher not in (None, ITSELF) and not is_endpoint(recipe.teacher):
                resolve(recipe.teacher)
    if settings.tasks:
        open_tasks(settings.tasks, settings.sample, settings.seed)
    elif settings.depth_scores or BY_TASKS in settings.depths:
        name = "depth_scores" if settings.depth_scores else "depths"
        raise ConfigError(name, getattr(settings, name), "asks for scores at every depth", "give --tasks, too")
    for baseline in settings.baselines:  # whether it is there, and its key is right, is known before hours of work
        open_embedder(baseline).encode("a text", show_progress_bar=False)
    cuts = settings.cuts_vocabulary
    bases = tuple(measure_base(name, model, cuts) for name, model in zip(names, settings.models, strict=False))
    plan_steps(settings, bases, {}, {})
    if not (settings.depths or settings.tasks):
        draw(sources, settings.held_out, settings.seeds[0] if settings.seeds else settings.seed)
    return _Outline(settings, bases, measure_amounts(settings, sources))


def _what(settings: StudyOptions) -> dict[str, Any]:
    """The options that say what a study is, as JSON has them."""
    return settings.model_dump(mode="json", exclude=set(HOW))


_KEPT = TypeAdapter(tuple[Annotated[tuple[Base, ...], Field(min_length=1)], Amounts])


def _read_plan(run: Path) -> dict[str, Any]:
    """``plan.json`` of an earlier start (DataError if it is missing or broken)."""
    file, again = run / PLAN, f"secateur study resume {shlex.quote(str(run))} makes it again"
    if not file.exists():
        raise DataError(file, "no such file", again)
    try:
        content = read_json(file)
        models, amounts = _KEPT.validate_json(json.dumps([content["models"], content["amounts"]]), strict=True)
        return {"models": models, "amounts": amounts, "study": content["study"]}
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(file, "is not a whole plan", f"remove it: {again}") from error


def _make_plan(outline: _Outline, failed: Collection[str] = (), *, keep: bool = False) -> Plan:
    """The plan as far as the profiles and scouts that are there decide it, with estimated times.

    With ``keep`` it is written to the run folder, and what each profile and scout chooses.
    """
    study, run, notes = outline.study, outline.study.out, []
    profiles, scouts = {}, {}
    for base in outline.bases:
        measured, first = run / "profiles" / base.name, first_scout(study, base)
        if (measured / LAST["profile"]).is_file():
            profiles[base.name] = load(measured, Profile)
        if (run / SCOUTS / first / LAST["scout"]).is_file():
            scouts[first] = read_scout(run / SCOUTS / first)
        trimmed = run / MODELS / f"{base.name}-{base.depth}-{TRIMMED}"
        cut = load(trimmed, Origin).vocabulary if (trimmed / Origin.file).is_file() else None
        notes += coverage_notes(base.name, cut) if cut else []
    finished = [file.parent for file in sorted(run.glob(f"{MODELS}/*/{Origin.file}"))]
    plan = plan_steps(study, outline.bases, profiles, scouts, failed, finished)
    plan.steps = [replace(step, seconds=estimate(step, plan, outline.amounts)) for step in plan.steps]
    plan.notes = notes
    if keep:
        choices: dict[Path, dict[str, Any]] = {}
        for name, profile in profiles.items():
            if profile.can_choose:
                choices[run / "profiles" / name] = choose(profile) | {CHOSEN_FROM: losses_fingerprint(profile)}
        for name, scout in scouts.items():
            try:
                choices[run / SCOUTS / name] = {CHOSEN: len(choose_rung(study, scout).blocks)}
            except SecateurError:  # its plan says why there is no choice; an earlier one is none, either
                (run / SCOUTS / name / CHOICE).unlink(missing_ok=True)
        for folder, choice in choices.items():
            _write_anew(folder / CHOICE, json.dumps(choice))
        content = {"models": [asdict(base) for base in outline.bases], "amounts": asdict(outline.amounts)}
        content |= {"study": _what(study), "steps": [_told(step) for step in plan.steps]}
        _write_anew(run / PLAN, json.dumps(content, indent=1, ensure_ascii=False))
    return plan


def _told(step: Step) -> dict[str, Any]:
    told = {"name": step.name, "command": step.command_line, "output": str(step.output), "seconds": step.seconds}
    return told | {"depends_on": step.depends_on}


def _write_anew(file: Path, text: str) -> None:
    """Write a line or more, where the file does not hold them already."""
    if not (file.is_file() and file.read_text(encoding="utf-8") == text + "\n"):
        write_text(file, text + "\n")


# Its results ----------------------------------------------------------------------------------------------------------

_SCORES = ("task", "type", "metric", "score", "low", "high", "samples", "sample")
_COSTS = (
    *("parameters", "embedding_parameters", "bytes", "memory_bytes", "flops_per_token"),
    *("texts_per_second", "long_texts_per_second", "latency_p50", "latency_p95"),
)


def read_scores(run: str | Path) -> Scores:
    """All scores of a run in one table, in the order in which its models were made."""
    tables = [load(file, Scores) for file in sorted(Path(run).glob(f"scores/*/{Scores.file}"))]
    if not tables:
        raise DataError(run, "holds no scores")
    order = [row.model for row in load(run, Costs).rows] if (Path(run) / Costs.file).is_file() else []
    rows = [row for table in tables for row in table.rows]
    rows.sort(key=lambda row: order.index(row.model) if row.model in order else len(order))
    return Scores(tables[0].provenance, tuple(rows))


def join_tables(run: str | Path) -> list[dict[str, Any]]:
    """All results of a study, joined: one flat row for each model and task, as ``table.csv`` has it.

    A row has the base model, which of its ``depth`` layers are kept (``blocks``), recipe and seed, steps and seconds of
    its last training, how its vocabulary was cut (``tokens`` to ``unknown_tokens``, empty where it was not), the score
    with its interval, and the costs. A model without scores has one row. Group by all but ``seed`` to average over
    seeds.
    """
    rows: list[dict[str, Any]] = []
    for variant in read_run(run).variants:
        training, origin, cut = variant.training, variant.origin, variant.vocabulary
        what: dict[str, Any] = {
            "model": variant.base,
            "variant": variant.name,
            "depth": variant.blocks,
            "kept": variant.depth,
            "blocks": " ".join(map(str, origin.kept)) if origin else None,
            "recipe": NO_TRAINING if variant.recipe in (UNTRAINED, TRIMMED) else variant.recipe,
            "seed": variant.seed,
            "steps": training and training.steps,
            "train_seconds": training and round(training.seconds, 1),
            "tokens": cut and cut.row.tokens,
            "of_tokens": cut and cut.tokens,
            "vocabulary_from": cut and " ".join(cut.files),
            "coverage": cut and cut.row.coverage,
            "changed_texts": cut and cut.row.changed,
            "tokens_per_text": cut and cut.row.tokens_per_text,
            "tokens_per_text_before": cut and cut.tokens_per_text,
            "unknown_tokens": cut and cut.row.unknown,
        }
        cost = {key: getattr(variant.cost, key, None) for key in _COSTS}
        for score in variant.scores.values() or (None,):
            rows.append(what | {key: getattr(score, key, None) for key in _SCORES} | cost)
    return rows


def _write_view(run: Path) -> Path:
    """``table.csv`` and the report."""
    table = pd.DataFrame(join_tables(run), dtype=object)  # whole numbers stay whole
    write_text(run / TABLE, table.to_csv(index=False, lineterminator="\n"))
    with acting_as(f"secateur report {shlex.quote(str(run))}"):
        return report(run)
