"""What the site takes from the code: the commands, by typer; the arguments of the steps, which options give them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from secateur.cli.commands import app

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every command with its arguments and options where a page has the mark."""
    if MARK not in markdown:
        return markdown
    command = get_command(app)
    return markdown.replace(MARK, get_docs_for_click(obj=command, ctx=Context(command), name="secateur", indent=1))


class Steps(griffe.Extension):
    """A step's docstring and arguments are made when it is imported, so they are read from the function itself."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace what stands in the source."""
        if func.docstring and any(str(decorator.value).startswith("step(") for decorator in func.decorators):
            made = griffe.dynamic_import(func.path)
            func.docstring.value = made.__doc__
            func.parameters = griffe.Parameters(*map(_parameter, inspect.signature(made).parameters.values()))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write the names that docstrings refer to as plain code."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`[.~]*([\w.]+)`", r"`\1`", obj.docstring.value)


def _parameter(given: inspect.Parameter) -> griffe.Parameter:
    required = given.default is inspect.Parameter.empty
    default = getattr(given.default, "__name__", repr(given.default))
    return griffe.Parameter(
        given.name, kind=griffe.ParameterKind(given.kind.description), default=None if required else default
    )
