"""Results, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.choosing.choose import Candidates
    from secateur.exporting.manifest import Export
    from secateur.results import Comparison, CostRow, Profile, Scores
    from secateur.studies.runner import State


def summary(state: State, slots: int) -> str:
    """``5 done, 1 running, 7 waiting; about 12 min left``."""
    found = [state.of(step) for step in state.plan.steps]
    counts = ", ".join(f"{found.count(word)} {word}" for word in _WORDS if word in found)
    left = state.seconds_left / max(1, slots)
    return counts + (f"; about {duration(left)} left" if left else "")


_WORDS = ("done", "running", "waiting", "failed", "blocked")


def duration(seconds: float) -> str:
    """Two digits at most: it is an estimate."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{max(1, round(seconds))} s"


def show_steps(state: State, slots: int, console: Console | None = None) -> None:
    """A plan, or how far it is; times are estimates where a step has not finished."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for heading in ("step", "", "time", "needs"):
        table.add_column(heading, justify="right" if heading == "time" else "left", overflow="fold")
    for step in state.plan.steps:
        seconds, about = state.expected[step.name], "" if step.name in state.seconds else "about "
        needs = ", ".join(step.needs) if len(step.needs) < 4 else f"{len(step.needs)} models"
        word = state.of(step)
        took = "" if word == "done" and about else "?" if seconds is None else about + duration(seconds)
        table.add_row(escape(step.name), word, took, escape(needs))
    console = console or Console()
    console.print(table)
    console.print(summary(state, slots), highlight=False)
    for name, reason in state.failed.items():
        console.print(f"{name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def show_profile(profile: Profile) -> None:
    from rich.console import Console
    from rich.table import Table

    import secateur

    chosen = {depth: size for size, depth in secateur.choose(profile).items()} if profile.can_choose else {}
    table = Table(title=f"{profile.model}: {profile.depth} blocks, {profile.pooling}, scale {profile.scale:g}")
    # Where a profile could not tell (texts alone, no language-model head), the whole column is left out.
    columns = [name for name in _PROFILE_COLUMNS if any(getattr(row, name) is not None for row in profile.depths)]
    for heading in ("depth", *(_PROFILE_COLUMNS[name][0] for name in columns), "choice"):
        table.add_column(heading, justify="left" if heading == "choice" else "right")
    for row in profile.depths:
        values = ((_PROFILE_COLUMNS[name][1], getattr(row, name)) for name in columns)
        cells = ("" if value is None else form.format(value) for form, value in values)
        table.add_row(str(row.depth), *cells, chosen.get(row.depth, ""))
    Console().print(table)
    show_task_scores(profile)
    for note in profile.notes:
        typer.echo(f"note: {note}")


def show_task_scores(profile: Profile) -> None:
    """Tasks × depths, the best depth of each task marked."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not profile.task_scores:
        return
    scores: dict[str, dict[int, float]] = {}
    for row in profile.task_scores:
        scores.setdefault(f"{row.task} ({row.metric})", {})[row.depth] = row.score
    table = Table(title="zero-shot scores by depth; * the best of a task")
    table.add_column("depth", justify="right")
    for task in scores:
        table.add_column(escape(task), justify="right", overflow="fold")
    for depth in range(1, profile.depth + 1):
        cells = []
        for own in scores.values():
            mark = "*" if depth in own and own[depth] == max(own.values()) else " "
            cells.append(f"{own[depth]:.4f}{mark}" if depth in own else "")
        table.add_row(str(depth), *cells)
    Console().print(table)


_PROFILE_COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "loss_low": ("from", "{:.3f}"),
    "loss_high": ("to", "{:.3f}"),
    "chance": ("sure", "{:.0%}"),
    "ndcg_at_10": ("nDCG@10", "{:.3f}"),
    "next_token_loss": ("next token", "{:.2f}"),
    "block_influence": ("influence", "{:.3f}"),
    "effective_rank": ("rank", "{:.0f}"),
    "mean_cosine": ("cosine", "{:.3f}"),
}
"""Column of a profile → its heading and format."""


def show_export(result: Export) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    typer.echo(f"cosine with the original: least {result.cosine_min:.5f}, mean {result.cosine_mean:.5f}")
    if result.points_lost is not None:
        typer.echo(f"points lost on {len(result.rows)} tasks: {result.points_lost:.2f}")
    table = Table()
    for column in ("reader", "loads", "why"):
        table.add_column(column)
    for note in result.notes:
        table.add_row(note.reader, note.loads, escape(note.why))
    Console().print(table)


def show_candidates(found: Candidates) -> None:
    from rich.console import Console
    from rich.table import Table

    from secateur.choosing.choose import is_prefix, ranges

    table = Table(title=f"{found.model}: {found.depth} blocks", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    columns = [name for name in _CANDIDATE_COLUMNS if any(getattr(row, name) is not None for row in found.rows)]
    for heading in ("", "blocks", *(_CANDIDATE_COLUMNS[name][0] for name in columns)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in found.rows:
        values = ((_CANDIDATE_COLUMNS[name][1], getattr(row, name)) for name in columns)
        table.add_row(row.name, str(len(row.blocks)), *("" if value is None else show(value) for show, value in values))
    Console().print(table)
    typer.echo()
    for row in found.rows[1:]:
        kept = "" if is_prefix(row.blocks) else f"blocks {ranges(row.blocks)} (from 0), "
        typer.echo(f"{row.name}: {kept}{row.reason}" + (f" (note: {row.warning})" if row.warning else ""))
    for name, why in found.refused.items():
        typer.echo(f"{name}: cannot be told: {why}")


_CANDIDATE_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "chance": ("sure", "{:.0%}".format),
    "loss": ("loss", "{:.3f}".format),
    "loss_low": ("from", "{:.2f}".format),
    "loss_high": ("to", "{:.2f}".format),
    "parameters": ("params", lambda count: f"{count / 1e6:.1f}M"),
    "bytes": ("MB", lambda count: f"{count / 1e6:.0f}"),
    "flops_per_token": ("MFLOPs", lambda count: f"{count / 1e6:.0f}"),
    "latency": ("ms", lambda seconds: f"{1000 * seconds:.1f}"),
    "speed": ("speed", "{:.1f}×".format),
}
"""Column of a candidate → its heading and format."""


def show_scores(scores: Scores) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    models = list(dict.fromkeys(row.model for row in scores.rows))
    table = Table()
    table.add_column("task")
    for model in models:
        table.add_column(escape(model), justify="right", overflow="fold")
    for task, metric in dict.fromkeys((row.task, row.metric) for row in scores.rows):
        found = {row.model: _score(row.score, row.low, row.high) for row in scores.rows if row.task == task}
        table.add_row(escape(f"{task} ({metric})"), *(found.get(model, "") for model in models))
    table.add_section()
    table.add_row("average", *(f"{scores.average(model):.4f}" for model in models))
    Console().print(table)
    for task, note in dict.fromkeys((row.task, row.note) for row in scores.rows if row.note):
        typer.echo(f"note: {task}: {note}")


def _score(score: float, low: float | None, high: float | None, sign: str = "") -> str:
    """A score with its 95 % interval."""
    return f"{score:{sign}.4f}" + (f" [{low:{sign}.3f}, {high:{sign}.3f}]" if low is not None else "")


_COST_ROWS: dict[str, Callable[[CostRow], str]] = {
    "blocks": lambda row: str(row.depth),
    "parameters, M": lambda row: f"{row.parameters / 1e6:.1f}",
    "of them token table, M": lambda row: f"{row.embedding_parameters / 1e6:.1f}",
    "on disk, MB": lambda row: f"{row.bytes / 1e6:.1f}",
    "weights in memory, MB": lambda row: f"{row.memory_bytes / 1e6:.1f}",
    "peak memory, MB": lambda row: f"{row.peak_bytes / 1e6:.0f}" if row.peak_bytes is not None else "",
    "MFLOPs per token": lambda row: f"{row.flops_per_token / 1e6:.1f}",
    "load, s": lambda row: f"{row.load_seconds:.2f}",
    "one short text, ms (p50)": lambda row: f"{1000 * row.latency_p50:.1f}",
    "one short text, ms (p95)": lambda row: f"{1000 * row.latency_p95:.1f}",
    "short texts per s": lambda row: f"{row.texts_per_second:.1f} (batch {row.short_batch})",
    "long texts per s": lambda row: f"{row.long_texts_per_second:.2f} (batch {row.long_batch})",
}


def show_costs(rows: Sequence[CostRow]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first = rows[0]
    table = Table(title=escape(f"costs on {first.device}, {first.threads} threads, {first.dtype}"))
    table.add_column("")
    for row in rows:
        table.add_column(escape(row.model), justify="right", overflow="fold")
    for name, show in _COST_ROWS.items():
        cells = [show(row) for row in rows]
        if any(cells):
            table.add_row(name, *cells)
    Console().print(table)


def show_comparison(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if comparison.differences:
        table = Table(title=escape(f"score minus that of {comparison.reference}, with its 95 % interval"))
        for column in ("task", "model", "score", "difference", ""):
            table.add_column(column, justify="left" if column in ("task", "model") else "right", overflow="fold")
        for row in comparison.differences:
            verdict = "" if row.low is None else "outside the error" if row.apart else "within the error"
            difference = _score(row.difference, row.low, row.high, "+")
            task = f"{row.task} ({row.metric})" if row.task else "mean"
            table.add_row(escape(task), escape(row.model), f"{row.score:.4f}", difference, verdict)
        console.print(table)
    if comparison.costs:
        show_costs(comparison.costs)
    for own in comparison.overlaps:
        share = f"{100 * own.overlap:.1f} % of each text's {own.neighbours} nearest texts"
        console.print(escape(f"\n{own.model} keeps {share} ({own.texts} texts). Those that changed most:"))
        for changed in comparison.changed:
            if changed.model == own.model:
                console.print(escape(f"  {100 * changed.overlap:3.0f} %  {_line(changed.text)}"))
                for sign, texts in (("-", changed.lost), ("+", changed.gained)):
                    for text in texts[:2]:
                        console.print(escape(f"         {sign} {_line(text)}"))


def _line(text: str, width: int = 90) -> str:
    """A text on one line, without control characters."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    plain = " ".join(plain.split())
    return plain if len(plain) <= width else plain[: width - 1] + "…"
