"""The commands. No logic: options come from :mod:`secateur.config`, work is done by the functions of the same names.

A mistake of the user gives one line on standard error and exit code 2; ``SECATEUR_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from secateur import config
from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.artifacts import Profile, Scores
    from secateur.progress import Progress

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
    """Let options that take several values be given once: ``--data a b`` becomes ``--data a --data b``."""
    several = {"--data", "--tasks", "--depths"}
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
        name = run.__name__.removesuffix("_command")
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
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
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
    if get_origin(annotation) is list:
        return list[str]
    return annotation


@_command(config.ProfileOptions)
def profile_command(options: config.ProfileOptions) -> None:
    import secateur

    with _bars() as progress:
        result = secateur.profile(**_given(options), progress=progress)
    _show_profile(result)
    typer.echo(f"\n{options.out / 'profile.json'}\n{options.out / 'curve.png'}")


@_command(config.ChooseOptions)
def choose_command(
    options: config.ChooseOptions,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    import secateur

    choice = secateur.choose(options.profile)
    if as_json:
        typer.echo(json.dumps(choice))
        return
    for size, depth in choice.items():
        typer.echo(f"{size}: {depth}")


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

    with _bars() as progress:
        folder = secateur.heal(**_given(options), progress=progress)
    typer.echo(folder)


@_command(config.EvaluateOptions)
def evaluate_command(options: config.EvaluateOptions) -> None:
    import secateur

    with _bars() as progress:
        scores = secateur.evaluate(**_given(options), progress=progress)
    _show_scores(scores)
    typer.echo(f"\n{options.out / 'scores.json'}")


@_command(config.ReportOptions)
def report_command(options: config.ReportOptions) -> None:
    import secateur

    typer.echo(secateur.report(options.run))


@_command(config.StudyOptions)
def study_command(options: config.StudyOptions) -> None:
    import secateur

    with _bars() as progress:
        page = secateur.study(**_given(options), progress=progress)
    _show_scores(secateur.read_scores(options.out))
    typer.echo(f"\n{page}")


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
    )
    tasks: dict[str, bars.TaskID] = {}
    started: dict[str, float] = {}
    with bars.Progress(
        bars.TextColumn("{task.description}"), *amount, *times, console=console, disable=not console.is_terminal
    ) as shown:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks or done == 0:
                tasks[what] = shown.add_task(what, total=total)
                started[what] = time.monotonic()
            shown.update(tasks[what], completed=done, total=total)
            if done == total and not console.is_terminal:
                typer.echo(f"{what}: {total} in {time.monotonic() - started[what]:.0f} s", err=True)

        yield progress


def _show_profile(profile: Profile) -> None:
    from rich.console import Console
    from rich.table import Table

    import secateur

    chosen = {depth: size for size, depth in secateur.choose(profile).items()} if profile.depth > 1 else {}
    table = Table(title=f"{profile.model}: {profile.depth} blocks, {profile.pooling}, scale {profile.scale:g}")
    for column in ("depth", "loss", "± se", "block influence", "effective rank", "choice"):
        table.add_column(column, justify="left" if column == "choice" else "right")
    for row in profile.depths:
        error = "" if row.loss_se is None else f"{row.loss_se:.3f}"
        numbers = (str(row.depth), f"{row.loss:.4f}", error, f"{row.block_influence:.3f}", f"{row.effective_rank:.0f}")
        table.add_row(*numbers, chosen.get(row.depth, ""))
    Console().print(table)


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
        found = {row.model: f"{row.score:.4f}" for row in scores.rows if row.task == task}
        table.add_row(escape(f"{task} ({metric})"), *(found.get(model, "") for model in models))
    table.add_section()
    table.add_row("average", *(f"{scores.average(model):.4f}" for model in models))
    Console().print(table)


if __name__ == "__main__":
    main()
