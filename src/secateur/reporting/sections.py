"""The sections of a run's report as data: texts, tables and pictures, which a page and a Markdown file show alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from secateur.choosing.choose import ranges
from secateur.document import (
    NONE,
    Block,
    Bullets,
    Cell,
    Code,
    Details,
    Gallery,
    Heading,
    Section,
    Table,
    Text,
    byte_size,
    count,
    duration,
    loss,
    number,
    plural,
    score,
    shorten,
    signed,
    span,
    speed,
)
from secateur.provenance import Fingerprint, Provenance
from secateur.reporting.findings import MARGIN, Estimate, RunGroup, Summary
from secateur.reporting.pictures import (
    MOST_PROFILES,
    cost_pictures,
    folder_link,
    profile_pictures,
    size_pictures,
    training_picture,
)
from secateur.reporting.run import Run, base_licence
from secateur.results import CostRow, Origin, Training

OUTCOMES = {
    "better": "significantly better",
    "same": "no significant difference",
    "undecided": f"no significant difference; {100 * MARGIN:.0f} points or more may be lost",
    "worse": "significantly worse",
    "unknown": "no interval",
}
TRENDS = {1: "better", -1: "worse", 0: ""}
SPEED = "Speed is the median over repetitions, with the slowest and the fastest."


def sections(summary: Summary, threshold: float) -> list[Section]:
    """The sections that a run's tables allow, in the order of the report.

    Args:
        summary: What the run found.
        threshold: Million parameters that a point of score may cost.
    """
    run = summary.run
    found: list[Section] = []
    if run.failed:
        failed = Bullets(tuple(f"{step}: {reason}" for step, reason in run.failed.items()))
        found.append(Section("failed", "What failed", [failed]))
    if pictures := cost_pictures(summary):
        fast = any(picture.key == "score-speed" for picture in pictures)
        ends = "; right is faster in the figure of throughput, and more costly in the others" if fast else ""
        text = Text(f"Each point is a model; it leads to its folder. Up is better{ends}.")
        found.append(Section("trade-off", "Quality and cost", [text, Gallery(tuple(pictures))]))
    if pictures := size_pictures(summary, threshold):
        found.append(Section("size", "Quality and size", pictures))
    if run.profiles:
        found.append(Section("depth", "Quality by depth", list(_depth_blocks(run))))
    if summary.groups:
        found.append(Section("models", "Models", list(_model_blocks(summary))))
    if any(group.rows for group in summary.groups):
        notes = [Text(note, is_note=True) for note in _missing_intervals(run)]
        found.append(Section("tasks", "Score per task", [_task_table(summary), *notes], short="Tasks"))
    if costs := [(group.name, group.cost) for group in summary.groups if group.cost is not None]:
        found.append(Section("costs", "Costs", [_cost_table(costs)]))
    if any(variant.training for variant in run.variants):
        found.append(Section("training", "Training", list(_training_blocks(run))))
    found.append(Section("commands", "Commands", list(_command_blocks(run))))
    found.append(Section("provenance", "Provenance", list(_provenance_blocks(run))))
    return found


# Profiles -------------------------------------------------------------------------------------------------------------


def _depth_blocks(run: Run) -> Iterable[Block]:
    yield Text(
        "Quality of the untrained model’s vectors after each block. The depths to cut to are chosen on the loss, "
        "before any training: how well the vectors tell matching texts from others, lower is better."
    )
    for number_, (base, profile) in enumerate(list(run.profiles.items())[:MOST_PROFILES], 1):
        yield Heading(base)
        pictures = profile_pictures(run, base, number_)
        yield from (pictures[kind] for kind in ("curve", "solved") if kind in pictures)
        if maps := tuple(pictures[kind] for kind in ("cka", "angles") if kind in pictures):
            yield Gallery(maps)
        yield from (Text(f"{note[:1].upper()}{note[1:]}.", is_note=True) for note in profile.notes)
        chosen: dict[int, list[str]] = {}
        for label, depth in run.choices.get(base, {}).items():
            chosen.setdefault(depth, []).append(label)
        depths = Table(
            f"Profile of {profile.model}, {profile.dtype}; {profile.depth} blocks, texts of at most "
            f"{profile.max_length} tokens.",
            (
                "Depth",
                "Loss (nats)",
                "Standard error",
                "Block Influence",
                "Effective rank",
                "Next-token loss (nats)",
            ),
            [
                (
                    Cell(str(row.depth), tag=", ".join(chosen.get(row.depth, []))),
                    *map(loss, (row.loss, row.loss_se, row.block_influence)),
                    number(row.effective_rank),
                    loss(row.next_token_loss),
                )
                for row in profile.rows
            ],
        )
        scores = Table(
            "Scores (× 100) of the untrained model at each depth, with 95 % intervals.",
            ("Task", "Kind", "Metric", "Depth", "Score"),
            [
                (row.task, row.kind, row.metric, str(row.depth), _with_interval(row.score, row.low, row.high))
                for row in profile.task_scores
            ],
            texts=3,
        )
        yield Details("The numbers of these figures", (depths, scores) if profile.task_scores else (depths,))
    if more := list(run.profiles)[MOST_PROFILES:]:
        yield Text(f"{plural(len(more), 'more profile')}, each with its curve in its own folder: {', '.join(more)}.")


def _with_interval(value: float | None, low: float | None, high: float | None) -> Cell:
    return Cell(score(value), (span(low, high),) if low is not None else ())


# Models ---------------------------------------------------------------------------------------------------------------


def _model_blocks(summary: Summary) -> Iterable[Block]:
    title = (
        "What each model costs, and its average score over its tasks (× 100). Differences are in points, to the full "
        f"model named with them; ranges are 95 % intervals. {SPEED}"
    )
    columns = ["Model", "Blocks", "Parameters", "of which embedding table", "On disk", "Texts per second"]
    columns += ["Average score", "Difference", "Tasks better / worse"]
    rows = [_model_row(summary, group) for group in summary.groups]
    yield Table(title, columns, rows, groups=[group.first.series for group in summary.groups]).filled()
    built = [(variant.name, variant.origin, variant.training) for variant in summary.run.variants if variant.origin]
    if built:
        table = Table(
            "Blocks kept, training, and the check made when the folder was written: the largest difference between its "
            "vectors and those of the model it was written from.",
            (
                *("Model", "Base model", "Blocks kept", "Pooling"),
                *("Check", "Steps", "Trained parameters", "Training time", "Seed"),
            ),
            [
                (name, origin.base_model, kept_blocks(origin), origin.pooling, f"{origin.check:.1e}")
                + (_training_cells(training) if training else (NONE,) * 4)
                for name, origin, training in built
            ],
            texts=4,
        )
        yield Details("How each model was made", (table,))


def _model_row(summary: Summary, group: RunGroup) -> list[str | Cell]:
    first, cost, average = group.first, group.cost, group.average
    link = folder_link(summary.run.folder, first.folder)
    row: list[str | Cell] = [Cell(group.name, tag="full model" if first.is_full else "", link=link)]
    row.append(f"{first.depth} of {first.blocks}" if first.blocks else str(first.depth or NONE))
    if cost:
        row += [count(cost.parameters), count(cost.embedding_parameters), byte_size(cost.bytes)]
        row.append(Cell(speed(cost.texts_per_second), (span(cost.speed_low, cost.speed_high, speed),)))
    else:
        row += [NONE] * 4
    notes = [span(average.low, average.high)] if average and average.low is not None else []
    if average and average.seed_error and len(group.seeds) > 1:
        notes.append(f"{len(group.seeds)} seeds, ± {score(average.seed_error)}")
    row.append(Cell(score(average.value if average else None), tuple(notes)))
    compared = summary.compared.get(group.name)
    if compared is None:
        return [*row, NONE, NONE]
    difference, full = compared.difference, f"to {shorten(compared.reference.first.series)}"
    notes = [full]
    if difference.low is not None:
        notes = [span(difference.low, difference.high, signed), full, OUTCOMES[compared.outcome]]
    return [*row, Cell(signed(difference.value), tuple(notes)), f"{compared.count(1)} / {compared.count(-1)}"]


def _training_cells(training: Training) -> tuple[str, ...]:
    seed = training.provenance.seed
    return (
        str(training.steps),
        count(training.trained_parameters),
        duration(training.seconds),
        NONE if seed is None else str(seed),
    )


def kept_blocks(origin: Origin) -> str:
    """Which blocks are kept: ``all``, ``the first 7``, or ranges of their numbers as ``--keep`` takes them."""
    if origin.kept == tuple(range(len(origin.kept))):
        amount = len(origin.kept)
        return "all" if amount == origin.depth else f"the first {amount}" if amount > 1 else "the first"
    return f"blocks {ranges(origin.kept)} (counted from 0, as by --keep)"


# Scores and costs -----------------------------------------------------------------------------------------------------


def _task_table(summary: Summary) -> Table:
    """Tasks × models, the more numerous as rows."""
    groups = [group for group in summary.groups if group.scores]
    examples = {row.task: row for group in groups for row in group.rows.values()}
    tasks = {task: f"{row.type}, {row.metric}, {row.samples} samples" for task, row in examples.items()}
    title = (
        "Each task’s own metric, × 100. With a score: its difference to the full model and the 95 % interval of that, "
        "▲ or ▼ where it is significant. One interval of twenty misses by chance."
    )

    def cell(group: RunGroup, task: str) -> Cell | str:
        own = group.scores.get(task)
        if own is None:
            return NONE
        if group.name not in summary.compared:
            return _with_interval(own.value, own.low, own.high)
        difference: Estimate = summary.compared[group.name].tasks[task]
        within = span(difference.low, difference.high, signed)
        note = ", ".join(part for part in (signed(difference.value), within) if part)
        return Cell(score(own.value), (note,), trend=TRENDS[difference.sign])

    if len(groups) > len(tasks):
        rows = [
            (Cell(group.name, tag="full model" if group.first.is_full else ""), *(cell(group, task) for task in tasks))
            for group in groups
        ]
        headings = ["Model", *(f"{task} ({about})" for task, about in tasks.items())]
        return Table(title, headings, rows, groups=[group.first.series for group in groups])
    by_task = [(Cell(task, (about,)), *(cell(group, task) for group in groups)) for task, about in tasks.items()]
    return Table(title, ["Task", *(group.name for group in groups)], by_task)


def _missing_intervals(run: Run) -> list[str]:
    """Why scores have no interval, those of a task with the same reason together."""
    models: dict[tuple[str, str], list[str]] = {}
    for variant in run.variants:
        for row in variant.scores.values():
            if row.note:
                models.setdefault((row.task, row.note), []).append(variant.name)
    return [f"{task}, {', '.join(names)}: {note}." for (task, note), names in models.items()]


COSTS: dict[str, Callable[[CostRow], str | Cell]] = {
    "Parameters": lambda row: count(row.parameters),
    "of which embedding table": lambda row: count(row.embedding_parameters),
    "On disk": lambda row: byte_size(row.bytes),
    "Weights in memory": lambda row: byte_size(row.memory_bytes or None),
    "Peak memory": lambda row: byte_size(row.peak_bytes),
    "Operations per token": lambda row: Cell(
        count(row.flops_per_token or None), (f"text of {row.flops_tokens} tokens",) if row.flops_per_token else ()
    ),
    "Loading": lambda row: duration(row.load_seconds),
    "One short text, median": lambda row: duration(row.latency_p50),
    "95th percentile": lambda row: duration(row.latency_p95),
    "Short texts per second": lambda row: _speed_cell(
        (row.texts_per_second, row.speed_low, row.speed_high), row.short_tokens, row.short_batch
    ),
    "Long texts per second": lambda row: _speed_cell(
        (row.long_texts_per_second or None, row.long_speed_low, row.long_speed_high), row.long_tokens, row.long_batch
    ),
}
"""What is shown of the costs of a model: heading → how it is printed."""


def _speed_cell(speeds: tuple[float | None, float, float], tokens: float, batch: int) -> Cell:
    notes = [span(*speeds[1:], speed)] + ([f"{number(tokens)} tokens, batches of {batch}"] if batch else [])
    return Cell(speed(speeds[0]), tuple(notes) if speeds[0] else ())


def _cost_table(costs: Sequence[tuple[str, CostRow]]) -> Table:
    first = costs[0][1]
    where = f" on {first.device}, {plural(first.threads, 'thread')}" if first.device else ""
    title = (
        f"Counted and measured side by side{where}. Times include the tokenizer; ranges are from the slowest to the "
        "fastest repetition."
    )
    rows = [(name, cost.dtype or NONE, *(show(cost) for show in COSTS.values())) for name, cost in costs]
    return Table(title, ["Model", "dtype", *COSTS], rows, texts=2)


# Trainings ------------------------------------------------------------------------------------------------------------


def _training_blocks(run: Run) -> Iterable[Block]:
    trained = {variant.name: variant.training for variant in run.variants if variant.training}
    if picture := training_picture(run):
        yield picture
        curves = {name: {row.step: loss(row.loss) for row in item.rows} for name, item in trained.items()}
        tables = [_by_step("Training loss in nats.", curves)]
        scores = {name: {r.step: score(r.score) for r in item.trials} for name, item in trained.items() if item.trials}
        tables += [_by_step("Evaluation scores, × 100.", scores)] if scores else []
        yield Details("The numbers of these curves", tuple(tables))
    same: dict[str, list[str]] = {}
    for name, training in trained.items():
        same.setdefault(settings_text(training), []).append(name)
    for settings, names in same.items():
        summary = f"Settings of {plural(len(names), 'training')}"
        yield Details(summary, (Text(", ".join(names), is_note=True), Code(settings, "yaml")))


def _by_step(title: str, curves: Mapping[str, Mapping[int, str]]) -> Table:
    steps = sorted({step for curve in curves.values() for step in curve})
    return Table(
        title,
        ["Step", *curves],
        [(str(step), *(curve.get(step, NONE) for curve in curves.values())) for step in steps],
    )


def settings_text(training: Training, publish: Callable[[Any], Any] = lambda content: content) -> str:
    """A training's settings and prompts as YAML."""
    content = {"settings": publish(dict(training.settings)), "prompts": dict(training.prompts)}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()


# Commands and provenance ----------------------------------------------------------------------------------------------


def _command_blocks(run: Run) -> Iterable[Block]:
    """Each command once, in the order of the work, with what it made."""
    yield Text("What was run, in order.", is_note=True)
    steps: dict[str, list[str]] = {}
    for title, table in run.tables:
        history = table.history if isinstance(table, Origin) else ()
        for command in history or table.commands:
            titles = steps.setdefault(command, [])
            titles += [title] if title not in titles else []
    for command, titles in steps.items():
        made = "; ".join(titles)
        yield Code(command, "sh", made[:1].upper() + made[1:])
    if run.study:
        yield Details("Configuration of the study (study.yaml)", (Code(run.study, "yaml"),))


def _provenance_blocks(run: Run) -> Iterable[Block]:
    """What all tables say of base models, data, seeds, versions, machine and time."""
    made = [table.provenance for _, table in run.tables]
    first, last = created(run)
    bases = dict.fromkeys(variant.origin.base_model for variant in run.variants if variant.origin)
    facts = {
        "Made": _moment(first) + (f" to {_moment(last)}" if last != first else ""),
        "Seed": ", ".join(dict.fromkeys(str(item.seed) for item in made if item.seed is not None)),
        "Base models": ", ".join(f"{base} (licence {base_licence(base) or 'not known'})" for base in bases),
        "Hardware": _values(made, lambda item: item.hardware),
        "Versions": _values(made, lambda item: item.versions),
    }
    yield Bullets(tuple(f"{key}: {value}" for key, value in facts.items() if value))
    files: dict[Fingerprint, dict[str, int]] = {}
    for title, table in run.tables:
        for file in table.provenance.data:
            kinds, kind = files.setdefault(file, {}), title.split(maxsplit=1)[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    if files:
        rows = []
        for file, kinds in files.items():
            uses = ", ".join(f"{kind} ({times})" if times > 1 else kind for kind, times in kinds.items())
            rows.append((file.name, file.licence or "not stated", uses, file.sha256, f"{file.rows:,}"))
        yield Table("Data files as they were read.", ("File", "Licence", "Used for", "SHA-256", "Rows used"), rows, 4)


def created(run: Run) -> tuple[str, str]:
    """When the first and the last of a run's tables were made."""
    times = sorted(table.provenance.created for _, table in run.tables)
    return times[0], times[-1]


def _moment(time: str) -> str:
    """An ISO 8601 time without its seconds."""
    return time[:16].replace("T", " ") + (" UTC" if time.endswith("+00:00") else "")


def _values(made: Iterable[Provenance], part: Callable[[Provenance], Mapping[str, Any]]) -> str:
    """Keys with their values in all tables; more than one where the tables were made in different places."""
    values: dict[str, dict[str, None]] = {}
    for item in made:
        for key, value in part(item).items():
            values.setdefault(key, {})[str(value)] = None
    return ", ".join(f"{key} {', '.join(seen)}" for key, seen in values.items())
