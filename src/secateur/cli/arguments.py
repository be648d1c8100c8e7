"""Arguments of a command, made from the fields of its options (:mod:`.config`)."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperGroup

from secateur.cli.places import check_places
from secateur.errors import ConfigError
from secateur.options import Options, default_of, extra, make, read_yaml


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
        """The first words; the second are completed as what else could stand there."""
        found: dict[str, Any] = {}
        for item in super().shell_complete(ctx, incomplete):
            item.value = item.value.partition(" ")[0]
            found.setdefault(item.value, item)
        return list(found.values())


def _second_words(ctx: typer.Context, incomplete: str) -> list[str]:
    """For a begun word after ``study``: its commands. The shell completes files where there are none."""
    names = ctx.parent.command.list_commands(ctx.parent) if ctx.parent and incomplete else []  # type: ignore[attr-defined]
    return [name.removeprefix(f"{ctx.info_name} ") for name in names if name.startswith(f"{ctx.info_name} ")]


def command_of(app: typer.Typer, options: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command whose arguments are the fields of ``options``; ``--config FILE.yaml`` sets them too."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
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


def _parameter(options: type[Options], name: str) -> inspect.Parameter:
    """One field as typer wants it: optional for the parser, since it may come from the configuration file."""
    field = options.model_fields[name]
    default = default_of(options, name)
    text = field.description or ""
    kind = _plain(field.annotation)
    info: Any
    if extra(options, name, "argument"):
        info = typer.Argument(
            help=text,
            show_default=False,
            metavar=name.upper().rstrip("S") + ("..." if get_origin(kind) is list else ""),
            autocompletion=_second_words,
        )
    else:
        flag = "--" + name.replace("_", "-")
        short = extra(options, name, "short")
        names = [flag, *([short] if short else [])]
        if kind is bool:
            names = [f"{flag}/--no-{flag[2:]}", *([old] if (old := extra(options, name, "old")) else [])]
        shown = " ".join(map(str, default)) if isinstance(default, (list, dict)) else default
        suffix = f" [default: {shown}]" if shown not in (None, False, "") else ""
        required = " [required]" if field.is_required() or extra(options, name, "required") else ""
        choices = _choices(field.annotation)
        metavar = f"{name.upper().rstrip('S')}..." if get_origin(kind) is list else "|".join(choices) or None
        info = typer.Option(
            *names,
            help=text + suffix + required,
            show_default=False,
            metavar=metavar,
            autocompletion=lambda: choices,
        )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _choices(annotation: Any) -> list[str]:
    """``finetune``, ``l3prune``, ``distill``, where an option takes one of a few words."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := _choices(part))), [])
    return list(map(str, get_args(annotation))) if get_origin(annotation) is Literal else []


def _plain(annotation: Any) -> Any:
    """The type that the parser checks; the rest is pydantic's: a choice is a text, a path stays a text."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    if get_origin(annotation) is Literal or annotation in (Path, Any):
        return str
    if get_origin(annotation) in (list, dict):
        return list[str]
    return annotation
