"""Arguments of a command, made from the fields of its options, and the check of what they name.

Files and folders are looked at before anything heavy is imported, with the functions that the steps use themselves and
in their words: a mistake is told at once. Names on the Hub, tasks of mteb and large data are left to the step.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperGroup

from secateur.errors import ConfigError, DataError, OutputError
from secateur.evaluation.task_folder import read_task_folder
from secateur.files import check_is_file, check_results_folder, partial_folder
from secateur.models import is_endpoint, resolve
from secateur.options import Names, Options, default_of, extra, make, read_study, read_yaml


def expand_list_options(arguments: list[str]) -> list[str]:
    """Let options that take several values be given once: ``--data a b`` becomes ``--data a --data b``."""
    commands = [Options]
    for command in commands:
        commands += command.__subclasses__()
    several = {
        "--" + name.replace("_", "-")
        for command in commands
        for name, field in command.model_fields.items()
        if get_origin(_plain(field.annotation)) is list
    }
    expanded: list[str] = []
    current = ""
    for argument in arguments:
        if argument.startswith("-"):
            current = argument if argument in several else ""
            expanded += [] if current else [argument]
        else:
            expanded += [current, argument] if current else [argument]
    return expanded


class Commands(TyperGroup):
    """Commands, some of which have a name of two words: ``study status``."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """The command of the first words."""
        if (both := " ".join(args[:2])) in self.commands:
            args = [both, *args[2:]]
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> Any:  # type: ignore[override]
        """The first words alone: the shell completes files where the second could stand."""
        found: dict[str, Any] = {}
        for item in super().shell_complete(ctx, incomplete):
            item.value = item.value.partition(" ")[0]
            found.setdefault(item.value, item)
        return list(found.values())


def command_of(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command whose arguments are the fields of its ``options``; ``--config FILE.yaml`` sets them too."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        own_options, *extras = inspect.signature(run, eval_str=True).parameters.values()
        options: type[Options] = own_options.annotation

        def command(**given: Any) -> None:
            file = given.pop("config")
            own = {key: given.pop(key) for key in list(given) if key not in options.model_fields}
            values = read_yaml(Path(file)) if file else {}
            values |= {key: value for key, value in given.items() if value not in (None, [], ())}
            made = make(options, values)
            for name, field in options.model_fields.items():
                if extra(options, name, "required") and getattr(made, name) is None:
                    raise ConfigError(name, None, "is missing", field.description or "")
            check_places(made)
            run(made, **own)

        parameters = [*(_parameter(options, name) for name in options.model_fields), *extras, _CONFIG]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        name = run.__name__.removesuffix("_command").replace("_", " ")
        sentence, _, example = (options.__doc__ or "").partition("Example:")
        text = f"{' '.join(sentence.split())}\n\nExample: {' '.join(example.split())}"
        app.command(name, help=text, short_help=" ".join(sentence.split()))(command)
        return run

    return decorate


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[str | None, typer.Option("--config", help="YAML file with options; those given here win.")],
)


def _parameter(options: type[Options], name: str) -> inspect.Parameter:
    """One field as typer wants it: optional for the parser, since it may come from the configuration file."""
    field = options.model_fields[name]
    default = default_of(options, name)
    text = field.description or ""
    kind = _plain(field.annotation)
    several = get_origin(kind) is list
    metavar = name.upper().rstrip("S") + ("..." if several else "")
    info: Any
    if extra(options, name, "argument"):
        info = typer.Argument(help=text, show_default=False, metavar=metavar)
    else:
        flag, short = "--" + name.replace("_", "-"), extra(options, name, "short")
        names = [f"{flag}/--no-{flag[2:]}" if kind is bool else flag, *([short] if short else [])]
        shown = " ".join(map(str, default)) if isinstance(default, (list, dict)) else default
        text += f" [default: {shown}]" if shown not in (None, False, "") else ""
        text += " [required]" if field.is_required() or extra(options, name, "required") else ""
        choices = _choices(field.annotation)
        metavar = metavar if several else "|".join(choices)
        info = typer.Option(
            *names, help=text, show_default=False, metavar=metavar or None, autocompletion=lambda: choices
        )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _choices(annotation: Any) -> list[str]:
    """``finetune``, ``l3prune``, ``distill``, where an option takes one of a few words."""
    bare = _without_none(annotation)
    return list(map(str, get_args(bare))) if get_origin(bare) is Literal else []


def _plain(annotation: Any) -> Any:
    """The type that the parser checks; the rest is pydantic's: a choice is a text, a path stays a text."""
    bare = _without_none(annotation)
    if get_origin(bare) is Literal or bare in (Path, Any):
        return str
    return list[str] if get_origin(bare) in (list, dict) else bare


def _without_none(annotation: Any) -> Any:
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next(part for part in parts if part is not type(None))


SMALL = 8 << 20
"""Bytes of a task that are read here too: it takes less time than importing what a step needs."""


def check_places(options: Options) -> None:
    """Look at all that the options of a command name.

    Raises:
        SecateurError: As the step itself would.
    """
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        for mark in field.metadata if value is not None else ():
            if isinstance(mark, Names) and mark.what == "data":
                from secateur.data.sources import check_data

                check_data(value, getattr(options, "columns", None))
            elif isinstance(mark, Names):
                for item in value if isinstance(value, list) else [value]:
                    _check_place(mark, item)


def _check_place(mark: Names, item: Any) -> None:
    match mark.what:
        case "layers":
            from secateur.choosing.choose import needs_profile

            needs_profile(item)
        case "profile":
            from secateur.choosing.choose import read_table

            read_table(item)
        case "model" if not is_endpoint(item):
            resolve(item)
        case "task":
            folder = Path(item)
            if folder.exists():
                size = sum(file.stat().st_size for file in (folder, *folder.rglob("*")) if file.is_file())
                if size <= SMALL:
                    read_task_folder(folder)
            elif item.startswith((".", "/", "~")) or (folder.parent != Path() and folder.parent.is_dir()):
                hint = "give a task folder, or the name of an mteb task or benchmark"
                raise DataError(item, "no such file or folder", hint)
        case "file":
            check_is_file(item)
        case "study":
            read_study(item)
        case "run" if not item.is_dir():
            raise DataError(item, "no such folder", "name the folder that a study wrote")
        case "new folder":
            partial_folder(item)
        case "new file" if item.exists():
            raise OutputError(item, "exists already", "name another file, or remove this one")
        case "results" if mark.own is not None:
            check_results_folder(item, *mark.own)
        case "results" if item.exists() and not item.is_dir():
            raise OutputError(item, "is a file", "name a folder")
