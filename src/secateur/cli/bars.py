"""Progress, as bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from secateur.cli.tables import show_steps, summary

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from secateur.progress import Progress
    from secateur.studies.runner import State


@contextmanager
def _bars() -> Iterator[Bars]:
    """Bars on standard error, with the time left; none in a log."""
    import warnings

    from rich import progress as rich
    from rich.console import Console

    warnings.filterwarnings("ignore")
    console = Console(stderr=True)
    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn()]
    columns += [rich.TextColumn("{task.fields[rate]}")]
    hidden = not console.is_terminal
    # The speed is that of the last ten minutes: a piece of work may take minutes.
    with rich.Progress(*columns, console=console, disable=hidden, speed_estimate_period=600) as bars:
        yield bars


@contextmanager
def work_bars() -> Iterator[Progress]:
    """A bar for each piece of work; in a log, one line for each when done."""
    import time

    tasks: dict[str, tuple[Any, float, int]] = {}  # the bar, its start, and what an earlier run had done before
    with _bars() as bars:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks or done == 0:
                bar = bars.add_task(what, total=total or None, completed=done, rate="")
                tasks[what] = bar, time.monotonic(), done
            bar, started, before = tasks[what]
            seconds = time.monotonic() - started
            rate = f"{per_second(done - before, seconds)}/s" if seconds >= 1 else ""
            bars.update(bar, completed=done, total=total or None, rate=rate)
            if 0 < done == total and not bars.console.is_terminal:
                typer.echo(f"{what}: {total} in {seconds:.0f} s" + (f", {rate}" if rate else ""), err=True)

        yield progress


def per_second(done: int, seconds: float) -> str:
    """A rate in three digits or more: ``4.27``, ``31.2``, ``5,311``."""
    rate = done / seconds
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


@contextmanager
def study_bars(slots: int) -> Iterator[tuple[Progress, Callable[[State], None]]]:
    """The plan, then a bar for the study and one for each running step, and a line for each that has ended."""
    import time

    tasks: dict[str, Any] = {}
    told: set[str] = set()
    with _bars() as bars:
        whole = bars.add_task("", rate="")

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:  # before the first step, such as reading the preset's data
                tasks[what] = bars.add_task(what, total=None, rate="")
            bars.update(tasks[what], completed=done, total=total or None)

        def callback(state: State) -> None:
            if not told:
                show_steps(state, slots, bars.console)
                told.update(("", *state.done, *state.plan.notes))
            for name in state.running.keys() - tasks.keys():
                tasks[name] = bars.add_task(name, total=None, rate="")
            ended = {name: f"{state.seconds.get(name, 0):.0f} s" for name in state.done}
            ended |= {name: f"failed: {reason}" for name, reason in state.failed.items()}
            for note in state.plan.notes:
                if note not in told:
                    bars.console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
                    told.add(note)
            for name in sorted(ended.keys() - told):
                line = f"{time.strftime('%H:%M:%S')}  {name}: {ended[name]}"
                bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
                if name in tasks:
                    bars.remove_task(tasks.pop(name))
            told.update(ended)
            total, words = len(state.plan.steps), summary(state, slots)
            bars.update(whole, completed=len(state.done), total=total, description=words)

        yield progress, callback
