"""Progress: bars on a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from secateur.cli.tables import show_steps, summary
from secateur.document import duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import Task

    from secateur.progress import Progress
    from secateur.studies.runner import State


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
        for line in lines or [f"{name}: {duration(time.monotonic() - began)} so far"]:
            typer.echo(f"{time.strftime('%H:%M:%S')}  {line}", err=True)


def _line(task: Task) -> str:
    """``heal (blocks): 3,200 of 64,000, 95 s so far, about 30 min left``."""
    if words := task.fields.get("words"):
        return f"study: {words()}"
    done, elapsed, before = task.completed, task.elapsed or 0.0, task.fields.get("before", 0)
    parts = [f"{done:,.0f} of {task.total:,.0f}" if task.total else f"{done:,.0f}"] if task.total or done else []
    parts.append(f"{duration(elapsed)} so far")
    if task.total and done > before:
        parts.append(f"about {duration(elapsed * (task.total - done) / (done - before))} left")
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
            words, total = partial(summary, state), len(state.plan.steps)
            bars.update(whole, completed=len(state.done), total=total, description=words(), words=words)

        yield partial(_move, bars, tasks), callback
