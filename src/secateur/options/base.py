"""How an option is written down once, and what is made of it: the function's argument, the flag, the YAML key.

At the end stand the options that several commands share, each with its description.

A command's options are one class; its function is decorated with :func:`step`:

    class CutOptions(Options):
        '''Cut a model.'''
        model: Model
        layers: int = Field(6, ge=1, description="Number of layers to keep.")

    @step(CutOptions)
    def cut(options: CutOptions, *, progress: Progress = silent) -> Path: ...

    cut("smollm2", layers=12)              # in Python, with the signature and the docstring made from the class
    secateur cut smollm2 --layers 12       # on the command line
    layers: 12                             # in a file for --config

Nothing heavy is imported here, so that ``secateur --help`` is quick.
"""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticUndefined

from secateur.errors import ConfigError, DataError


class Options(BaseModel):
    """The options of one command. Unknown names are refused, and defaults are validated, too."""

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a yes or no is not valid here")
        return value

    def given(self) -> dict[str, Any]:
        """The options that the user set, without the defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}


O = TypeVar("O", bound=Options)  # noqa: E741 - the letter that reads as Options
R = TypeVar("R")


@dataclass(frozen=True)
class Names:
    """What the value of an option names; :mod:`.cli` looks whether it is there before anything heavy is imported.

    Attributes:
        what: The kind of thing.
        own: For ``results``: file names that an output folder may hold already.
    """

    what: Literal[
        "layers", "model", "data", "task", "file", "profile", "run", "study", "new folder", "new file", "results"
    ]
    own: tuple[str, ...] | None = None


def argument(description: str, **limits: Any) -> Any:
    """An option that the command line takes without a flag, and Python as a positional argument."""
    return Field(description=description, json_schema_extra={"argument": True, "positional": True}, **limits)


def positional(description: str, default: Any = PydanticUndefined, **limits: Any) -> Any:
    """An option that Python takes as a positional argument, too."""
    return Field(default, description=description, json_schema_extra={"positional": True}, **limits)


def output(description: str, *, needed: bool = True) -> Any:
    """Where results are written. ``needed=False``: a Python function only returns them where no place is given."""
    default = PydanticUndefined if needed else None
    return Field(default, description=description, json_schema_extra={"short": "-o", "required": True})


def extra(options: type[Options], name: str, key: str) -> Any:
    """What :func:`argument`, :func:`positional` and :func:`output` noted of an option."""
    noted = options.model_fields[name].json_schema_extra
    return noted.get(key) if isinstance(noted, dict) else None


def make(options: type[O], values: Mapping[str, Any]) -> O:
    """Validate options.

    Raises:
        ConfigError: The first that is unknown, missing, or has an invalid value.
    """
    try:
        return options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "options"
        if first["type"] == "extra_forbidden":
            known = ", ".join(options.model_fields)
            raise ConfigError(key, first["input"], "no such option", f"one of {known}") from None
        if first["type"] == "missing" or (first["type"] == "too_short" and not first["input"]):
            raise ConfigError(key, None, "is missing", options.model_fields[key].description or "") from None
        raise ConfigError(key, first["input"], f"{first['input']!r} is not valid", first["msg"]) from None


def default_of(options: type[Options], name: str) -> Any:
    """An option's default, or None where it must be given."""
    default = options.model_fields[name].get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default


def step(options: type[O]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a function that takes ``options`` the arguments that these are made of.

    The function's own keyword arguments (``progress``) stay. It can also be called with an instance of ``options``.
    Its signature lists every option, and its docstring explains each under ``Args``.
    """

    def decorate(run: Callable[..., R]) -> Callable[..., R]:
        own = [p for p in list(inspect.signature(run).parameters.values())[1:]]
        names = [name for name in options.model_fields if extra(options, name, "positional")]

        @functools.wraps(run)
        def call(*args: Any, **given: Any) -> R:
            rest = {p.name: given.pop(p.name) for p in own if p.name in given}
            if len(args) == 1 and isinstance(args[0], options) and not given:
                return run(args[0], **rest)
            if len(args) > len(names):
                raise TypeError(f"{run.__name__}() takes {len(names)} positional arguments, but {len(args)} were given")
            return run(make(options, dict(zip(names, args, strict=False)) | given), **rest)

        call.__signature__ = _signature(options, names, own)  # type: ignore[attr-defined]
        call.__doc__ = _docstring(options, inspect.getdoc(run) or "")
        return call

    return decorate


def _signature(options: type[Options], names: list[str], own: list[inspect.Parameter]) -> inspect.Signature:
    ordered = [*names, *(name for name in options.model_fields if name not in names)]
    parameters = []
    for name in ordered:
        field = options.model_fields[name]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in names else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if field.is_required() else default_of(options, name)
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=field.annotation))
    return inspect.Signature([*parameters, *own])


def _docstring(options: type[Options], text: str) -> str:
    """The function's docstring with an ``Args`` section made from the descriptions, before its other sections."""
    lines = [f"{name}: {field.description or ''}" for name, field in options.model_fields.items()]
    filled = [textwrap.fill(line, 116, initial_indent="    ", subsequent_indent="        ") for line in lines]
    section = "Args:\n" + "\n".join(filled)
    places = [text.find(f"\n{word}:") for word in ("Args", "Returns", "Yields", "Raises", "Example")]
    place = min((place for place in places if place >= 0), default=len(text))
    rest = text[place:].strip().removeprefix("Args:\n")
    return text[:place].rstrip() + "\n\n" + section + ("\n" if text[place:].startswith("\nArgs") else "\n\n") + rest


def read_yaml(file: Path) -> dict[str, Any]:
    """Keys and values of a configuration file.

    Raises:
        DataError: It is missing, broken (with its line), or no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(file, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(file, f"cannot be read ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise DataError(file, f"broken YAML ({error.problem})", line=line) from None
    except yaml.YAMLError as error:
        raise DataError(file, f"broken YAML ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not keys and values")
    return {str(key): value for key, value in content.items()}


def to_yaml(options: Options) -> str:
    """The resolved options as YAML, which :func:`read_yaml` reads back."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What several commands share ------------------------------------------------------------------------------------------

SavedPooling = Literal["weighted_mean", "mean", "lasttoken", "cls"]
"""Poolings that a saved folder can have: sentence-transformers' own."""
PoolingName = Literal["weighted_mean", "mean", "lasttoken", "cls", "l3prune"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


PROFILE_FILES = (
    *("profile.json", "choice.json"),
    *(f"{name}.{kind}" for name in ("curve", "cka", "angles", "solved") for kind in ("png", "svg")),
)
SCOUT_FILES = (
    *("scout.json", "model", "model.partial", "tasks", "tasks.partial", "draws", "cache", "done.json"),
    *("choice.json", "frontier.png", "frontier.svg"),
)
STUDY_FILES = (
    *("study.yaml", "plan.json", "steps.jsonl", "table.csv", "costs.json", "report.html", "report.md"),
    *("data", "tasks", "models", "profiles", "scouts", "pruned", "trained"),
    *("scores", "figures", "cache", "logs", "done"),
)


def name_or_object(value: Any) -> Any:
    """A path becomes text; an object (an opened model, a task, a table) stays as it is; numbers are refused."""
    if value is None or isinstance(value, (int, float, list, dict, tuple)):
        raise ValueError("a name or a path is expected")
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def path_text(value: Any) -> Any:
    """A path becomes text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def listed(value: Any) -> Any:
    """One name, or one thing that was read already, stands for a list of one."""
    return value if value is None else list(value) if isinstance(value, (list, tuple, set)) else [value]


def comma_separated(value: Any) -> Any:
    """``6,12`` becomes a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return None if value is None else [part for item in items for part in str(item).split(",")]


AnyName = Annotated[Any, BeforeValidator(name_or_object)]
ModelName = Annotated[AnyName, Names("model")]
Data = Annotated[list[Path], BeforeValidator(listed), Names("data")]
Tasks = Annotated[list[AnyName], BeforeValidator(listed), Names("task")]
Files = Annotated[list[Path], BeforeValidator(listed), Names("file")]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""The range that numpy takes."""

MODEL = "A Hub id, a model folder, a .gguf file, or smollm2."
ENDPOINT = "a server with the OpenAI embeddings API: https://host/v1#model-name."
DATA = (
    "Files of query (or anchor), positive and optional negative: .jsonl, .csv, .tsv (also .gz) or .parquet; folders of "
    "them; or data sets of the Hub: hf:NAME:CONFIG[SPLIT]."
)
POOLING = "How a bare language model pools its tokens [default: weighted_mean, or mean with bidirectional attention]."

Model = Annotated[ModelName, argument(MODEL)]
Pooling = Annotated[SavedPooling | None, Field(description=POOLING)]
MaxLength = Annotated[int, Field(ge=1, description="Tokens after which a text is cut, for a bare language model.")]
Sample = Annotated[int | None, Field(ge=1, description="Maximum number of rows of each task, sampled by the seed.")]
SampleSeed = Annotated[Seed, Field(description="Random seed of the sample.")]
HeldOut = Annotated[
    int,
    Field(
        ge=10,
        description="Without tasks: number of rows of the data that score the depths and are not trained on; at most "
        "a tenth of each file.",
    ),
]
Device = Annotated[str | None, Field(description="Torch device [default: the GPU where there is one].")]
TrustRemoteCode = Annotated[bool, Field(description="Run the model code that a repository contains.")]
