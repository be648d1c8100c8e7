"""One short training of several depths at once, and what each of them is then worth: the evidence to choose on.

    OUT/model          the trained model, at full depth; k of its layers (by default the first) are the model at depth k
    OUT/tasks          held-out rows of the data as task folders, where no tasks were given
    OUT/draws          the score of each task at each depth, with its bootstrap replicates
    OUT/scout.json     the table of all
    OUT/frontier.png   score against depth

Each is there whole or not at all, and kept when the same command runs again; the pictures come last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from secateur.choosing.budgets import choose_rung, tolerance_of
from secateur.data.sources import Source, read_sources
from secateur.errors import ModelError
from secateur.evaluation.tasks import Task, open_tasks
from secateur.figures import frontier_figure, save
from secateur.files import lock, read_json, results_folder, write_text
from secateur.healing.heal import check_resume, heal
from secateur.healing.recipes import training_config
from secateur.healing.trainer import check_tracker
from secateur.healing.training_data import read_excluded, read_held_out
from secateur.measures.costs import layer_sizes
from secateur.measures.intervals import Array, interval, limits_of
from secateur.models import model_label, resolve
from secateur.models.blocks import depth_of
from secateur.models.open_model import open_model
from secateur.options import SCOUT_FILES, Budget, HealOptions, ScoutOptions
from secateur.options.base import make, step
from secateur.profiling.depth_scores import DepthScore, notes_on, score_depths
from secateur.profiling.depths import DepthEncoder, check_depths, legal_cuts
from secateur.profiling.profile import layer_costs
from secateur.progress import Progress, silent
from secateur.provenance import ASIDE, Made, fingerprint_files, provenance, versions_of
from secateur.results import DepthScoreRow, RungRow, Scout, Training, load
from secateur.scouting.held_out import hold_out, judge_of, left_whole

RUNGS = 8
LOWEST = 1 / 5
"""Share of the layers that the lowest rung keeps."""
SPACED = "a smaller depth keeps evenly spaced layers, the first and the last among them"
PICTURES = ("frontier.svg", "frontier.png")
_NAMES = {"model", "data", "score", "tasks", "exclude", "eval_data", "eval_tasks", "teacher"}
"""Options that are known by their content; more depths may be scored."""


@step(ScoutOptions)
def scout(options: ScoutOptions, *, progress: Progress = silent) -> Scout:
    """Train a ladder of depths of a model at once (:func:`.heal` with ``depths``), and score each on tasks.

    Without tasks, rows of the data are held out of the training and judge it. A scout that was killed goes on where it
    stopped when the same command runs again; depths asked for by ``score`` are added to those that are there.

    Returns:
        The table in ``out``.

    Raises:
        ModelError, DataError, ConfigError: Bad input; too few rows to hold out; ``out`` was begun with other settings.
        IllegalDepth, UnsupportedArchitecture: The model cannot be cut there, or more than a norm follows its layers.
        TrainingDiverged: The loss is not finite, or exploded.
        OutputError: ``out`` cannot be written, or holds something else.
    """
    out = results_folder(options.out, *SCOUT_FILES)
    with lock(out):
        sources = read_sources(options.data, options.instruction, options.columns)
        layers = training_config(options, sources).layers
        check_tracker(options.report_to)
        tasks = open_tasks(options.tasks, options.sample, options.seed) if options.tasks else []
        made = _made_from(options, sources, tasks)
        goes_on = check_resume(out, made, "a scout", ("model", "model.partial/checkpoints/checkpoint-*"))
        if not (out / "model").is_dir():
            depths = _plan(options, layers)
            if not goes_on:
                for name in ("tasks", "model.partial", "draws"):
                    shutil.rmtree(out / name, ignore_errors=True)
                for name in (Scout.file, *PICTURES):
                    (out / name).unlink(missing_ok=True)
                made.record(out)
            _train(options, sources, depths, progress)
        shutil.rmtree(out / "model.partial", ignore_errors=True)  # of a training that was killed at its very end
        tasks = tasks or open_tasks(sorted((out / "tasks").glob("[!.]*")), options.sample, options.seed)
        return _score(options, sources, tasks, progress)


def _made_from(options: ScoutOptions, sources: Sequence[Source], tasks: Sequence[Task]) -> Made:
    """All that decides on the rungs that are there; what has a name is known by its content."""

    def model(name: str) -> str:
        return name if "://" in name else fingerprint_files(resolve(name)) or name

    def told(tasks: Sequence[Task]) -> list[list[str]]:
        return [[task.source.sha256, task.instruction] for task in tasks]

    held_out = read_held_out(options)
    inputs: dict[str, Any] = {
        "model": model(options.model),
        "data": [source.source.sha256 for source in sources],
        "prompts": [
            [source.name, source.prompt, *filter(None, [source.passage_prompt])]
            for source in (*sources, *held_out.pairs)
        ],
        "tasks": told(tasks),
        "exclude": [task.sha256 for task in read_excluded(options.exclude).tasks],
        "eval_data": [pairs.source.sha256 for pairs in held_out.pairs],
        "eval_tasks": told(held_out.tasks),
        "teacher": "" if options.teacher is None else model(options.teacher),
    }
    return Made("scout", options.model_dump(mode="json", exclude={*ASIDE, *_NAMES}), inputs)


def _plan(options: ScoutOptions, layers: str) -> tuple[int, ...]:
    """The depths to train, the full depth as the last."""
    model = open_model(options.model, device=options.device, trust_remote_code=options.trust_remote_code)
    transformer = model[0].auto_model
    depths = options.depths or ladder(depth_of(transformer), legal_cuts(transformer.config, layers), layers)
    check_depths(model, options.score or (), "score", layers=layers)
    return check_depths(model, depths, layers=layers)


def ladder(depth: int, legal: Sequence[int], layers: str = "first") -> tuple[int, ...]:
    """About eight depths from a fifth of the layers to all of them, each larger than the last by the same factor.

    Each is moved to the nearest legal depth, the smaller of two. They ascend, the full depth as the last. Of evenly
    spaced layers there are two at least, the first and the last.
    """
    legal = legal if layers == "first" else [able for able in legal if able >= min(2, depth)]
    lowest = max(1.0, depth * LOWEST)
    wanted = [round(lowest * (depth / lowest) ** (step / (RUNGS - 1))) for step in range(RUNGS)]
    nearest = {min(legal, key=lambda able: (abs(able - rung), able)) for rung in wanted}
    return (*sorted(nearest - {depth}), depth)


def step_cost(layers: str, depths: Sequence[int], depth: int) -> float:
    """What a step costs, in steps of the full depth: first layers take one pass together, others one at each depth."""
    return 1.0 if layers == "first" else sum({*depths, depth}) / depth


def _train(options: ScoutOptions, sources: Sequence[Source], depths: Sequence[int], progress: Progress) -> None:
    """Hold rows out where there are no tasks, and train on the others."""
    out, exclude = options.out, list(options.exclude)
    cache = (options.cache or out / "cache") if options.teacher is not None else None
    if not options.tasks:
        if not (out / "tasks").is_dir():
            hold_out(options, sources, out / "tasks", progress)
        exclude += sorted(map(str, (out / "tasks").glob("[!.]*")))
    given = {name: value for name, value in options.given().items() if name in HealOptions.model_fields}
    given |= {"depths": list(depths), "exclude": exclude, "cache": cache, "out": out / "model"}
    heal(**given, progress=progress)


def _score(options: ScoutOptions, sources: Sequence[Source], tasks: Sequence[Task], progress: Progress) -> Scout:
    """Score what is not scored yet, and write the table and its pictures."""
    out, draws = options.out, options.out / "draws"
    training = load(out / "model", Training)
    earlier = load(out, Scout) if (out / Scout.file).is_file() else None
    trained: list[int] = training.settings["depths"]
    layers = training.settings.get("layers", "first")
    before = [row.depth for row in earlier.depths] if earlier else []
    wanted = sorted({*trained, *(options.score or ()), *before})
    scores = {(task.name, depth): kept_score(draws, task, depth) for task in tasks for depth in wanted}
    missing = {task.name: [depth for depth in wanted if scores[task.name, depth] is None] for task in tasks}
    todo = [(task, missing[task.name]) for task in tasks if missing[task.name]]
    if earlier and not todo and all((out / name).is_file() for name in PICTURES):
        return earlier
    model = open_model(out / "model", device=options.device, trust_remote_code=options.trust_remote_code)
    check_depths(model, options.score or (), "score", layers=layers)
    name, notes = model_label(options.model), list(training.settings["notes"])
    encoder, by_name = DepthEncoder(model, name=name), {task.name: task for task in tasks}
    given: dict[str, Any] = {"sample": options.sample, "seed": options.seed, "layers": layers}
    for score in score_depths(encoder, todo, **given, progress=progress):
        keep_score(draws, by_name[score.task], score)
        scores[score.task, score.depth] = score
    found: list[DepthScore] = [score for score in scores.values() if score is not None]
    rows, missed = rungs(found, trained, encoder.depth, name)
    if not options.tasks:
        notes += left_whole(sources, by_name)
    notes += [*encoder.notes, *notes_on(found), *missed]
    notes += [SPACED] if layers == "uniform" else []
    costs = (earlier.layer_costs if earlier else ()) or layer_costs(model, layer_sizes(model), notes)
    table = Scout(
        provenance=provenance([*(source.source for source in sources), *(task.source for task in tasks)], options.seed),
        model=name,
        depth=encoder.depth,
        judge="tasks" if options.tasks else judge_of(sources),
        depths=rows,
        task_scores=tuple(score.row for score in found if score.row),
        layer_costs=costs,
        notes=tuple(dict.fromkeys(notes)),
        layers=layers,
    )
    table.save(out)
    budget = make(Budget, {})
    figure = frontier_figure(table, len(choose_rung(budget, table).blocks), tolerance_of(budget, table.judge))
    for name in PICTURES:
        save(figure, out / name)
    return table


# Scores: one file for each task and depth, kept as they come, and the rungs that they make together -------------------


def _file(folder: Path, task: Task, depth: int) -> Path:
    identity = f"{task.name}\0{task.source.sha256}\0{task.instruction}"
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{depth}.json"


def keep_score(folder: Path, task: Task, score: DepthScore) -> None:
    """Write a score, whole or not at all."""
    replicates = None if score.replicates is None else score.replicates.tolist()
    content = {"versions": versions_of(), **asdict(score), "replicates": replicates}
    write_text(_file(folder, task, score.depth), json.dumps(content, ensure_ascii=False) + "\n")


def kept_score(folder: Path, task: Task, depth: int) -> DepthScore | None:
    """A score that was kept; None where there is none, or one by other versions of the libraries."""
    file = _file(folder, task, depth)
    content = read_json(file) if file.is_file() else {}
    if content.pop("versions", None) != versions_of():
        return None
    row = None if content["row"] is None else DepthScoreRow(**content["row"])
    replicates = None if content["replicates"] is None else np.asarray(content["replicates"], dtype=np.float64)
    return DepthScore(**(content | {"row": row, "replicates": replicates}))


def rungs(
    scores: Sequence[DepthScore], trained: Sequence[int], full: int, name: str
) -> tuple[tuple[RungRow, ...], list[str]]:
    """The mean over tasks at each depth, and its paired difference to the full depth.

    A depth where a score is no number has no row, but a note.

    Raises:
        ModelError: That is so at the full depth.
    """
    if undefined := [score for score in scores if score.row is None and score.depth == full]:
        problem = f"{undefined[0].metric} on {undefined[0].task} is not a number"
        raise ModelError(name, problem, "are its vectors all alike?")
    missing = sorted({score.depth for score in scores if score.row is None})
    least, most = np.mean([limits_of(score.metric) for score in scores if score.depth == full], axis=0)
    units = min(score.row.samples for score in scores if score.row)
    by_depth = {depth: _over_tasks(scores, depth) for depth in sorted({s.depth for s in scores} - {*missing})}
    reference, reference_draws = by_depth[full]
    rows = []
    for depth, (values, draws) in by_depth.items():
        low, high = (None, None) if draws is None else interval(draws.mean(axis=0), (least, most), units)
        paired: tuple[float, float] | tuple[None, None] = (None, None)
        if draws is not None and reference_draws is not None and depth != full:
            paired = interval((draws - reference_draws).mean(axis=0), (least - most, most - least), units)
        difference = float((values - reference).mean())
        rows.append(RungRow(depth, depth in trained, float(values.mean()), low, high, difference, *paired))
    told = ", ".join(map(str, missing))
    return tuple(rows), [f"depth {told} has no mean: a score there is no number"] if missing else []


def _over_tasks(scores: Sequence[DepthScore], depth: int) -> tuple[Array, Array | None]:
    """Scores of a depth (tasks,) and their replicates (tasks, replicates), None where a task has none."""
    own = sorted((score for score in scores if score.depth == depth), key=lambda score: score.task)
    values = np.array([score.row.score for score in own if score.row])
    draws = [score.replicates for score in own if score.replicates is not None]
    return values, np.array(draws) if len(draws) == len(own) else None
