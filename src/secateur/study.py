"""The whole way over one or more models, in one run folder, resumable.

A study is a list of steps. Each has a result in the run folder that is there whole or not at all, so that running the
study again, after any interruption, does only what is missing:

    RUN/study.yaml                      the resolved options
    RUN/models/<base>-<depth>-zero-shot the model as it came, as a plain folder
    RUN/profiles/<base>/                profile.json, curve.png, choice.json
    RUN/pruned/<base>-<depth>           the first blocks
    RUN/models/<base>-<depth>-healed    trained
    RUN/scores/<variant>/scores.json    evaluated
    RUN/costs.json                      counted and timed, all models side by side
    RUN/report.html, report.md          the view on all of it
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.artifacts import Costs, Profile, Scores, acting_as, load, results_folder, write_text
from secateur.blocks import depth_of
from secateur.choose import choose, needs_profile, target_depth
from secateur.config import HealSettings, StudyOptions, make, read_yaml, to_yaml
from secateur.cost import cost
from secateur.data import read_pairs
from secateur.demo import demo_study
from secateur.errors import ConfigError, DataError
from secateur.evaluate import evaluate
from secateur.heal import heal
from secateur.models import model_label, open_model
from secateur.profile import profile
from secateur.progress import Progress, silent
from secateur.prune import prune
from secateur.recipe import L3PRUNE, make_recipe
from secateur.report import report
from secateur.tasks import open_task
from secateur.train import training_sets

SETTINGS = "study.yaml"
CURVE, CHOICE = "curve.png", "choice.json"
FOLDERS = ("data", "tasks", "models", "profiles", "pruned", "scores", "figures")
OWN = (SETTINGS, *FOLDERS, Costs.file, "report.html", "report.md")


def study(
    models: Sequence[str | Path] = (),
    *,
    out: str | Path,
    progress: Progress = silent,
    **options: Any,
) -> Path:
    """Profile, choose, prune, heal, evaluate and report; a study that was stopped goes on where it was.

    Args:
        models: Anything :func:`secateur.models.open_model` opens. None: go on with the study that ``out`` holds.
        out: The run folder.
        progress: Told while a step runs.
        **options: ``data``, ``tasks``, ``depths``, ``sample`` and the other fields of
            :class:`secateur.config.StudyOptions`, the settings of healing among them.

    Returns:
        The report's page.

    Raises:
        SecateurError: Whatever a step raises; what is finished stays.
    """
    run = results_folder(out, *OWN)
    named = {"models": [str(model) for model in models]} if models else {}
    settings = _settings(run, make(StudyOptions, {**named, "out": run, **options}), progress)
    names = _base_names(settings.models)
    depths = _check(run, names, settings)
    if not (run / SETTINGS).is_file():  # only now: options that cannot be followed do not claim the folder
        write_text(run / SETTINGS, to_yaml(settings))
    variants: dict[str, Path] = {}
    for name, model in names.items():
        variants |= _make_models(run, name, model, depths[name], settings, progress)
    for variant, folder in variants.items():
        _score(run, variant, folder, settings, progress)
    _cost(run, variants, progress)
    with acting_as(f"secateur report {shlex.quote(str(run))}"):
        return report(run)


def read_scores(run: str | Path) -> Scores:
    """All scores of a run in one table, in the order in which its models were made."""
    tables = [load(file, Scores) for file in sorted(Path(run).glob(f"scores/*/{Scores.file}"))]
    if not tables:
        raise DataError(run, "holds no scores")
    order = {row.model: i for i, row in enumerate(load(run, Costs).rows)} if (Path(run) / Costs.file).is_file() else {}
    rows = sorted((row for table in tables for row in table.rows), key=lambda row: order.get(row.model, len(order)))
    return Scores(tables[0].provenance, tuple(rows))


def _settings(run: Path, given: StudyOptions, progress: Progress) -> StudyOptions:
    """The options of this run: those given, or those that an earlier start left in the folder; both must agree."""
    file = run / SETTINGS
    earlier = make(StudyOptions, read_yaml(file) | {"out": run}) if file.is_file() else None
    if earlier is not None and given.model_fields_set <= {"out"}:
        return earlier
    if given.preset == "demo":
        given = demo_study(given, run, progress)
    if earlier is not None:
        for key in StudyOptions.model_fields:
            there, here = getattr(earlier, key), getattr(given, key)
            if there != here and key != "out":
                raise ConfigError(key, here, f"is {here} here, but {there} in {file}", "name a new run folder")
        return earlier
    if not given.models:
        raise ConfigError("models", None, "no model given, and no study to go on with in the run folder")
    return given


def _check(run: Path, names: Mapping[str, str], settings: StudyOptions) -> dict[str, int]:
    """Find out before hours of work whether all of it can be done; how many blocks each model has."""
    if not settings.data:
        raise ConfigError("data", None, "no data to profile and heal with", "give --data FILE")
    recipe = make_recipe(settings.recipe or L3PRUNE, batch_size=settings.batch_size)
    training_sets([read_pairs(file) for file in settings.data], recipe.batch_size)
    for task in settings.tasks:
        open_task(task, sample=settings.sample, seed=settings.seed)
    depths = {name: _depth(run, name, model) for name, model in names.items()}
    for to, depth in itertools.product(settings.depths, depths.values()):
        if not needs_profile(to):
            target_depth(to, depth)
    return depths


def _depth(run: Path, name: str, model: str) -> int:
    """How many blocks a model has: told by its folder in the run, where it is there already."""
    found = (re.fullmatch(rf"{re.escape(name)}-(\d+)-zero-shot", path.name) for path in run.glob("models/*"))
    return next((int(match[1]) for match in found if match), 0) or depth_of(
        open_model(model, device="cpu")[0].auto_model
    )


def _base_names(models: Sequence[str]) -> dict[str, str]:
    names = [model_label(model) for model in models]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError("models", models, f"two models are called {twice[0]}", "rename one of the folders")
    return dict(zip(names, models, strict=True))


def _make_models(
    run: Path, name: str, model: str, depth: int, settings: StudyOptions, progress: Progress
) -> dict[str, Path]:
    """The model as it came, profiled, and healed at its full and each chosen depth: variant → folder."""
    full = _as_it_came(run, name, model, depth, settings, progress)
    variants = {full.name: full}
    chosen = _choose(run, name, full, settings, progress)
    for kept in sorted({depth, *(target_depth(to, depth, chosen) for to in settings.depths)}, reverse=True):
        source = full if kept == depth else _prune(run, name, full, kept, progress)
        folder = run / "models" / f"{name}-{kept}-healed"
        if not _is_done(folder):
            with acting_as(_heal_command(source, folder, settings)):
                heal(
                    source,
                    settings.data,
                    **_heal_settings(settings),
                    out=folder,
                    progress=_named(progress, folder.name),
                )
        variants[folder.name] = folder
    return variants


def _as_it_came(run: Path, name: str, model: str, depth: int, settings: StudyOptions, progress: Progress) -> Path:
    folder = run / "models" / f"{name}-{depth}-zero-shot"
    if not _is_done(folder):
        pooling = ["--pooling", settings.pooling] if settings.pooling else []
        with acting_as(shlex.join(["secateur", "prune", model, "--to", str(depth), *pooling, "-o", str(folder)])):
            prune(model, depth, pooling=settings.pooling, out=folder, progress=_named(progress, folder.name))
    return folder


def _is_done(folder: Path) -> bool:
    """Whether a step's model is there; what a killed step left beside it goes."""
    if folder.exists():
        shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    return folder.exists()


def _choose(run: Path, name: str, full: Path, settings: StudyOptions, progress: Progress) -> Profile:
    folder = run / "profiles" / name
    if not (folder / CURVE).is_file():  # the last file that a profile writes
        words = ["secateur", "profile", full, "--data", *settings.data, "--scale", settings.profile_scale]
        words += ["--max-examples", settings.max_examples, "--seed", settings.seed, "-o", folder]
        with acting_as(shlex.join(map(str, words))):
            profile(
                full,
                settings.data,
                scale=settings.profile_scale,
                max_examples=settings.max_examples,
                seed=settings.seed,
                out=folder,
                progress=_named(progress, f"profile {name}"),
            )
    measured = load(folder, Profile)
    if measured.depth > 1 and not (folder / CHOICE).is_file():
        write_text(folder / CHOICE, json.dumps(choose(measured)) + "\n")
    return measured


def _prune(run: Path, name: str, full: Path, kept: int, progress: Progress) -> Path:
    folder = run / "pruned" / f"{name}-{kept}"
    if not _is_done(folder):
        with acting_as(shlex.join(["secateur", "prune", str(full), "--to", str(kept), "-o", str(folder)])):
            prune(full, kept, out=folder, progress=_named(progress, f"prune to {kept}"))
    return folder


def _heal_settings(settings: StudyOptions) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in HealSettings.model_fields}


def _heal_command(source: Path, folder: Path, settings: StudyOptions) -> str:
    """The training as a command of its own; options at their defaults are left out."""
    words = ["secateur", "heal", str(source), "--data", *map(str, settings.data)]
    for name, field in HealSettings.model_fields.items():
        value = getattr(settings, name)
        if value != field.default:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join([*words, "-o", str(folder)])


def _score(run: Path, variant: str, folder: Path, settings: StudyOptions, progress: Progress) -> None:
    if not settings.tasks:
        return
    out = run / "scores" / variant
    words = ["secateur", "evaluate", str(folder), "--tasks", *settings.tasks, "--seed", str(settings.seed)]
    words += ["--sample", str(settings.sample)] if settings.sample else []
    with acting_as(shlex.join([*words, "-o", str(out)])):
        evaluate(
            [folder],
            settings.tasks,
            sample=settings.sample,
            seed=settings.seed,
            names=[variant],
            out=out,
            progress=_named(progress, f"evaluate {variant}"),
        )


def _cost(run: Path, variants: dict[str, Path], progress: Progress) -> None:
    file = run / Costs.file
    if not file.is_file() or {row.model for row in load(file, Costs).rows} != set(variants):
        cost(variants, progress=progress).save(run)


def _named(progress: Progress, name: str) -> Progress:
    """Progress under one name, whatever the step calls its work."""

    def named(_: str, done: int, total: int) -> None:
        progress(name, done, total)

    return named
