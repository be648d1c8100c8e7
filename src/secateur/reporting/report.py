"""A run folder as a page to read: ``report.html``, ``report.md`` and a model card in each model folder.

A view on the tables and the draws beside them: it takes means, differences, ratios and intervals of what they hold,
fits one curve to them, and measures nothing. What a run does not have is left out. The page is one file that loads
nothing, runs nothing, and escapes every text it did not write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.choosing.choose import ranges
from secateur.figures.saving import save_png, svg
from secateur.figures.text import printable, shorten
from secateur.files import write_text
from secateur.options import ReportOptions, make
from secateur.provenance import Fingerprint, Provenance
from secateur.reporting import card, printing
from secateur.reporting.drawings import MOST_PROFILES, Drawing, captions, command_of, draw, folder_link
from secateur.reporting.findings import Claim, Design, Findings, find
from secateur.reporting.printing import NONE, signed, span
from secateur.reporting.run import Run, Variant, read_run
from secateur.reporting.verdict import notes, seed_note, telling, verdict
from secateur.results import Origin, Training

MOST_CARDS = 6
"""Claims shown in short at the head of the page."""


def report(run: str | Path, *, threshold: float = 100.0) -> Path:
    """Write the report of a run: ``report.html``, ``report.md`` with ``figures/*.png``, and the model cards.

    Args:
        run: The run folder. Any of its parts may be absent; the report shows what is there.
        threshold: Million parameters that one more point of score may cost: the report says beyond which size it
            costs more.

    Returns:
        The path of ``report.html``.

    Raises:
        ConfigError: The threshold is not above zero.
        DataError: The folder is missing, holds no table, or a table in it is broken or contradicts another.
        OutputError: A file cannot be written.
    """
    make(ReportOptions, {"run": run, "threshold": threshold})
    found = find(read_run(run))
    content = found.run
    drawn = draw(found, threshold)
    for name, drawing in drawn.items():
        save_png(drawing.figure, content.folder / "figures" / f"{name}.png")
    shared = _shared(found, drawn)
    _write(content.folder / "report.md", _TEXT.get_template("report.md.j2").render(shared))
    for variant in content.variants:
        if variant.folder is not None and variant.origin is not None and card.is_ours(variant.folder / card.CARD):
            _write(variant.folder / card.CARD, _card(found, variant, variant.folder, variant.origin))
    page = content.folder / "report.html"
    _write(page, _HTML.get_template("report.html.j2").render(shared))
    return page


def _shared(found: Findings, drawn: Mapping[str, Drawing]) -> dict[str, Any]:
    """What both templates show."""
    run = found.run
    return {
        "run": run,
        "title": run.folder.resolve().name,
        "verdict": verdict(found),
        "notes": [*notes(found), *_score_notes(run)],
        "figures": drawn,
        "claims": _in_short(found),
        "groups": _groups(found),
        "costs": [design for design in found.designs if design.cost is not None],
        "tasks": _tasks(found),
        "unsure": _unsure(run),
        "columns": [design for design in found.designs if design.scores],
        "compared": found.compared,
        "built": [variant for variant in run.variants if variant.origin],
        "undrawn": list(run.profiles)[MOST_PROFILES:],
        "losses": _losses(run),
        "trials": _trials(run),
        "settings": _settings(run),
        "steps": _steps(run),
        "origins": _origins(run),
    }


def _card(found: Findings, variant: Variant, folder: Path, origin: Origin) -> str:
    """One model's card; the full model beside it is of the same seed where there is one."""
    claim = next((claim for claim in found.compared.values() if variant in claim.design.variants), None)
    full = None
    if claim is not None:
        same = [other for other in claim.reference.variants if other.seed == variant.seed]
        full = (same or claim.reference.variants)[0]
    content = {
        "mark": card.CARD_MARK,
        "metadata": card.metadata(variant, origin),
        "run": found.run,
        "variant": variant,
        "origin": origin,
        "claim": claim,
        "full": full,
        "prompts": card.prompts(folder),
        "note": seed_note(found) if variant.training else "",
    }
    return _TEXT.get_template("card.md.j2").render(content)


# Tables of the page ---------------------------------------------------------------------------------------------------


def _in_short(found: Findings) -> list[Claim]:
    """Claims for the head of the page: of each series what says most, so that no series crowds out another."""
    series = [[claim for claim in own if claim.is_known] for own in found.claims.values()]
    ranked = chain.from_iterable(zip_longest(*map(telling, series)))
    shown = {claim.design.name for claim in [claim for claim in ranked if claim][:MOST_CARDS]}
    return [claim for own in series for claim in own if claim.design.name in shown]


def _groups(found: Findings) -> dict[str, list[dict[str, Any]]]:
    """The rows of the main table by series, each value as it is printed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for design in found.designs:
        groups.setdefault(design.first.series, []).append(_row(found.run, design, found.compared.get(design.name)))
    return groups


def _row(run: Run, design: Design, claim: Claim | None) -> dict[str, Any]:
    first, cost, average = design.first, design.cost, design.average
    difference = claim.difference if claim else None
    error = average.seed_error if average else None
    return {
        "design": design,
        "link": folder_link(run.folder, first.folder),
        "command": command_of(design),
        "blocks": f"{first.depth} of {first.blocks}" if first.blocks else str(first.depth or NONE),
        "parameters": printing.count(cost.parameters) if cost else NONE,
        "table": printing.count(cost.embedding_parameters) if cost else NONE,
        "bytes": printing.byte_size(cost.bytes) if cost else NONE,
        "speed": printing.speed(cost.texts_per_second) if cost else NONE,
        "range": span(cost.speed_low, cost.speed_high, printing.speed) if cost else "",
        "average": printing.score(average.value if average else None),
        "within": span(average.low, average.high) if average else "",
        "seeds": f"{len(design.seeds)} seeds, ± {printing.score(error)}" if error and len(design.seeds) > 1 else "",
        "difference": signed(difference.value if difference else None),
        "between": span(difference.low, difference.high, signed) if difference else "",
        "outcome": claim.outcome if claim else "",
        "against": claim.reference if claim else None,
        "wins": f"{len(claim.won(1))} / {len(claim.won(-1))}" if claim else NONE,
        "is_full": first.is_full,
    }


def _score_notes(run: Run) -> list[str]:
    """What scores say of themselves, each once: why one has no interval, that a task may mislead."""
    rows = (row for table in run.scores for row in table.rows if row.note)
    return list(dict.fromkeys(f"{row.task}: {row.note}." for row in rows))


def _tasks(found: Findings) -> dict[str, Any]:
    """Every task of the run, with one of its rows for type, metric and number of samples."""
    return {row.task: row for design in found.designs for row in design.rows.values()}


def _unsure(run: Run) -> list[str]:
    """Why scores have no interval, those of a task with the same reason together."""
    models: dict[tuple[str, str], list[str]] = {}
    for variant in run.variants:
        for row in variant.scores.values():
            if row.note:
                models.setdefault((row.task, row.note), []).append(variant.name)
    return [f"{task}, {', '.join(names)}: {note}." for (task, note), names in models.items()]


def _steps(run: Run) -> list[tuple[list[str], str]]:
    """(what it made, command), each command once, in the order of the work."""
    steps: dict[str, list[str]] = {}
    for title, table in run.tables:
        history = table.history if isinstance(table, Origin) else ()
        for command in history or table.commands:
            steps.setdefault(command, [])
            if title not in steps[command]:
                steps[command].append(title)
    return [(titles, command) for command, titles in steps.items()]


def _losses(run: Run) -> tuple[list[str], dict[int, list[str]]]:
    """Names of the trained models, and step → the loss of each."""
    trained = {variant.name: variant.training for variant in run.variants if variant.training}
    curves = [{row.step: row.loss for row in training.rows} for training in trained.values()]
    return list(trained), {step: [printing.loss(curve.get(step)) for curve in curves] for step in _steps_of(curves)}


def _trials(run: Run) -> tuple[list[str], dict[int, list[str]]]:
    """Names of the models that were measured while they were trained, and step → the score of each."""
    measured = {
        variant.name: variant.training for variant in run.variants if variant.training and variant.training.trials
    }
    curves = [{row.step: row.score for row in training.trials} for training in measured.values()]
    return list(measured), {step: [printing.score(curve.get(step)) for curve in curves] for step in _steps_of(curves)}


def _steps_of(curves: Iterable[Mapping[int, object]]) -> list[int]:
    return sorted({step for curve in curves for step in curve})


def _settings(run: Run) -> list[tuple[list[str], Training]]:
    """Trainings with their models' names, those with the same settings together."""
    same: dict[str, tuple[list[str], Training]] = {}
    for variant in run.variants:
        if variant.training:
            same.setdefault(_settings_text(variant.training), ([], variant.training))[0].append(variant.name)
    return list(same.values())


def _settings_text(training: Training, say: Callable[[Any], Any] = lambda content: content) -> str:
    content = {"settings": say(dict(training.settings)), "prompts": dict(training.prompts)}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()


def _uses_text(titles: Sequence[str]) -> str:
    """Kinds of tables that a file was read for: ``training of 3 models``."""
    kinds: dict[str, int] = {}
    for title in titles:
        kind = title.split(maxsplit=1)[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{kind} ({number})" if number > 1 else kind for kind, number in kinds.items())


def _kept(origin: Origin) -> str:
    """Which blocks are kept: ``all``, ``the first 7``, or ranges of their numbers as ``--keep`` takes them."""
    if origin.kept == tuple(range(len(origin.kept))):
        number = len(origin.kept)
        return "all" if number == origin.depth else f"the first {number}" if number > 1 else "the first"
    return f"blocks {ranges(origin.kept)} (counted from 0, as by --keep)"


def _origins(run: Run) -> dict[str, Any]:
    """What all tables say of base models, data, seeds, versions, machine and time."""
    made = [table.provenance for _, table in run.tables]
    files: dict[Fingerprint, list[str]] = {}
    for title, table in run.tables:
        for file in table.provenance.data:
            files.setdefault(file, []).append(title)
    times = sorted(item.created for item in made)
    bases = dict.fromkeys(variant.origin.base_model for variant in run.variants if variant.origin)
    return {
        "bases": {base: card.base_licence(base) for base in bases},
        "files": files,
        "seeds": _seen(made, lambda item: {} if item.seed is None else {"seed": item.seed}).get("seed", ""),
        "versions": _seen(made, lambda item: item.versions),
        "hardware": _seen(made, lambda item: item.hardware),
        "first": times[0],
        "last": times[-1],
    }


def _seen(made: Iterable[Provenance], part: Callable[[Provenance], Mapping[str, Any]]) -> dict[str, str]:
    """Key → its values in all tables; more than one where the tables were made in different places."""
    values: dict[str, dict[str, None]] = {}
    for item in made:
        for key, value in part(item).items():
            values.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(seen) for key, seen in values.items()}


# Rendering ------------------------------------------------------------------------------------------------------------


def _inline_svg(drawing: Drawing, name: str) -> Markup:
    text = svg(drawing.figure, name, drawing.title, drawing.text, drawing.points)
    return Markup(text)  # noqa: S704  escaped as XML there


def _write(path: Path, text: str) -> None:
    # A lone surrogate, which JSON can hold, has no UTF-8.
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def _environment(markup: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("secateur.reporting"),
        autoescape=markup,  # noqa: S701  off for Markdown, whose own filters escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": printing.score, "signed": signed, "loss": printing.loss, "count": printing.count,
        "bytes": printing.byte_size, "percent": printing.percent, "speed": printing.speed,
        "check": printing.check, "decimal": printing.decimal, "seconds": printing.seconds, "given": printing.given,
        "duration": printing.duration, "moment": printing.moment, "capital": printing.capital,
        "plural": printing.plural, "md": printing.markdown, "code": printing.code, "fenced": printing.fenced,
        "printable": printable, "shorten": shorten, "svg_of": _inline_svg, "kept": _kept,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "settings_text": _settings_text, "uses_text": _uses_text,
        "public": card.public, "public_command": card.public_command,
    }  # fmt: skip
    environment.globals |= {"captions": captions, "span": span, "signed": signed, "speed": printing.speed}
    environment.globals |= {"percent": printing.percent, "public": card.public}
    return environment


_HTML = _environment(markup=True)
_TEXT = _environment(markup=False)  # Markdown: escaped by the filters md and fenced
