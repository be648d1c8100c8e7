"""A run folder as a page to read: ``report.html``, ``report.md`` and a model card in each model folder.

A view on the tables and the draws beside them: it takes means, differences, ratios and intervals of what they hold,
and measures nothing. What a run does not have is left out. The page is one file that loads nothing, runs nothing, and
escapes every text it did not write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from secateur import document as doc
from secateur import figures
from secateur.choosing.budgets import tolerance_of
from secateur.document import Block, Bullets, Code, Picture, Section, Text, count, plural
from secateur.figures import Point
from secateur.files import write_bytes, write_text
from secateur.options import ReportOptions, step
from secateur.reporting import tables
from secateur.reporting.card import CARD, base_licence, in_words, may_write, model_card, templates
from secateur.reporting.findings import Summary, pareto, summarize
from secateur.reporting.run import Run, Scouted, read_run
from secateur.reporting.verdict import Recommendation, notes, recommend, scout_sentences, vocabulary_facts
from secateur.results import Origin

HERE = "To use it, in the folder of this report"
MOST_LABELS = 24
"""Points of a figure beyond which only the best are labelled."""
MILLION = 1e6


@step(ReportOptions)
def report(options: ReportOptions) -> Path:
    """Write the report of a run: ``report.html``, ``report.md`` with ``figures/*.png``, and the model cards.

    Any of the run's parts may be absent; the report shows what is there.

    Returns:
        The path of ``report.html``.

    Raises:
        ConfigError: An option has an invalid value.
        DataError: The folder is missing, holds no table, or a table in it is broken or contradicts another.
        OutputError: A file cannot be written.
    """
    summary = summarize(read_run(options.run))
    run = summary.run
    found = recommend(summary)
    parts = sections(summary, found, options.threshold)
    for picture in (block for part in parts for block in part.blocks if isinstance(block, Picture)):
        write_bytes(run.folder / "figures" / f"{picture.key}.png", picture.png)
    title = run.folder.resolve().name
    head = [f"# {doc.to_markdown(title)}", f"**{doc.to_markdown(found.headline)}**"]
    head += map(doc.to_markdown, found.reasons)
    head += [Code(found.command(), "sh", HERE).to_markdown()] if found.folder else []
    _write(run.folder / "report.md", "\n\n".join([*head, *(part.to_markdown() for part in parts)]) + "\n")
    for variant in run.variants:
        if variant.folder is not None and variant.origin is not None and may_write(variant.folder / CARD):
            _write(variant.folder / CARD, model_card(summary, found, variant, variant.folder, variant.origin))
    page = run.folder / "report.html"
    content = {"title": title, "made": created(run)[1][:10], "found": found, "here": HERE, "sections": parts}
    _write(page, _ENVIRONMENT.get_template("report.html.j2").render(content))
    return page


def read_verdict(run: str | Path) -> tuple[str, ...]:
    """What a run recommends, as its report begins: the verdict, its reasons, and the command that uses the model.

    Raises:
        DataError: The folder is missing, holds no table, or a table in it is broken or contradicts another.
    """
    found = recommend(summarize(read_run(run)))
    return (found.headline, *found.reasons, *([found.command(Path(run))] if found.folder else []))


def _write(path: Path, text: str) -> None:
    # A lone surrogate, which JSON can hold, has no UTF-8.
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


_ENVIRONMENT = templates(autoescape=True)
_ENVIRONMENT.filters |= {"printable": doc.printable, "shorten": doc.shorten, "kind": lambda block: type(block).__name__}
_ENVIRONMENT.globals["arrows"] = doc.ARROWS


# Sections -------------------------------------------------------------------------------------------------------------


def sections(summary: Summary, found: Recommendation, threshold: float) -> list[Section]:
    """The sections that a run's tables allow, in the order of the report.

    ``threshold``: million parameters that a point of score may cost.
    """
    run = summary.run
    costs = [replace(group.cost, model=group.name) for group in summary.groups if group.cost is not None]
    drawn = _cost_pictures(summary, found)
    sizes = size_sentences(summary, threshold)
    failed = [f"{name}: {why}" for name, why in run.failed.items()]
    parts = [
        Section("failed", "What failed", [Bullets(failed)] if failed else [], is_open=True),
        Section("frontier", "Quality against cost", [*drawn, Text(_POINTS)] if drawn else [], is_open=True),
        Section("tasks", "Tasks", list(_task_blocks(summary)), is_open=True),
        Section("sure", "How sure this is", [Text(note) for note in notes(summary)]),
        Section("worth", "What every depth is worth", list(_scout_blocks(summary))),
        Section("size", "Quality and size", [Bullets(sizes)] if sizes else []),
        Section("depth", "Quality by depth", list(_depth_blocks(run))),
        Section("models", "Models", [tables.model_table(summary)] if summary.groups else []),
        Section("vocabulary", "Vocabulary", list(_vocabulary_blocks(run))),
        Section("costs", "Costs", [tables.cost_table(costs)] if costs else []),
        Section("training", "Training", list(_training_blocks(run))),
        Section("commands", "Commands", list(_command_blocks(run))),
        Section("provenance", "Provenance", list(_provenance_blocks(run))),
    ]
    return [part for part in parts if part.blocks]


def _task_blocks(summary: Summary) -> Iterable[Block]:
    if groups := [group for group in summary.groups if group.scores]:
        yield tables.task_table(groups, summary.compared)
    missing: dict[tuple[str, str], list[str]] = {}
    for variant in summary.run.variants:
        for row in variant.scores.values():
            if row.note:  # why the score has no interval
                missing.setdefault((row.task, row.note), []).append(variant.name)
    for (task, note), names in missing.items():
        yield Text(f"{task}, {', '.join(names)}: {note}.")


def _scout_blocks(summary: Summary) -> Iterable[Block]:
    run = summary.run
    if not run.scouts:
        return
    yield from map(Text, scout_sentences(run))
    yield Text(
        "Several depths of the model were trained at once; each is compared with the full depth of the same training. "
        "The depth to keep is chosen by these scores."
    )
    for place, scout in enumerate(run.scouts, 1):
        if len(run.scouts) > 1:
            yield Text(scout.name, is_heading=True)
        if scout.table.rows[-1].score is not None:
            yield _scout_picture(scout, place, tolerance_of(run.budget, scout.table.judge))
        yield tables.rung_table(scout)
        yield from _remarks(scout.table.notes)
        if scout.table.task_scores:
            yield tables.depth_scores_table(scout.table)


def _remarks(notes: Iterable[str]) -> Iterable[Text]:
    return (Text(f"Note: {note}.") for note in notes)


def _depth_blocks(run: Run) -> Iterable[Block]:
    if not run.profiles:
        return
    decides = " The depth to cut to is chosen by the scout, not by this." if run.scouts else ""
    yield Text(
        "Quality of the untrained model’s vectors after each layer. The loss, of pairs alone, says how well they tell "
        f"matching texts from others; lower is better.{decides}"
    )
    for place, (base, profile) in enumerate(run.profiles.items(), 1):
        yield Text(base, is_heading=True)
        yield from _profile_pictures(run, base, place)
        yield from _remarks(profile.notes)
        yield tables.profile_table(profile, run.choices.get(base, {}))
        if profile.task_scores:
            yield tables.depth_scores_table(profile)


def _vocabulary_blocks(run: Run) -> Iterable[Block]:
    if run.vocabularies:
        yield Text(
            "The vocabulary was cut last, after all training; profiles and scouts are of models with all their tokens. "
            "The models are for texts like those that it was chosen by. Other texts, especially in other languages and "
            "scripts, are split into more tokens."
        )
    for base, cut in run.vocabularies.items():
        yield Text(base, is_heading=True)
        yield Bullets(vocabulary_facts(cut))


def _training_blocks(run: Run) -> Iterable[Block]:
    if picture := _training_picture(run):
        yield picture
    if run.trainings:
        yield Bullets([f"{name}: {tables.training_in_words(training)}." for name, training in run.trainings.items()])
    same: dict[str, list[str]] = {}
    for name, training in run.trainings.items():
        same.setdefault(tables.settings_text(training), []).append(name)
    for settings, names in same.items():
        yield Code(settings, "yaml", f"Settings of {', '.join(names)}")


def _command_blocks(run: Run) -> Iterable[Block]:
    """Each command once, in the order of the work, with what it made."""
    yield Text("What was run, in order.")
    steps: dict[str, dict[str, None]] = {}
    for title, table in run.tables:
        history = table.history if isinstance(table, Origin) else ()
        for command in history or table.commands:
            steps.setdefault(command, {})[title] = None
    for command, titles in steps.items():
        made = "; ".join(titles)
        yield Code(command, "sh", made[:1].upper() + made[1:])
    if run.study:
        yield Text("All of it again, with a new out: secateur study --config study.yaml")
        yield Code(run.study, "yaml", "study.yaml")


def _provenance_blocks(run: Run) -> Iterable[Block]:
    """What all tables say of base models, data, seeds, versions, machine and time."""
    made = [table.provenance for _, table in run.tables]
    first, last = map(_moment, created(run))
    bases = dict.fromkeys(variant.origin.base_model for variant in run.variants if variant.origin)
    facts = {
        "Made": first + (f" to {last}" if last != first else ""),
        "Seed": ", ".join(dict.fromkeys(str(item.seed) for item in made if item.seed is not None)),
        "Base models": ", ".join(f"{base} (licence {base_licence(base) or 'not known'})" for base in bases),
        "Hardware": "; ".join(dict.fromkeys(in_words(item.hardware) for item in made)),
        "Versions": "; ".join(dict.fromkeys(in_words(item.versions) for item in made)),
    }
    yield Bullets([f"{key}: {value}" for key, value in facts.items() if value])
    if files := dict.fromkeys(file for item in made for file in item.data):
        rows = [(file.name, file.licence or "not stated", file.sha256, f"{file.rows:,}") for file in files]
        yield doc.Table("Data files as they were read.", ("File", "Licence", "SHA-256", "Rows used"), rows, texts=3)


def created(run: Run) -> tuple[str, str]:
    """When the first and the last of a run's tables were made."""
    times = sorted(table.provenance.created for _, table in run.tables)
    return times[0], times[-1]


def _moment(time: str) -> str:
    """An ISO 8601 time without its seconds."""
    return time[:16].replace("T", " ") + (" UTC" if time.endswith("+00:00") else "")


# Pictures -------------------------------------------------------------------------------------------------------------


def _picture(key: str, title: str, caption: str, figure: Figure) -> Picture:
    return Picture(key, title, caption, figures.rendered(figure))


_COSTS = {
    "Speed": ("Short texts per second (right is faster)", "texts_per_second", "speed_low", "speed_high"),
    "Parameters": ("Parameters (left is smaller)", "parameters", "", ""),
    "Bytes": ("Bytes on disk (left is smaller)", "bytes", "", ""),
    "Latency": ("Seconds for one short text (left is faster)", "latency_p50", "latency_p50", "latency_p95"),
}
"""Name of a cost → its axis, and its fields in :class:`.CostRow`: of itself, and of its range, if it has one."""
_POINTS = (
    "Each point is a model, numbers are layers kept, and lines join cuts of one kind. Vertical bars are 95 % intervals "
    "of scores; paired differences are known more precisely. Horizontal bars reach from the slowest to the fastest "
    "round, those of latency from the median to the 95th percentile."
)


def _cost_pictures(summary: Summary, found: Recommendation) -> list[Picture]:
    drawn = []
    for name, (axis, *fields) in _COSTS.items():
        points = _points(summary, found, *fields)
        if points:
            key, title = f"score-{name.lower()}", f"Average score against {name.lower()}"
            drawn.append(_picture(key, title, f"{title}.", figures.frontier(points, axis)))
    return drawn


def _points(summary: Summary, found: Recommendation, field: str, low: str, high: str) -> list[Point]:
    told = [item.group for item in (found.ship, found.runner_up) if item]
    points: list[Point] = []
    for group in summary.groups:
        cost, average, first, kind = group.cost, group.average, group.first, summary.kind(group)
        if cost is None or average is None or not getattr(cost, field):  # 0: not measured
            continue
        point = Point(
            series=first.series,
            label=group.name if group in told or kind in ("full", "baseline") else str(first.depth or ""),
            score=average.value,
            low=average.low,
            high=average.high,
            cost=getattr(cost, field),
            cost_low=getattr(cost, low, None),
            cost_high=getattr(cost, high, None),
            kind=kind,
            marked=found.ship is not None and group is found.ship.group,
        )
        points.append(point)
    sign = -1 if field == "texts_per_second" else 1  # more of it is better
    best = set(pareto([(sign * point.cost, point.score) for point in points]))
    points = [replace(point, best=index in best) for index, point in enumerate(points)]
    few = len(points) <= MOST_LABELS
    return [point if few or point.best or point.marked else replace(point, label="") for point in points]


def size_sentences(summary: Summary, threshold: float) -> list[str]:
    """For each base model with cuts of several sizes: beyond which of them a point of score costs too much.

    ``threshold``: million parameters that a point of score may cost. The size is that where the score less the price
    of the parameters is highest: to any larger one, a point costs more than the threshold.
    """
    sizes: dict[str, dict[int, float]] = {}
    for group in summary.groups:
        if group.cost and group.average and not group.first.is_baseline:
            own, size = sizes.setdefault(group.first.base, {}), group.cost.parameters
            own[size] = max(own.get(size, -1.0), group.average.value)
    said = []
    for base, own in ((base, own) for base, own in sizes.items() if len(own) > 1):
        best = max(own, key=lambda size: (100 * own[size] - size / (threshold * MILLION), -size))
        if best < max(own) and own[best] == max(own.values()):
            said.append(f"{base}: no size beyond {count(best)} parameters scores higher, by the averages measured.")
            continue
        where, price = ("up to the largest size,", "less") if best == max(own) else ("beyond", "more")
        costs = f"one more point of score costs {price} than {threshold:g} M, by the averages measured"
        said.append(f"{base}: {where} {count(best)} parameters, {costs}.")
    return said


def _scout_picture(scouted: Scouted, number: int, tolerance: float) -> Picture:
    """What every depth is worth: the score of each rung."""
    scout, trained = scouted.table, sum(row.trained for row in scouted.table.rows)
    caption = (
        f"Score of {scout.model} at each depth after one training of {plural(trained, 'depth')} at once. Thin bars are "
        "95 % intervals of the score, thick ones those of its difference to the full depth. Where all of a thick bar "
        f"is above the lower edge of the band, at most {plural(tolerance, 'point', 'g')} may be lost."
    )
    figure = figures.frontier_figure(scout, scouted.chosen, tolerance)
    return _picture(f"frontier-{number}", f"What every depth is worth: {scouted.name}", caption, figure)


_OF_PROFILES = {
    "curve": (
        "Measures",
        "Block Influence and effective rank of the layers; with pairs, the contrastive loss of the untrained model "
        "after each, its 95 % interval as a band, and the depths that are chosen.",
    ),
    "solved": (
        "Tasks",
        "Scores of the untrained model at each depth, task by task, and its next-token loss if it generates text; "
        "scores × 100, bands are 95 % intervals, dots the best depths.",
    ),
    "cka": ("Similarity", "Linear CKA of the vectors at all pairs of depths: 1 is the same up to rotation and scale."),
    "angles": (
        "Angles",
        "Angular distance of the last token’s states at all pairs of depths, from the embeddings (0) on. "
        "Light squares along the diagonal are runs of layers that turn the states little.",
    ),
}
"""Figures of a profile: key → title and caption."""


def _profile_pictures(run: Run, name: str, number: int) -> list[Picture]:
    drawn = figures.profile_figures(run.profiles[name], run.choices.get(name))
    about = ((kind, *words) for kind, words in _OF_PROFILES.items() if kind in drawn)
    return [_picture(f"{kind}-{number}", f"{title} by depth: {name}", said, drawn[kind]) for kind, title, said in about]


def _training_picture(run: Run) -> Picture | None:
    trainings = {name: training for name, training in run.trainings.items() if training.rows}
    caption = (
        "Loss of each training, the mean since the step logged before. Below, where there are any, its scores on "
        "held-out data: a ring marks the step whose weights were kept."
    )
    return _picture("training", "Training", caption, figures.training_curves(trainings)) if trainings else None
