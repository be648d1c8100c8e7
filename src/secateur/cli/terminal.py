"""What the terminal shows: results as tables, and progress as bars; in a log, lines."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from secateur import document as doc
from secateur.document import Cell, Table, with_interval

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import Task

    from secateur.choosing.budgets import VocabularyCosts
    from secateur.choosing.choose import Candidate, Candidates, Rung, Rungs
    from secateur.evaluation.task_folder import MadeTask, TaskCheck
    from secateur.exporting.export import Export
    from secateur.progress import Progress
    from secateur.results import Comparison, CostRow, Profile, Scores, Scout, VocabularyRow
    from secateur.studies.steps import State


def _show(table: Table, console: Console | None = None) -> None:
    from rich.console import Console

    (console or Console()).print(table.to_rich())


def show_steps(state: State, console: Console | None = None) -> None:
    """A plan, or how far it is, and why steps failed."""
    from rich.console import Console

    console = console or Console()
    _show(replace(state.table, title=""), console)
    console.print(state.summary, highlight=False)
    lines = [f"{name}: {reason}" for name, reason in state.failed.items()]
    for line in [*lines, *(f"note: {note}" for note in state.plan.notes)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_profile(profile: Profile) -> None:
    import secateur
    from secateur.reporting.tables import depth_scores_table, profile_table

    _show(profile_table(profile, secateur.choose(profile) if profile.can_choose else {}))
    if profile.task_scores:
        _show(depth_scores_table(profile))
    for note in profile.notes:
        typer.echo(f"note: {note}")


def show_scout(scout: Scout) -> None:
    import secateur

    show_candidates(secateur.candidates(scout))
    for note in scout.notes:
        typer.echo(f"note: {note}")


def show_candidates(found: Candidates | Rungs) -> None:
    from secateur.choosing.choose import Candidates, ranges
    from secateur.choosing.selectors import is_prefix

    if not isinstance(found, Candidates):
        _show_rungs(found)
        return
    columns: dict[str, Callable[[Candidate], str | Cell]] = {  # short: they fit into 80 characters
        "name": lambda row: row.name,
        "layers": lambda row: str(len(row.blocks)),
        "prob.": lambda row: doc.number(row.selection_probability, ".0%"),
        "loss": lambda row: doc.loss(row.loss),
        "from": lambda row: doc.number(row.loss_low, ".2f"),
        "to": lambda row: doc.number(row.loss_high, ".2f"),
        "params": lambda row: doc.count(row.parameters),
        "MB": lambda row: doc.number(row.bytes and row.bytes / 1e6, ".0f"),
        "MFLOPs": lambda row: doc.number(row.flops_per_token and row.flops_per_token / 1e6, ".0f"),
        "ms": lambda row: doc.number(row.latency and 1000 * row.latency),
        "speed": lambda row: doc.NONE if row.speed is None else f"{row.speed:.1f}×",
    }
    _show(Table.of(f"{found.model}: {found.depth} layers", found.rows, columns).filled())
    for row in found.rows[1:]:
        noun = "layers" if len(row.blocks) > 1 else "layer"
        kept = "" if is_prefix(row.blocks) else f"{noun} {ranges(row.blocks)} (from 0), "
        typer.echo(f"{row.name}: {kept}{row.reason}" + (f" (note: {row.warning})" if row.warning else ""))
    for name, why in found.refused.items():
        typer.echo(f"{name}: cannot be told: {why}")
    _show_vocabularies(found.vocabulary)


def _show_rungs(found: Rungs) -> None:
    columns: dict[str, Callable[[Rung], str | Cell]] = {  # short: they fit into 80 characters
        "layers": lambda row: f"{row.depth}{'' if row.trained else '*'}",
        "score": lambda row: with_interval(row.score, row.low, row.high),
        "difference": lambda row: (
            doc.NONE
            if row.depth == found.depth
            else with_interval(row.difference, row.difference_low, row.difference_high, doc.signed)
        ),
        "params": lambda row: doc.count(row.parameters),
        "speed": lambda row: doc.NONE if row.speed is None else f"{row.speed:.1f}×",
        "": lambda row: "chosen" if row.depth == found.chosen else "" if row.fits else "over budget",
    }
    from secateur.reporting.run import judge_in_words

    title = f"{found.model}: scores × 100 on {judge_in_words(found.judge, found.tasks)}, with 95 % intervals"
    _show(Table.of(title, found.rows, columns).filled())
    if not all(row.trained for row in found.rows):
        typer.echo("* scored without having been trained itself")
    typer.echo(found.reason)
    _show_vocabularies(found.vocabulary)


def _show_vocabularies(found: VocabularyCosts | None) -> None:
    if found is None:
        return
    columns: dict[str, Callable[[VocabularyRow], str | Cell]] = {
        "tokens": lambda row: f"{row.tokens:,}",
        "coverage": lambda row: doc.percent(row.coverage),
        "texts changed": lambda row: doc.percent(row.changed),
        "unknown": lambda row: doc.percent(row.unknown) if row.unknown else "",
        "tokens per text": lambda row: doc.number(row.tokens_per_text),
        "params": lambda row: doc.count(row.parameters),
        "MB": lambda row: doc.number(row.bytes and row.bytes / 1e6),
        "": lambda row: "chosen" if row.tokens == found.size else "",
    }
    typer.echo()
    _show(Table.of(f"vocabularies, with {doc.plural(found.layers, 'layer')}", found.rows, columns).filled())
    typer.echo(found.reason)
    typer.echo(f"\n{found.command}")


def show_export(result: Export) -> None:
    typer.echo(f"cosine with the original: least {result.cosine_min:.5f}, mean {result.cosine_mean:.5f}")
    if result.points_lost is not None:
        typer.echo(f"points lost on {doc.plural(len(result.rows), 'task')}: {result.points_lost:.2f}")


def show_scores(scores: Scores) -> None:
    """Tasks × models, the more numerous as rows."""
    models = list(dict.fromkeys(row.model for row in scores.rows))
    rows: list[list[str | Cell]] = []
    for task, metric in dict.fromkeys((row.task, row.metric) for row in scores.rows):
        found = {row.model: with_interval(row.score, row.low, row.high) for row in scores.rows if row.task == task}
        rows.append([f"{task} ({metric})", *(found.get(model, "") for model in models)])
    rows.append(["average", *(doc.score(scores.average(model)) for model in models)])
    are_many = len(models) > len(rows)
    table = Table("scores × 100, with 95 % intervals", ("model" if are_many else "task", *models), rows)
    _show(table.transposed() if are_many else table)
    for task, note in dict.fromkeys((row.task, row.note) for row in scores.rows if row.note):
        typer.echo(f"note: {task}: {note}")


def show_checks(checks: Sequence[TaskCheck]) -> None:
    for check in checks:
        if (task := check.task) is None:
            typer.echo(f"{check.path}: cannot be scored\n  wrong: {check.problem}")
            continue
        called = "" if Path(check.path).resolve().name.startswith(task.name) else f', called "{task.name}"'
        typer.echo(f"{check.path}: {task.what}, scored as {task.type} by {task.metric}{called}")
        typer.echo("  rows: " + ", ".join(f"{name} {len(rows):,}" for name, rows in task.tables.items()))
        for word, text in (("instruction", task.instruction), ("note", task.note)):
            if text:
                typer.echo(f"  {word}: {text}")


def show_made_task(made: MadeTask) -> None:
    source = doc.plural(made.texts, "text", ",")
    typer.echo(f"{made.name}: {made.how}, made from {source}; no person judged what is relevant")
    typer.echo(f"  {made.queries:,} queries, {made.documents:,} documents")


def show_costs(rows: Sequence[CostRow]) -> None:
    from secateur.reporting.tables import cost_table

    _show(cost_table(rows).transposed())


def show_comparison(comparison: Comparison) -> None:
    rows = []
    for row in comparison.differences:
        outcome = "" if row.low is None else "significant" if row.apart else "not significant"
        task = f"{row.task} ({row.metric})" if row.task else "mean"
        difference = with_interval(row.difference, row.low, row.high, doc.signed)
        rows.append((task, row.model, outcome, doc.score(row.score), difference))
    if rows:
        title = f"scores × 100, and their difference to {comparison.reference} with its 95 % interval"
        _show(Table(title, ("task", "model", "", "score", "difference"), rows, texts=3))
    if comparison.costs:
        show_costs(comparison.costs)
    for own in comparison.overlaps:
        share = f"{doc.percent(own.overlap)} of each text's {own.neighbours} nearest texts"
        if own.similarity is not None:
            share += f"; those that it finds are {doc.percent(own.similarity)} as similar"
        affected = [changed for changed in comparison.changed if changed.model == own.model]
        most = " Those that changed most:" if affected else ""
        typer.echo(f"\n{own.model} keeps {share} ({own.texts} texts).{most}")
        for changed in affected:
            typer.echo(f"  {doc.percent(changed.overlap, 0):>5}  {_short(changed.text)}")
            for sign, texts in (("-", changed.lost), ("+", changed.gained)):
                for text in texts[:2]:
                    typer.echo(f"         {sign} {_short(text)}")


def _short(text: str) -> str:
    return doc.shorten(" ".join(text.split()), 90)


# Progress -------------------------------------------------------------------------------------------------------------

EVERY = 60.0
"""Seconds between two lines of a log."""
SPEAKS = "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"
"""Of the processes of a training, the first speaks."""


@contextmanager
def _bars(name: str) -> Iterator[Bars]:
    """Bars on standard error, with the time left; in a log, every minute a line for each that is not full."""
    from rich import progress as rich
    from rich.console import Console

    warnings.filterwarnings("ignore")
    console = Console(stderr=True)
    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn()]
    hidden = not (console.is_interactive and sys.stderr.isatty())  # FORCE_COLOR makes no terminal of a log
    # The time left is told by the last ten minutes: a piece of work may take minutes.
    with rich.Progress(*columns, console=console, disable=hidden, speed_estimate_period=600) as bars:
        ended = threading.Event()
        log = threading.Thread(target=_write_log, args=(bars, name, ended), daemon=True)
        if hidden and SPEAKS:
            log.start()
        try:
            yield bars
        finally:
            ended.set()


def _write_log(bars: Bars, name: str, ended: threading.Event) -> None:
    began = time.monotonic()
    while not ended.wait(EVERY):
        lines = [_line(task) for task in bars.tasks if task.total is None or task.completed < task.total]
        for line in lines or [f"{name}: {doc.duration(time.monotonic() - began)} so far"]:
            typer.echo(f"{time.strftime('%H:%M:%S')}  {line}", err=True)


def _line(task: Task) -> str:
    """``heal (blocks): 3,200 of 64,000, 95 s so far, about 30 min left``."""
    if words := task.fields.get("words"):
        return f"study: {words()}"
    done, elapsed, before = task.completed, task.elapsed or 0.0, task.fields.get("before", 0)
    parts = [f"{done:,.0f} of {task.total:,.0f}" if task.total else f"{done:,.0f}"] if task.total or done else []
    parts.append(f"{doc.duration(elapsed)} so far")
    if task.total and done > before:
        parts.append(f"about {doc.duration(elapsed * (task.total - done) / (done - before))} left")
    return f"{task.description}: {', '.join(parts)}"


def _move(bars: Bars, tasks: dict[str, Any], what: str, done: int, total: int) -> None:
    """Move the bar of a piece of work. At 0 it begins anew; what is done at first was done by an earlier run."""
    if what not in tasks:
        tasks[what] = bars.add_task(what, total=None, before=done)
    elif done == 0:
        bars.reset(tasks[what], before=0)
    bars.update(tasks[what], completed=done, total=total or None)


@contextmanager
def work_bars(name: str) -> Iterator[Progress]:
    """A bar for each piece of the work of a command; in a log, a line for each when done, too."""
    tasks: dict[str, Any] = {}
    with _bars(name) as bars:

        def progress(what: str, done: int, total: int) -> None:
            _move(bars, tasks, what, done, total)
            if 0 < done == total and bars.disable:
                typer.echo(f"{what}: {total} in {bars.tasks[tasks[what]].elapsed or 0:.0f} s", err=True)

        yield progress


@contextmanager
def study_bars() -> Iterator[tuple[Progress, Callable[[State], None]]]:
    """The plan, then a bar for the study and one for each running step, and a line for each that has ended."""
    tasks: dict[str, Any] = {}
    told: set[str] = set()
    with _bars("study") as bars:
        whole = bars.add_task("study", total=None)
        say = partial(bars.console.print, markup=False, highlight=False, soft_wrap=True)

        def callback(state: State) -> None:
            if not told:
                show_steps(state, bars.console)
                told.update(("", *state.done, *state.plan.notes))
            for name in state.running.keys() - tasks.keys():
                _move(bars, tasks, name, 0, 0)
            ended = {name: f"{state.seconds.get(name, 0):.0f} s" for name in state.done}
            ended |= {name: f"failed: {reason}" for name, reason in state.failed.items()}
            for note in (note for note in state.plan.notes if note not in told):
                say(f"note: {note}")
            for name in sorted(ended.keys() - told):
                say(f"{time.strftime('%H:%M:%S')}  {name}: {ended[name]}")
                if name in tasks:
                    bars.remove_task(tasks.pop(name))
            told.update(ended, state.plan.notes)
            # In a log the time left is told anew each minute.
            total, said = len(state.plan.steps), state.summary
            bars.update(whole, completed=len(state.done), total=total, description=said, words=lambda: state.summary)

        yield partial(_move, bars, tasks), callback
