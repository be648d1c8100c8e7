"""The commands. No logic: options come from :mod:`.config`, work is done by the functions of the same names.

A mistake of the user gives one line on standard error and exit code 2; ``SECATEUR_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from secateur import config
from secateur.errors import SecateurError

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.artifacts import Comparison, CostRow, Profile, Scores
    from secateur.choosing.candidates import Candidates
    from secateur.exporting.export import Export
    from secateur.progress import Progress
    from secateur.studies.runner import State, Watch

app = typer.Typer(
    help="Cut a language model down to the text encoder you can afford.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

UsageError: Any = typer.BadParameter.__base__
"""An option or command that does not exist. Its home depends on the version: typer brings a click of its own."""


def main() -> None:
    """Run a command; turn what goes wrong into one line."""
    try:
        # typer returns the code of a click.Exit (--help) instead of raising it.
        sys.exit(app(_spread(sys.argv[1:]), prog_name="secateur", standalone_mode=False) or 0)
    except SecateurError as error:
        _fail(str(error), 2)
    except UsageError as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on where it can", 130)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2)
    except Exception as error:  # the last line of defence: a bug, said in one line
        _fail(f"unexpected {type(error).__name__}: {error}; SECATEUR_DEBUG=1 shows where", 1)


def _fail(message: str, code: int) -> None:
    if os.environ.get("SECATEUR_DEBUG"):
        raise  # called from an except block only
    typer.echo("secateur: " + " ".join(message.split()), err=True)
    sys.exit(code)


def _spread(arguments: list[str]) -> list[str]:
    """Let options that take several values be given once: ``--data a b`` becomes ``--data a --data b``.

    ``study status`` and ``study resume`` are commands whose names have a blank.
    """
    several = {"--data", "--tasks", "--texts", "--depths", "--dims", "--eval-data", "--eval-tasks"}
    several |= {"--recipes", "--seeds"}
    if tuple(arguments[:2]) in (("study", "status"), ("study", "resume")):
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    spread: list[str] = []
    current = ""
    for argument in arguments:
        if argument.startswith("-"):
            current = argument if argument in several else ""
            spread += [] if current else [argument]
        else:
            spread += [current, argument] if current else [argument]
    return spread


def _command(options: type[config.Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command whose arguments are the fields of ``options``, each also settable by ``--config FILE.yaml``."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            file, extra = (
                given.pop("config"),
                {key: given.pop(key) for key in list(given) if key not in options.model_fields},
            )
            values = config.read_yaml(Path(file)) if file else {}
            values |= {key: value for key, value in given.items() if value not in (None, [], ())}
            run(config.make(options, values), **extra)

        extras = list(inspect.signature(run).parameters.values())[1:]
        parameters = [_parameter(options, name) for name in options.model_fields]
        parameters += [*(p.replace(annotation=_resolve(run, p), kind=p.KEYWORD_ONLY) for p in extras), _CONFIG]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        name = run.__name__.removesuffix("_command").replace("_", " ")
        sentence, _, example = (options.__doc__ or "").partition("Example:")
        text = f"{' '.join(sentence.split())}\n\nExample: {' '.join(example.split())}"
        app.command(name, help=text, short_help=" ".join(sentence.split()))(command)
        return run

    return decorate


def _resolve(run: Callable[..., None], parameter: inspect.Parameter) -> Any:
    return inspect.get_annotations(run, eval_str=True)[parameter.name]


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[str | None, typer.Option("--config", help="YAML file with options; those given here win.")],
)


def _parameter(options: type[config.Options], name: str) -> inspect.Parameter:
    """One field as typer wants it: optional for the parser, since it may come from the configuration file."""
    field = options.model_fields[name]
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = config.default_of(options, name)
    text = field.description or ""
    kind = _plain(field.annotation)
    info: Any
    if extra.get("argument"):
        info = typer.Argument(
            help=text,
            show_default=False,
            metavar=name.upper().rstrip("S") + ("..." if get_origin(kind) is list else ""),
        )
    else:
        flag = "--" + name.replace("_", "-")
        names = [flag, *([str(extra["short"])] if "short" in extra else [])]
        if kind is bool:
            names = [f"{flag}/--no-{flag[2:]}"]
        shown = " ".join(map(str, default)) if isinstance(default, (list, dict)) else default
        suffix = f" [default: {shown}]" if shown not in (None, False, "") else ""
        required = " [required]" if field.is_required() else ""
        metavar = f"{name.upper().rstrip('S')}..." if get_origin(kind) is list else None
        info = typer.Option(*names, help=text + suffix + required, show_default=False, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _plain(annotation: Any) -> Any:
    """The type that the parser checks; the rest is pydantic's: a choice is a text, a path stays a text."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    if get_origin(annotation) is Literal or annotation is Path:
        return str
    if get_origin(annotation) in (list, dict):
        return list[str]
    return annotation


@_command(config.ProfileOptions)
def profile_command(options: config.ProfileOptions) -> None:
    import secateur

    with _bars() as progress:
        result = secateur.profile(**_given(options), progress=progress)
    _show_profile(result)
    typer.echo(f"\n{options.out / 'profile.json'}")
    for picture in sorted(options.out.glob("*.png")):
        typer.echo(picture)


@_command(config.ChooseOptions)
def choose_command(
    options: config.ChooseOptions,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    import secateur

    found = secateur.candidates(**_given(options))
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    _show_candidates(found)


@_command(config.PruneOptions)
def prune_command(options: config.PruneOptions) -> None:
    import secateur
    from secateur.artifacts import Origin, load

    with _bars() as progress:
        folder = secateur.prune(**_given(options), progress=progress)
    left_out = load(folder, Origin).left_out
    if left_out:
        typer.echo(f"left out: {', '.join(left_out)}", err=True)
    typer.echo(folder)


@_command(config.HealOptions)
def heal_command(options: config.HealOptions) -> None:
    import secateur
    from secateur.artifacts import Training, load

    with _bars() as progress:
        folder = secateur.heal(**_given(options), progress=progress)
    typer.echo(f"trained by {load(folder, Training).settings['objective']}", err=True)
    typer.echo(folder)


@_command(config.EvaluateOptions)
def evaluate_command(options: config.EvaluateOptions) -> None:
    import secateur

    with _bars() as progress:
        scores = secateur.evaluate(**_given(options), progress=progress)
    _show_scores(scores)
    typer.echo(f"\n{options.out / 'scores.json'}")


@_command(config.CostOptions)
def cost_command(options: config.CostOptions) -> None:
    import secateur

    with _bars() as progress:
        costs = secateur.cost(**_given(options), progress=progress)
    _show_costs(costs.rows)
    typer.echo(f"\n{options.out / 'costs.json'}")


@_command(config.CompareOptions)
def compare_command(options: config.CompareOptions) -> None:
    import secateur

    with _bars() as progress:
        comparison = secateur.compare(**_given(options), progress=progress)
    _show_comparison(comparison)
    typer.echo(f"\n{options.out / 'comparison.json'}")


@_command(config.ExportOptions)
def export_command(options: config.ExportOptions) -> None:
    import secateur

    with _bars() as progress:
        result = secateur.export(**_given(options), progress=progress)
    _show_export(result)
    typer.echo(f"\n{options.out}")


@_command(config.ReportOptions)
def report_command(options: config.ReportOptions) -> None:
    import secateur

    typer.echo(secateur.report(**_given(options)))


@_command(config.StudyOptions)
def study_command(
    options: config.StudyOptions,
    *,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the steps and their estimated times, and do nothing.")
    ] = False,
) -> None:
    import secateur

    if plan:
        with _bars() as progress:
            state = secateur.plan_study(**_given(options), progress=progress)
        _show_steps(state, options.jobs)
        return
    _study(_given(options))


@_command(config.StatusOptions)
def study_status_command(options: config.StatusOptions) -> None:
    import secateur

    _show_steps(secateur.read_status(options.run), 1)


@_command(config.ResumeOptions)
def study_resume_command(options: config.ResumeOptions) -> None:
    import secateur

    secateur.read_status(options.run)  # a folder without a study is no place to begin one
    given = _given(options)
    _study({"out": given.pop("run"), **given})


def _study(given: dict[str, Any]) -> None:
    import secateur
    from secateur.errors import DataError

    with _study_bars(int(given.get("jobs", 1))) as (progress, watch):
        page = secateur.study(**given, progress=progress, watch=watch)
    with suppress(DataError):  # a study without tasks has no scores
        _show_scores(secateur.read_scores(given["out"]))
    typer.echo(f"\n{page}")


@_command(config.EncodeOptions)
def encode_command(options: config.EncodeOptions) -> None:
    import secateur

    with _bars() as progress:
        done = secateur.encode(**_given(options), progress=progress)
    typer.echo(
        f"{done.rows} rows, {done.distinct} distinct texts, {done.dimension} numbers each, {done.dtype}", err=True
    )
    if done.encoded:
        typer.echo(f"encoded {done.encoded} texts, {done.encoded / done.seconds:.1f} per second", err=True)
    typer.echo(done.file)


@_command(config.ServeOptions)
def serve_command(options: config.ServeOptions) -> None:
    import secateur

    secateur.serve(**_given(options))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("secateur"))
        raise typer.Exit


def _given(options: config.Options) -> dict[str, Any]:
    """The options that the user set, so that the functions' own defaults and a study's earlier settings hold."""
    return {name: getattr(options, name) for name in options.model_fields_set}


@contextmanager
def _bars() -> Iterator[Progress]:
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
        bars.TextColumn("{task.description}"), *amount, *times, console=console, disable=not console.is_terminal
    ) as shown:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks or done == 0:
                tasks[what] = shown.add_task(what, total=total, rate="")
                started[what], since[what] = time.monotonic(), done
            seconds = time.monotonic() - started[what]
            rate = f"{(done - since[what]) / seconds:.3g}/s" if seconds >= 1 else ""
            shown.update(tasks[what], completed=done, total=total, rate=rate)
            if done == total and not console.is_terminal:
                typer.echo(f"{what}: {total} in {seconds:.0f} s" + (f", {rate}" if rate else ""), err=True)

        yield progress


@contextmanager
def _study_bars(slots: int) -> Iterator[tuple[Progress, Watch]]:
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
                _show_steps(state, slots, console)
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
            shown.update(tasks[""], completed=done, total=total, description=_summary(state, slots))

        yield progress, watch


def _summary(state: State, slots: int) -> str:
    """``5 done, 1 running, 7 waiting; about 12 min left``."""
    found = [state.of(step) for step in state.plan.steps]
    counts = ", ".join(f"{found.count(word)} {word}" for word in _WORDS if word in found)
    left = state.seconds_left / max(1, slots)
    return counts + (f"; about {_duration(left)} left" if left else "")


_WORDS = ("done", "running", "waiting", "failed", "blocked")


def _duration(seconds: float) -> str:
    """Two digits at most: it is an estimate."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{max(1, round(seconds))} s"


def _show_steps(state: State, slots: int, console: Console | None = None) -> None:
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
        took = "" if word == "done" and about else "?" if seconds is None else about + _duration(seconds)
        table.add_row(escape(step.name), word, took, escape(needs))
    console = console or Console()
    console.print(table)
    console.print(_summary(state, slots), highlight=False)
    for name, reason in state.failed.items():
        console.print(f"{name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _show_profile(profile: Profile) -> None:
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
    _show_task_scores(profile)
    for note in profile.notes:
        typer.echo(f"note: {note}")


def _show_task_scores(profile: Profile) -> None:
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


def _show_export(result: Export) -> None:
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


def _show_candidates(found: Candidates) -> None:
    from rich.console import Console
    from rich.table import Table

    from secateur.choosing.candidates import is_prefix, ranges

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
        kept = "" if is_prefix(row.blocks) else f"blocks {ranges(row.blocks)}, "
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


def _show_scores(scores: Scores) -> None:
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


def _show_costs(rows: Sequence[CostRow]) -> None:
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


def _show_comparison(comparison: Comparison) -> None:
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
        _show_costs(comparison.costs)
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


if __name__ == "__main__":
    main()
