"""A run folder as a page to read: ``report.html``, ``report.md`` and a model card in each model folder.

A view on the tables and the draws beside them: it takes means, differences, ratios and intervals of what they hold,
fits one curve to them, and measures nothing. What a run does not have is left out. The page is one file that loads
nothing, runs nothing, and escapes every text it did not write.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from secateur.document import (
    block_to_html,
    percent,
    pictures_in,
    printable,
    section_to_markdown,
    signed,
    span,
    speed,
    to_html,
    to_markdown,
)
from secateur.figures.style import save
from secateur.files import write_text
from secateur.options import ReportOptions, step
from secateur.reporting.card import may_write, model_card
from secateur.reporting.findings import GroupComparison, Summary, summarize
from secateur.reporting.run import CARD, Run, read_run
from secateur.reporting.sections import OUTCOMES, created, sections
from secateur.reporting.verdict import most_telling, notes, verdict

MOST_HIGHLIGHTS = 6
"""Cut models shown in short at the head of the page."""


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
    parts = sections(summary, options.threshold)
    for picture in chain.from_iterable(pictures_in(section.blocks) for section in parts):
        save(picture.figure, run.folder / "figures" / f"{picture.key}.png")
    title, sentences = run.folder.resolve().name, verdict(summary)
    remarks = [*notes(summary), *_score_notes(run)]
    head = [f"# {to_markdown(title)}", *(f"**{to_markdown(sentence)}**" for sentence in sentences)]
    head += [to_markdown(remark) for remark in remarks]
    _write(run.folder / "report.md", "\n\n".join([*head, *map(section_to_markdown, parts)]) + "\n")
    for variant in run.variants:
        if variant.folder is not None and variant.origin is not None and may_write(variant.folder / CARD):
            _write(variant.folder / CARD, model_card(summary, variant, variant.folder, variant.origin))
    content = {
        "title": title,
        "made": created(run)[1][:10],
        "verdict": sentences,
        "notes": remarks,
        "highlights": _highlights(summary),
        "sections": parts,
    }
    page = run.folder / "report.html"
    _write(page, _ENVIRONMENT.get_template("report.html.j2").render(content))
    return page


@dataclass(frozen=True)
class Highlight:
    """A cut model in short: its name, the share of quality that it keeps, and some more facts."""

    title: str
    share: str
    about: str
    facts: tuple[str, ...]


def _highlights(summary: Summary) -> list[Highlight]:
    """Cut models for the head of the page: of each series the most telling, so that no series crowds out another."""
    series = [[item for item in own if item.is_known] for own in summary.by_series.values()]
    ranked = chain.from_iterable(zip_longest(*map(most_telling, series)))
    shown = {item.group.name for item in [item for item in ranked if item][:MOST_HIGHLIGHTS]}
    return [_highlight(item) for own in series for item in own if item.group.name in shown]


def _highlight(item: GroupComparison) -> Highlight:
    own, full, share = item.group, item.reference, item.share
    facts = [f"{signed(item.difference.value)} points: {OUTCOMES[item.outcome]}"]
    if own.cost and full.cost:
        facts.append(f"{percent(own.cost.parameters / full.cost.parameters)} of its parameters")
        if item.speed is not None:
            rates = speed(own.cost.texts_per_second), speed(full.cost.texts_per_second)
            facts.append(f"{rates[0]} texts per second (full model: {rates[1]})")
    within = f"({span(share.low, share.high, percent)}) " if share.low is not None else ""
    return Highlight(
        f"{own.first.series}: {own.first.depth} of {own.first.blocks} blocks",
        percent(share.value),
        f"{within}of the {full.first.recipe} full model’s average score",
        tuple(facts),
    )


def _score_notes(run: Run) -> list[str]:
    """What scores say of themselves, each once: why one has no interval, that a task may mislead."""
    rows = (row for table in run.scores for row in table.rows if row.note)
    return list(dict.fromkeys(f"{row.task}: {row.note}." for row in rows))


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
_ENVIRONMENT.filters |= {"printable": printable, "name": to_html, "html": block_to_html}
