"""The whole way over one or more models, in one run folder, resumable.

A study is a plan (:mod:`.plan`) that is run (:mod:`.runner`). Each step has a result in the run folder
that is there whole or not at all, so that running the study again, after any interruption, does only what is missing:

    RUN/study.yaml                      the resolved options
    RUN/plan.json                       models, hashes of what is read, steps with their commands and times, variants
    RUN/steps.jsonl                     the journal: what was begun, how it ended, how long it took
    RUN/logs/                           the output of steps that failed, and of those that ran in their own process
    RUN/models/<variant>                models as plain folders: as they came (zero-shot), and trained
    RUN/profiles/<model>/               profile.json, curve.png, choice.json
    RUN/pruned/<model>-<blocks>         cut, not trained
    RUN/scores/<variant>/scores.json    evaluated
    RUN/cache/                          vectors of the evaluations and of teachers
    RUN/costs.json                      counted and timed, all models side by side
    RUN/table.csv                       all of it in one table, a row for each model and task
    RUN/report.html, report.md          the view on all of it
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secateur.choosing.choose import CHOSEN_FROM, choose, losses_fingerprint
from secateur.data.sources import read_sources
from secateur.errors import ConfigError, DataError, StudyFailed
from secateur.evaluation.evaluate import open_tasks
from secateur.evaluation.tasks import expand, identify
from secateur.files import read_json, results_folder, write_text
from secateur.healing.lessons import find_aim, sets_of
from secateur.models import model_label
from secateur.options import STUDY_FILES, EvaluateOptions, StudyOptions, default_of, make, read_study, to_yaml
from secateur.progress import Progress, silent
from secateur.provenance import acting_as, fingerprint_files, is_result_of, versions_of
from secateur.reporting.journal import read_journal
from secateur.reporting.report import report
from secateur.results import Costs, Profile, Scores, Training, load
from secateur.studies.estimate import Amounts, estimate, measure_amounts, measure_base
from secateur.studies.inputs import Inputs, check_inputs, read_inputs
from secateur.studies.plan import NO_TRAINING, Base, Plan, Step, Variant, numbers_of, plan_steps, recipe_settings
from secateur.studies.presets import fill_in
from secateur.studies.runner import (
    Executor,
    Journal,
    State,
    Watch,
    in_processes,
    in_this_process,
    is_locked,
    on_ray,
    run_steps,
    taken_seconds,
)

SETTINGS, PLAN, TABLE = "study.yaml", "plan.json", "table.csv"
CHOICE = "choice.json"
HOW = frozenset({"out", "jobs", "ray"})
"""Options that say how a study is run, not what it is; they may change when it goes on."""


def unwatched(state: State) -> None:
    """Tell nobody."""


def study(
    models: Sequence[str | Path] = (),
    *,
    out: str | Path,
    progress: Progress = silent,
    watch: Watch = unwatched,
    **options: Any,
) -> Path:
    """Profile, choose, prune, heal, evaluate and report; a study that was stopped goes on where it was.

    Args:
        models: Anything :func:`.open_model` opens. None: go on with the study that ``out`` holds.
        out: The run folder.
        progress: Told while a step runs in this process.
        watch: Told how far the study is, at every change.
        **options: ``data``, ``tasks``, ``depths``, ``recipes``, ``seeds``, ``jobs`` and the other fields of
            :class:`.StudyOptions`, the settings of healing among them.

    Returns:
        The report's page.

    Raises:
        StudyFailed: Steps failed; all that does not need them is done, and reported.
        SecateurError: The study cannot be begun as it is described.
    """
    given = _given(models, Path(out), options)
    run = results_folder(out, *STUDY_FILES)
    settings = _settings(run, given, progress)
    outline = _outline(run, settings)
    _check_results(run, settings, outline)
    executor = _executor(settings, progress)
    if not (run / SETTINGS).is_file():  # only now: options that cannot be followed do not claim the folder
        _write_plan(run, settings, outline)
        write_text(run / SETTINGS, to_yaml(settings))
    with Journal.open(run) as journal:

        def replan(failed: Sequence[str]) -> Plan:
            return _write_plan(run, settings, outline, failed)

        failed = run_steps(replan, _is_done, executor, run, journal, watch)
        page = _view(run) if (run / Costs.file).is_file() or any(run.glob(f"*/*/{Scores.file}")) or not failed else None
    if failed:
        raise StudyFailed(run, failed, page)
    assert page is not None
    return page


def plan_study(
    models: Sequence[str | Path] = (), *, out: str | Path, progress: Progress = silent, **options: Any
) -> State:
    """What :func:`study` would do with these options, and what of it is done: nothing is run.

    Nothing is written either, but the demo's data, which have to be there to be counted.

    Raises:
        SecateurError: The study cannot be begun as it is described.
    """
    run = Path(out)
    settings = _settings(run, _given(models, run, options), progress)
    outline = _outline(run, settings)
    _check_results(run, settings, outline)
    plan = _plan(run, settings, outline)
    done = frozenset(step.name for step in plan.steps if step.known and _is_there(step))
    return State(plan, done, {}, {}, taken_seconds(read_journal(run)))


def read_status(run: str | Path) -> State:
    """How far a study is, from what it left in its folder; steps that run are told from those that were stopped.

    Raises:
        DataError: The folder holds no study, or a file of it is broken.
        ConfigError: Its ``study.yaml`` has changed, and says of results that they were made otherwise.
    """
    run = Path(run)
    settings = read_study(run)
    entries = read_journal(run)
    last = {entry["step"]: entry for entry in entries}
    failed = {name: entry["error"] for name, entry in last.items() if entry["outcome"] == "failed"}
    outline = _outline(run, settings, check=False)
    _check_results(run, settings, outline)
    plan = _plan(run, settings, outline, list(failed))
    done = frozenset(step.name for step in plan.steps if step.known and _is_there(step, closely=False))
    names = {step.name for step in plan.steps} - done
    at_work = is_locked(run)
    running = {name: 0.0 for name, entry in last.items() if at_work and entry["outcome"] == "started" and name in names}
    failed = {name: reason for name, reason in failed.items() if name in names - running.keys()} | dict(plan.failed)
    return State(plan, done, running, failed, taken_seconds(entries))


def read_scores(run: str | Path) -> Scores:
    """All scores of a run in one table, in the order in which its models were made."""
    tables = [load(file, Scores) for file in sorted(Path(run).glob(f"scores/*/{Scores.file}"))]
    if not tables:
        raise DataError(run, "holds no scores")
    order = {row.model: i for i, row in enumerate(load(run, Costs).rows)} if (Path(run) / Costs.file).is_file() else {}
    rows = sorted((row for table in tables for row in table.rows), key=lambda row: order.get(row.model, len(order)))
    return Scores(tables[0].provenance, tuple(rows))


def read_variants(run: str | Path) -> tuple[Variant, ...]:
    """The models of a study: which blocks, recipe and seed each of them has, told by ``plan.json``."""
    kept = _read_plan(Path(run))
    if kept is None:
        raise DataError(Path(run) / PLAN, "no such file")
    return kept.variants


# Before ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outline:
    """What a plan needs to know of models and data: measured once, and kept in ``plan.json``.

    ``inputs`` are hashes of what is read; None in the plan of an earlier version, as ``study`` is in :class:`_Kept`.
    """

    bases: tuple[Base, ...]
    amounts: Amounts
    inputs: Inputs | None


@dataclass(frozen=True)
class _Kept:
    """A plan as the folder has it: ``study`` are the options that it was made of, and with it what is there."""

    outline: _Outline
    study: StudyOptions | None
    variants: tuple[Variant, ...]


def _read_plan(run: Path) -> _Kept | None:
    """The plan that an earlier start left.

    Raises:
        DataError: It is broken.
    """
    file = run / PLAN
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        bases = tuple(Base(**base) for base in content["models"])
        study = content.get("study")
        return _Kept(
            _Outline(bases, Amounts(**content["amounts"]), content.get("inputs")),
            None if study is None else make(StudyOptions, study | {"out": run}),
            tuple(map(_variant, content["variants"])),
        )
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        hint = f"missing or unexpected: {error}; remove it, and the study makes it again"
        raise DataError(file, "is not a whole plan", hint) from error


def _variant(item: Mapping[str, Any]) -> Variant:
    blocks = item["blocks"]
    return Variant(**{**item, "specs": tuple(item["specs"]), "blocks": None if blocks is None else tuple(blocks)})


def _given(models: Sequence[str | Path], run: Path, options: Mapping[str, Any]) -> StudyOptions:
    named = {"models": [str(model) for model in models]} if models else {}
    if any(Path(model).resolve() == run.resolve() for model in models):
        # Once there, the run folder would be taken for the model.
        raise ConfigError("out", str(run), "is the name of the model", "name another folder")
    return make(StudyOptions, {**named, "out": run, **options})


def _settings(run: Path, given: StudyOptions, progress: Progress) -> StudyOptions:
    """The options of this run: those given, or those that an earlier start left in the folder; both must agree."""
    file = run / SETTINGS
    how = {key: getattr(given, key) for key in HOW & given.model_fields_set}
    earlier = read_study(run) if file.is_file() else None
    if earlier is not None and given.model_fields_set <= HOW:
        return earlier.model_copy(update=how)
    given = fill_in(given, run, progress)
    given = given.model_copy(update={"tasks": [str(task) for task in expand(given.tasks)]})
    if earlier is not None:
        for key in StudyOptions.model_fields:
            there, here = getattr(earlier, key), getattr(given, key)
            if key not in HOW and _plain(key, there) != _plain(key, here):
                raise ConfigError(key, here, f"is {here} here, but {there} in {file}", "name a new run folder")
        return earlier.model_copy(update=how)
    if not given.models:
        raise ConfigError("models", None, "no model given, and no study to go on with in the run folder")
    return given


def _plain(key: str, value: Any) -> Any:
    """An option to be compared: what is a file or folder may be spelled in several ways."""
    if isinstance(value, list):
        return [_plain(key, item) for item in value]
    is_place = key in ("models", "data", "tasks", "cache") and value is not None and Path(value).exists()
    return Path(value).resolve() if is_place else value


def _outline(run: Path, settings: StudyOptions, *, check: bool = True) -> _Outline:
    """As the run has it, else measured, when all of the study has been found to be possible.

    Raises:
        DataError: What the study reads is not what it began with; not looked at without ``check``.
    """
    kept = _read_plan(run) if (run / SETTINGS).is_file() else None
    if kept is not None and not check:
        return kept.outline
    inputs = read_inputs(settings)
    if kept is not None:
        check_inputs(kept.outline.inputs or {}, inputs)
        if kept.study is None or not _differing(kept.study, settings):
            return replace(kept.outline, inputs=kept.outline.inputs or inputs)
    names = _names(settings.models)
    if not settings.data:
        raise ConfigError("data", None, "no data to profile and heal with", "give --data FILE")
    sources = read_sources(settings.data, columns=settings.columns)
    for name, recipe in recipe_settings(settings).items():
        if name != NO_TRAINING:
            aim = find_aim(sources, taught="teacher" in recipe, teacher_weight=recipe.get("teacher_weight"))
            sets_of(sources, numbers_of(recipe).batch_size, aim)
    if settings.tasks:
        open_tasks(settings.tasks, settings.sample, settings.seed)
    bases = tuple(measure_base(name, model) for name, model in zip(names, settings.models, strict=True))
    known = kept.outline.inputs or {} if kept is not None else {}
    outline = _Outline(bases, measure_amounts(settings, sources), {**inputs, **known})
    plan_steps(settings, outline.bases, {})
    return outline


def _differing(one: StudyOptions, other: StudyOptions) -> list[str]:
    """Options that are not the same."""
    fields = StudyOptions.model_fields.keys() - HOW
    return [key for key in StudyOptions.model_fields if key in fields and getattr(one, key) != getattr(other, key)]


def _check_results(run: Path, settings: StudyOptions, outline: _Outline) -> None:
    """Refuse an edited study.yaml that says of results which are there that they were made otherwise.

    Models, depths, recipes, seeds and tasks may come or go: that changes no result, as long as its own options stay.

    Raises:
        ConfigError: They were.
    """
    kept = _read_plan(run) if (run / SETTINGS).is_file() else None
    if kept is None or kept.study is None or not (differing := _differing(kept.study, settings)):
        return
    before = {step.name: step for step in _plan(run, kept.study, kept.outline).steps}
    changed: dict[str, str] = {}
    for step in _plan(run, settings, outline).steps:
        old = before.get(step.name)
        lost = changed.keys() & set(step.needs)
        if lost or (old is not None and _asks_otherwise(old, step)):
            changed[step.name] = step.makes
    there = [str(Path(made).relative_to(run)) for made in changed.values() if Path(made).exists()]
    if there:
        what = f"changed in {run / SETTINGS} since {', '.join(there)} {'were' if len(there) > 1 else 'was'} made"
        hint = "change it back, name a new run folder for the changed study, or remove these results"
        raise ConfigError(", ".join(differing), None, what, hint)


def _asks_otherwise(old: Step, new: Step) -> bool:
    """Whether a step's result would be another one now; scores of more tasks are added to those that are there."""
    if new.kind == "cost":  # made again where its models are others
        return False
    if new.kind == "evaluate" and set(old.options["tasks"]) <= set(new.options["tasks"]):
        return {**old.options, "tasks": ()} != {**new.options, "tasks": ()}
    if new.kind == "heal":  # what is cut may lie elsewhere, as a model of the study with the recipe none
        return {**old.options, "model": "", "cache": ""} != {**new.options, "model": "", "cache": ""}
    return old.options != new.options


def _names(models: Sequence[str]) -> list[str]:
    """What each model is called in the run folder."""
    names = [model_label(model) for model in models]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError("models", models, f"two models are called {twice[0]}", "rename one of the folders")
    return names


def _executor(settings: StudyOptions, progress: Progress) -> Executor:
    if settings.ray is not None:
        return on_ray(settings.ray, settings.jobs)
    return in_this_process(progress) if settings.jobs == 1 else in_processes(settings.jobs)


# While it runs --------------------------------------------------------------------------------------------------------


def _plan(run: Path, settings: StudyOptions, outline: _Outline, failed: Sequence[str] = ()) -> Plan:
    """The plan as far as the profiles that are there decide it, with estimated times."""
    there = [base.name for base in outline.bases if (run / "profiles" / base.name / "curve.png").is_file()]
    profiles = {name: load(run / "profiles" / name, Profile) for name in there}
    plan = plan_steps(settings, outline.bases, profiles, failed)
    seconds = estimate(plan, outline.bases, outline.amounts)
    return replace(plan, steps=tuple(replace(step, seconds=seconds[step.name]) for step in plan.steps))


def _write_plan(run: Path, settings: StudyOptions, outline: _Outline, failed: Sequence[str] = ()) -> Plan:
    """Make the plan, and keep it where it is new; with it, what each profile chooses."""
    plan = _plan(run, settings, outline, failed)
    for base in outline.bases:
        _write_choice(run / "profiles" / base.name)
    models: dict[str, Any] = {"models": [asdict(base) for base in outline.bases]}
    models |= {
        "amounts": asdict(outline.amounts),
        "inputs": outline.inputs,
        "study": settings.model_dump(mode="json", exclude=set(HOW)),
    }
    text = json.dumps(models | plan.to_dict(), indent=1, ensure_ascii=False) + "\n"
    file = run / PLAN
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)
    return plan


def _write_choice(folder: Path) -> None:
    if (folder / "curve.png").is_file():
        measured = load(folder, Profile)
        file = folder / CHOICE
        if measured.can_choose:
            text = json.dumps(choose(measured) | {CHOSEN_FROM: losses_fingerprint(measured)}) + "\n"
            if not (file.is_file() and file.read_text(encoding="utf-8") == text):
                write_text(file, text)


def _is_done(step: Step) -> bool:
    """Whether what a step makes is there; what a killed one left beside it goes."""
    done = _is_there(step)
    if done and step.kind in ("prune", "heal"):
        made = Path(step.makes)
        shutil.rmtree(made.with_name(made.name + ".partial"), ignore_errors=True)
    return done


def _is_there(step: Step, *, closely: bool = True) -> bool:
    """Whether what a step makes is there, and is of the models, tasks and versions of now.

    Without ``closely``, models are taken to be those that were measured: reading all weights takes minutes.
    """
    made = Path(step.makes)
    if not made.exists():
        return False
    if step.kind not in ("cost", "evaluate"):
        return True
    inputs: dict[str, dict[str, Any]] = {}
    for model in map(Path, step.options["models"]):
        inputs[model.name] = {"versions": versions_of()} | ({"files": fingerprint_files(model)} if closely else {})
    if step.kind == "cost":
        costs = {row.model: row for row in load(made, Costs).rows}
        return costs.keys() == inputs.keys() and all(is_result_of(costs[name], of) for name, of in inputs.items())
    tasks = step.options["tasks"]
    scores = {(row.model, row.task): row for row in load(made, Scores).rows}  # those of the tasks so far
    asked = {
        "sample": step.options.get("sample"),
        "seed": step.options.get("seed", default_of(EvaluateOptions, "seed")),
    }
    known = [found for task in tasks if (found := identify(task)) is not None]
    return len(scores) >= len(tasks) * len(inputs) and all(
        is_result_of(scores.get((model, task)), asked | of | {"data": data})
        for model, of in inputs.items()
        for task, data in known
    )


# After ----------------------------------------------------------------------------------------------------------------


def _view(run: Path) -> Path:
    write_text(run / TABLE, _as_csv(join_tables(run)))
    with acting_as(f"secateur report {shlex.quote(str(run))}"):
        return report(run)


def join_tables(run: str | Path) -> list[dict[str, Any]]:
    """All that a study found out, joined: one flat row for each variant and task, as ``table.csv`` has it.

    A row has the model, which ``blocks`` of its ``depth`` it keeps, the ``specs`` of the study that lead there, recipe
    and seed, the score with its interval, and the costs. A variant without tasks has one row without a score. Group by
    all but ``seed`` to average over seeds.
    """
    run = Path(run)
    costs = {row.model: row for row in load(run, Costs).rows} if (run / Costs.file).is_file() else {}
    rows: list[dict[str, Any]] = []
    for variant in read_variants(run):
        file = run / "models" / variant.name / Training.file
        training = load(file, Training) if file.is_file() else None
        what = {"model": variant.base, "variant": variant.name, "depth": variant.depth}
        what |= {"kept": None if variant.blocks is None else len(variant.blocks), "specs": " ".join(variant.specs)}
        what |= {"blocks": None if variant.blocks is None else " ".join(map(str, variant.blocks))}
        what |= {"recipe": variant.recipe, "seed": variant.seed, "steps": training.steps if training else None}
        what |= {"train_seconds": round(training.seconds, 1) if training else None}
        cost = costs.get(variant.name)
        price = {name: getattr(cost, name, None) for name in _COSTS}
        scores = run / "scores" / variant.name / Scores.file
        scored = load(scores, Scores).to_dicts() if scores.is_file() else [{}]
        rows += [what | {name: row.get(name) for name in _SCORES} | price for row in scored]
    return rows


_SCORES = ("task", "type", "metric", "score", "low", "high", "samples", "sample")
_COSTS = (
    *("parameters", "embedding_parameters", "bytes", "memory_bytes", "flops_per_token"),
    *("texts_per_second", "long_texts_per_second", "latency_p50", "latency_p95"),
)


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
