"""Arguments of a command, made from the fields of its options, and the check of what they name.

Files and folders are looked at before anything heavy is imported, with the functions that the steps use themselves and
in their words: a mistake is told at once. Names on the Hub, tasks and large data are left to the step.
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from secateur.errors import ConfigError, DataError, OutputError
from secateur.files import check_is_file, check_results_folder, partial_folder
from secateur.models import is_endpoint, resolve
from secateur.options import Names, Options, default_of, extra, make, read_study, read_yaml


class Command(TyperCommand):
    """A command in which ``--data a b`` is ``--data a --data b``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {flag for own in self.params if getattr(own, "multiple", False) for flag in own.opts}
        expanded: list[str] = []
        current = ""
        for word, following in zip(args, [*args[1:], "-"], strict=False):
            if word.startswith("-"):
                current = word if word in several else ""
                if current and following.startswith("-") and not ctx.resilient_parsing:  # the shell's completion
                    raise ConfigError(word.lstrip("-"), None, "is given without a value", f"{word} takes one or more")
                expanded += [] if current else [word]
            else:
                expanded += [current, word] if current else [word]
        return super().parse_args(ctx, expanded)


class Commands(TyperGroup):
    """Commands, some of which have a name of two words: ``study status``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (both := " ".join(args[:2])) in self.commands:
            args = [both, *args[2:]]
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The first words alone: the shell completes files where the second could stand."""
        found = super().shell_complete(ctx, incomplete)
        for item in found:
            item.value = item.value.partition(" ")[0]
        return list({item.value: item for item in found}.values())


def command_of(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command whose arguments are the fields of its ``options``; ``--config FILE.yaml`` sets them too."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        own_options, *extras = inspect.signature(run, eval_str=True).parameters.values()
        options: type[Options] = own_options.annotation

        def command(**given: Any) -> None:
            if name != "heal" and (count := os.environ.get("WORLD_SIZE", "1")) != "1":
                problem = f"is {count}, and heal alone is done by several processes together"
                raise ConfigError("WORLD_SIZE", count, problem, f"start {name} without torchrun or accelerate launch")
            file = given.pop("config")
            own = {key: given.pop(key) for key in list(given) if key not in options.model_fields}
            here = {key: value for key, value in given.items() if value not in (None, [], ())}
            values = read_yaml(Path(file)) if file is not None else {}
            try:
                made = make(options, values | here, file and Path(file), here)
            except ConfigError as error:
                took = [key for key, value in here.items() if isinstance(value, list)]
                is_missing = error.key in fields and extra(options, error.key, "argument") and error.value is None
                if not (took and is_missing):
                    raise
                hint = f"name it before --{took[-1].replace('_', '-')}, which takes all words up to the next option"
                raise ConfigError(error.key, None, "is missing", hint) from None
            if getattr(made, "out", "") is None:
                raise ConfigError("out", None, "is missing", options.model_fields["out"].description or "")
            check_places(made)
            run(made, **own)

        fields = {name: _annotation(options, name) for name in options.model_fields}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=own)
            for name, own in (fields | {"config": Annotated[str | None, CONFIG]}).items()
        ]
        parameters += extras
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        name = run.__name__.removesuffix("_command").replace("_", " ")
        sentence, _, example = (" ".join(part.split()) for part in (options.__doc__ or "").partition("Example:"))
        text = f"{sentence}\n\nExample: {example}"
        app.command(name, cls=Command, help=text, short_help=sentence)(command)
        return run

    return decorate


CONFIG = typer.Option("--config", help="YAML file with options; those given here win.")
NUMBERS: dict[Any, str] = {int: "<int>", float: "<float>"}


def _annotation(options: type[Options], name: str) -> Any:
    """One field as typer wants it: optional words, which pydantic checks, since they may come from ``--config``."""
    field, default = options.model_fields[name], default_of(options, name)
    union = get_origin(field.annotation) in (Union, types.UnionType)
    bare = next(part for part in get_args(field.annotation) if part is not type(None)) if union else field.annotation
    several = get_origin(bare) in (list, dict)
    kind = list[str] if several else bool if bare is bool else str
    choices = list(map(str, get_args(bare))) if get_origin(bare) is Literal else []
    metavar = name.upper().rstrip("S")
    info: Any
    if extra(options, name, "argument"):
        info = typer.Argument(help=field.description, show_default=False, metavar=metavar)
    else:
        flag = "--" + name.replace("_", "-")
        names = [f"{flag}/--no-{flag[2:]}" if kind is bool else flag, *(["-o"] if name == "out" else [])]
        shown = " ".join(map(str, default)) if isinstance(default, (list, dict)) else default
        text = (field.description or "") + (f" [default: {shown}]" if shown not in (None, False, "") else "")
        text += " [required]" if field.is_required() or name == "out" else ""
        metavar = f"{metavar}..." if several else "|".join(choices) or NUMBERS.get(bare, "<str>")
        shown_as = None if kind is bool else metavar
        info = typer.Option(*names, help=text, show_default=False, metavar=shown_as, autocompletion=lambda: choices)
    return Annotated[kind | None, info]


def check_places(options: Options) -> None:
    """Look at all that the options of a command name, with the errors of the step itself."""
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        for mark in field.metadata if value is not None else ():
            if isinstance(mark, Names) and mark.what == "data":
                from secateur.data.sources import check_data

                check_data(value, getattr(options, "columns", None))
            elif isinstance(mark, Names):
                for item in value if isinstance(value, list) else [value]:
                    _check_place(name, mark, item)


def _check_place(name: str, mark: Names, item: Any) -> None:
    match mark.what:
        case "layers":
            from secateur.choosing.choose import needs_profile

            try:
                needs_profile(item)
            except ConfigError as error:
                raise error.of(name) from None
        case "profile":
            from secateur.choosing.choose import read_table

            read_table(item)
        case "model" if not is_endpoint(item):
            resolve(item)
        case "task" if not Path(item).exists():
            if item.startswith((".", "/", "~")) or (Path(item).parent != Path() and Path(item).parent.is_dir()):
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
