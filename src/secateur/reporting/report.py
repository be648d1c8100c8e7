"""A run folder as a page to read: ``report.html``, ``report.md`` and a model card in each model folder.

A view on the tables and the draws beside them: it takes means, differences, ratios and intervals of what they hold,
and measures nothing. What a run does not have is left out. The page is one file that loads nothing, runs nothing, and
escapes every text it did not write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from secateur import document as doc
from secateur.choosing.evidence import TOLERANCE
from secateur.document import Block, Bullets, Code, Details, Gallery, Section, Text
from secateur.figures.style import save
from secateur.files import write_text
from secateur.options import ReportOptions, step
from secateur.provenance import Provenance
from secateur.reporting import pictures, tables
from secateur.reporting.card import CARD, base_licence, may_write, model_card
from secateur.reporting.findings import Summary, summarize
from secateur.reporting.run import Run, read_run
from secateur.reporting.verdict import Recommendation, notes, recommend, scout_sentences, vocabulary_facts
from secateur.results import Origin

HERE = "To use it, in the folder of this report"


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
    for picture in chain.from_iterable(doc.pictures_in(section.blocks) for section in parts):
        save(picture.figure, run.folder / "figures" / f"{picture.key}.png")
    title = run.folder.resolve().name
    head = [f"# {doc.to_markdown(title)}", f"**{doc.to_markdown(found.headline)}**"]
    head += map(doc.to_markdown, found.reasons)
    head += [doc.block_to_markdown(Code(found.command(), "sh", HERE))] if found.folder else []
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


_ENVIRONMENT = Environment(
    loader=PackageLoader("secateur.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"printable": doc.printable, "shorten": doc.shorten, "kind": lambda block: type(block).__name__}
_ENVIRONMENT.globals["arrows"] = doc.ARROWS


def to_html(block: Block) -> str:
    """A block as it is in the page."""
    return str(_ENVIRONMENT.get_template("blocks.html.j2").module.show(block))  # type: ignore[attr-defined]


# Sections -------------------------------------------------------------------------------------------------------------


def sections(summary: Summary, found: Recommendation, threshold: float) -> list[Section]:
    """The sections that a run's tables allow, in the order of the report.

    ``threshold``: million parameters that a point of score may cost.
    """
    run = summary.run
    costs = [replace(group.cost, model=group.name) for group in summary.groups if group.cost is not None]
    drawn = pictures.cost_pictures(summary, found)
    sizes = pictures.size_sentences(summary, threshold)
    failed = [f"{name}: {why}" for name, why in run.failed.items()]
    parts = [
        Section("failed", "What failed", [Bullets(failed)] if failed else [], is_open=True),
        Section("frontier", "Quality against cost", [Gallery(drawn)] if drawn else [], is_open=True),
        Section("tasks", "Tasks", list(_task_blocks(summary)), is_open=True),
        Section("sure", "How sure this is", [Text(note) for note in notes(summary)]),
        Section("worth", "What every depth is worth", list(_scout_blocks(summary))),
        Section("size", "Quality and size", [Bullets(sizes)] if sizes else []),
        Section("depth", "Quality by depth", list(_depth_blocks(run))),
        Section("models", "Models", list(_model_blocks(summary))),
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
        yield Text(f"{task}, {', '.join(names)}: {note}.", is_note=True)


def _scout_blocks(summary: Summary) -> Iterable[Block]:
    run = summary.run
    if not run.scouts:
        return
    yield from map(Text, scout_sentences(run))
    yield Text(
        "Several depths of the model were trained at once; each is compared with the full depth of the same training. "
        "The depth to keep is chosen by these scores."
    )
    tolerance = TOLERANCE if run.budget.tolerance is None else run.budget.tolerance
    for place, scout in enumerate(run.scouts, 1):
        if len(run.scouts) > 1:
            yield Text(scout.name, is_heading=True)
        if scout.table.rows[-1].score is not None:
            yield pictures.scout_picture(scout, place, tolerance)
        yield tables.rung_table(scout)
        yield from _remarks(scout.table.notes)
        if scout.table.task_scores:
            yield Details("Score of each task by depth", [tables.depth_scores_table(scout.table)])


def _remarks(notes: Iterable[str]) -> Iterable[Text]:
    return (Text(f"{note[:1].upper()}{note[1:]}.", is_note=True) for note in notes)


def _depth_blocks(run: Run) -> Iterable[Block]:
    if not run.profiles:
        return
    loss = "how well the vectors tell matching texts from others, lower is better."
    decides = "The depths to cut to are chosen on the loss, before any training:"
    if run.scouts:
        decides = "The scout decides on the depth, not this; the loss says, before any training,"
    yield Text(f"Quality of the untrained model’s vectors after each layer. {decides} {loss}")
    for place, (base, profile) in enumerate(run.profiles.items(), 1):
        yield Text(base, is_heading=True)
        drawn = pictures.profile_pictures(run, base, place)
        yield from (drawn[kind] for kind in ("curve", "solved") if kind in drawn)
        if maps := [drawn[kind] for kind in ("cka", "angles") if kind in drawn]:
            yield Gallery(maps)
        yield from _remarks(profile.notes)
        numbers = tables.profile_table(profile, run.choices.get(base, {})), tables.depth_scores_table(profile)
        yield Details("The numbers of these figures", [table for table in numbers if table.rows])


def _model_blocks(summary: Summary) -> Iterable[Block]:
    if summary.groups:
        yield tables.model_table(summary)
    if any(variant.origin for variant in summary.run.variants):
        yield Details("How each model was made", [tables.origin_table(summary.run)])


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
    if picture := pictures.training_picture(run):
        yield picture
        yield Details("The numbers of these curves", tables.training_tables(run.trainings))
    same: dict[str, list[str]] = {}
    for name, training in run.trainings.items():
        same.setdefault(tables.settings_text(training), []).append(name)
    for settings, names in same.items():
        summary = f"Settings of {doc.plural(len(names), 'training')}"
        yield Details(summary, [Text(", ".join(names), is_note=True), Code(settings, "yaml")])


def _command_blocks(run: Run) -> Iterable[Block]:
    """Each command once, in the order of the work, with what it made."""
    yield Text("What was run, in order.", is_note=True)
    steps: dict[str, dict[str, None]] = {}
    for title, table in run.tables:
        history = table.history if isinstance(table, Origin) else ()
        for command in history or table.commands:
            steps.setdefault(command, {})[title] = None
    for command, titles in steps.items():
        made = "; ".join(titles)
        yield Code(command, "sh", made[:1].upper() + made[1:])
    if run.study:
        again = Text("All of it again, with a new out: secateur study --config study.yaml", is_note=True)
        yield Details("Configuration of the study (study.yaml)", [again, Code(run.study, "yaml")])


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


def _values(made: Iterable[Provenance], part: Callable[[Provenance], Mapping[str, Any]]) -> str:
    """Keys with their values in all tables; more than one where the tables were made in different places."""
    values: dict[str, dict[str, None]] = {}
    for item in made:
        for key, value in part(item).items():
            values.setdefault(key, {})[str(value)] = None
    return ", ".join(f"{key} {', '.join(seen)}" for key, seen in values.items())
