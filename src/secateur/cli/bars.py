"""Progress, as bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from secateur.progress import Progress
    from secateur.studies.runner import State

from secateur.cli.tables import show_steps, summary


@contextmanager
def work_bars() -> Iterator[Progress]:
    """Bars on standard error, one for each piece of work, with the time left; in a log, one line for each when done."""
    import time
    import warnings

    from rich import progress as bars
    from rich.console import Console

    warnings.filterwarnings("ignore")
    console = Console(stderr=True)
    amount: tuple[bars.ProgressColumn, ...] = (bars.BarColumn(), bars.MofNCompleteColumn())
    times: tuple[bars.ProgressColumn, ...] = (
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[rate]}"),
    )
    tasks: dict[str, bars.TaskID] = {}
    started: dict[str, float] = {}
    since: dict[str, int] = {}  # what a run that was stopped had done before
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        *amount,
        *times,
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=600,  # a piece of work may take minutes
    ) as shown:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks or done == 0:
                # An earlier run's work says nothing of the speed of this one.
                tasks[what] = shown.add_task(what, total=total or None, completed=done, rate="")
                started[what], since[what] = time.monotonic(), done
            seconds = time.monotonic() - started[what]
            rate = f"{per_second(done - since[what], seconds)}/s" if seconds >= 1 else ""
            shown.update(tasks[what], completed=done, total=total or None, rate=rate)
            if 0 < done == total and not console.is_terminal:
                typer.echo(f"{what}: {total} in {seconds:.0f} s" + (f", {rate}" if rate else ""), err=True)

        yield progress


def per_second(done: int, seconds: float) -> str:
    """A rate in three digits or more: ``4.27``, ``31.2``, ``5,311``."""
    rate = done / seconds
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


@contextmanager
def study_bars(slots: int) -> Iterator[tuple[Progress, Callable[[State], None]]]:
    """The plan, then on standard error a bar for the study and one for each running step; in a log, a line for each."""
    import time
    import warnings

    from rich import progress as bars
    from rich.console import Console

    warnings.filterwarnings("ignore")
    console = Console(stderr=True)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    tasks: dict[str, bars.TaskID] = {}
    told: set[str] = set()
    with bars.Progress(*columns, bars.TimeElapsedColumn(), console=console, disable=not console.is_terminal) as shown:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        def watch(state: State) -> None:
            if not told:
                show_steps(state, slots, console)
                told.update(("", *state.done))
            over = state.done | state.failed.keys()
            for name in sorted(over - told):
                line = (
                    f"failed: {state.failed[name]}" if name in state.failed else f"{state.seconds.get(name, 0):.0f} s"
                )
                shown.print(
                    f"{time.strftime('%H:%M:%S')}  {name}: {line}", markup=False, highlight=False, soft_wrap=True
                )
                if name in tasks:
                    shown.remove_task(tasks.pop(name))
            told.update(over)
            for name in state.running:
                if name not in tasks:
                    tasks[name] = shown.add_task(name, total=None)
            if "" not in tasks:
                tasks[""] = shown.add_task("")
            total, done = len(state.plan.steps), len(state.done)
            shown.update(tasks[""], completed=done, total=total, description=summary(state, slots))

        yield progress, watch
