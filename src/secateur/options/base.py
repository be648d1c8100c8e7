"""How an option is written down once, and what is made of it: the function's argument, the flag, the YAML key.

A command's options are one class, in whose words :func:`step` gives its function a signature and a docstring. Here are
also the options that several commands share. Nothing heavy is imported, so that ``secateur --help`` is quick.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.functional_validators import AfterValidator
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
        defer_build=True,  # only what a command needs
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a yes or no is not valid here")
        return value

    @field_validator("*")
    @classmethod
    def _from_home(cls, value: Any) -> Any:
        """``~`` is the home folder in Python and YAML too, where no shell has put that in its place."""
        if isinstance(value, list):
            return [cls._from_home(item) for item in value]
        return Path(path_text(value)) if isinstance(value, Path) else value

    def given(self) -> dict[str, Any]:
        """The options that the user set, without the defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}


O = TypeVar("O", bound=Options)  # noqa: E741 - the letter that reads as Options
R = TypeVar("R")


@dataclass(frozen=True)
class Names:
    """What the value of an option names; :mod:`.cli` looks whether it is there before anything heavy is imported.

    ``what`` is layers, model, data, task, file, profile, run or study; of what is written, new folder, new file or
    results, whose folder may hold files named ``own`` already.
    """

    what: str
    own: tuple[str, ...] | None = None


def option(help: str, default: Any = None, **limits: Any) -> Any:
    """An option that may be left out. One named ``out`` must be given on the command line all the same."""
    return Field(default, description=help, **limits)


def argument(help: str, **limits: Any) -> Any:
    """An option that the command line takes without a flag, and Python as a positional argument."""
    return Field(description=help, json_schema_extra={"argument": True, "positional": True}, **limits)


def positional(help: str, default: Any = PydanticUndefined, **limits: Any) -> Any:
    """An option that Python takes as a positional argument, too."""
    return Field(default, description=help, json_schema_extra={"positional": True}, **limits)


def extra(options: type[Options], name: str, key: str) -> Any:
    """What :func:`argument` and :func:`positional` noted of an option."""
    noted = options.model_fields[name].json_schema_extra
    return noted.get(key) if isinstance(noted, dict) else None


def make(options: type[O], values: Mapping[str, Any], file: Path | None = None, own: Collection[str] = ()) -> O:
    """Validate options; ConfigError for the first that is unknown, missing, or has an invalid value.

    ``file`` is where the values are from, all but ``own``.
    """
    try:
        return options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "options"
        place = file if first["loc"] and first["loc"][0] in values.keys() - set(own) else None
        if first["type"] == "extra_forbidden":
            known = ", ".join(options.model_fields)
            raise ConfigError(key, first["input"], "no such option", f"one of {known}", place) from None
        if first["type"] == "missing" or (first["type"] == "too_short" and not first["input"]):
            raise ConfigError(key, None, "is missing", options.model_fields[key].description or "", place) from None
        given = " ".join(repr(first["input"]).split())  # of an opened model, a whole page
        problem, hint = f"{given:.200} is not valid", first["msg"].removeprefix("Value error, ")
        raise ConfigError(key, first["input"], problem, hint, place) from None


def default_of(options: type[Options], name: str) -> Any:
    """An option's default, or None where it must be given."""
    default = options.model_fields[name].get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default


def command_options(command: type[O], values: Mapping[str, Any]) -> O:
    """A command's options, those at their defaults not set."""
    own = {k: v for k, v in values.items() if k not in command.model_fields or v != default_of(command, k)}
    return make(command, own)


def command_words(command: str, options: Options) -> tuple[str, ...]:
    """A command with the options that are set, word by word as it is typed; ``-o`` comes last."""
    kind = type(options)
    given = {name: getattr(options, name) for name in kind.model_fields if name in options.given()}
    out = str(given.pop("out"))
    words = ["secateur", command]
    for name in sorted(given, key=lambda name: not extra(kind, name, "positional")):
        flag, value = name.replace("_", "-"), given[name]
        if isinstance(value, Mapping):
            value = ",".join(f"{key}={item}" for key, item in value.items())
        if not extra(kind, name, "argument"):
            words.append(f"--no-{flag}" if value is False else f"--{flag}")
        words += [] if isinstance(value, bool) else map(str, value if isinstance(value, list) else [value])
    return (*words, "-o", out)


def step(options: type[O]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a function that takes ``options`` the arguments that these are made of.

    The function's own keyword arguments (``progress``) stay. It can also be called with an instance of ``options``.
    Its signature lists every option, and its docstring explains each under ``Args``.
    """

    def decorate(run: Callable[..., R]) -> Callable[..., R]:
        own = list(inspect.signature(run).parameters.values())[1:]
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
    """The function's docstring with the descriptions as ``Args``."""
    wrapper = textwrap.TextWrapper(116, "    ", " " * 8, break_on_hyphens=False)
    filled = "\n".join(wrapper.fill(f"{name}: {own.description}") for name, own in options.model_fields.items())
    sections = re.search(r"\n\n(Returns|Raises):", text)
    place = sections.start() if sections else len(text)
    head, rest = text[:place], text[place:]
    return f"{head}\n\nArgs:\n{filled}{rest}"


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML takes the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """Keys and values of a configuration file; DataError if it is missing, broken (with its line), or no mapping."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _EachKeyOnce)  # noqa: S506 - a safe loader
    except FileNotFoundError:
        raise DataError(file, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(file, f"cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # a date with a 13th month; brackets without end
        raise DataError(file, f"broken YAML ({error})") from None
    except yaml.YAMLError as error:
        mark, problem = (getattr(error, key, None) for key in ("problem_mark", "problem"))
        raise DataError(file, f"broken YAML ({problem or error})", line=mark.line + 1 if mark else None) from None
    if not isinstance(content or {}, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not keys and values")
    return {str(key): value for key, value in (content or {}).items()}


def to_yaml(options: Options) -> str:
    """The resolved options as YAML, which :func:`read_yaml` reads back."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What several commands share ------------------------------------------------------------------------------------------

SavedPooling = Literal["weighted_mean", "mean", "lasttoken", "cls"]
"""Poolings that a saved folder can have: sentence-transformers' own."""
PoolingName = Literal["weighted_mean", "mean", "lasttoken", "cls", "l3prune"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def name_or_object(value: Any) -> Any:
    """A path becomes text; an object (an opened model, a task, a table) stays as it is; others are refused."""
    homes = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    if not (_is_name(value) or homes & {"secateur", "sentence_transformers"}):
        raise ValueError("a name or a path is expected")
    return path_text(value)


def name_only(value: Any) -> Any:
    """A path becomes text; an opened model is refused, for other processes open it, and notes of it name it."""
    if not _is_name(value):
        raise ValueError("a name or a path is expected; a model that is open has to be saved first")
    return path_text(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and str(value) != ""


def _of_tasks(value: int | None, info: ValidationInfo) -> int | None:
    if value is not None and info.data.get("tasks") == []:
        raise ConfigError("sample", value, "is a number of rows of tasks, and there are none", "give tasks")
    return value


def path_text(value: Any) -> Any:
    """A path becomes text, from the home folder where it begins with ``~``."""
    # Path.expanduser has no patience with ~name where nobody is called so.
    return os.path.expanduser(value) if isinstance(value, (str, os.PathLike)) else value  # noqa: PTH111


def listed(value: Any) -> Any:
    """One name, or one thing that was read already, stands for a list of one."""
    return value if value is None else list(value) if isinstance(value, (list, tuple, set, Iterator)) else [value]


def comma_separated(value: Any) -> Any:
    """``6,12`` becomes a list."""
    items = value if isinstance(value, (list, tuple, range)) else [value]
    return None if value is None else [part.strip() for item in items for part in str(item).split(",")]


AnyName = Annotated[Any, BeforeValidator(name_or_object)]
ModelName = Annotated[str, BeforeValidator(name_only), Names("model")]
Data = Annotated[list[Path], BeforeValidator(listed), Names("data")]
Tasks = Annotated[list[AnyName], BeforeValidator(listed), Names("task")]
Files = Annotated[list[Path], BeforeValidator(listed), Names("file")]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""The range that numpy takes."""

MODEL = "A Hub id, a model folder, a .gguf file, or smollm2."
ENDPOINT = "a server with the OpenAI embeddings API: https://host/v1#model-name."
DATA = (
    "Files of query (or anchor), positive and optional negative: .jsonl, .csv, .tsv (also .gz) or .parquet; folders of "
    "them; or data sets of the Hub: hf:NAME:CONFIG[SPLIT]. Or of texts alone: .txt, or .jsonl with text."
)
POOLING = "How a bare language model pools its tokens [default: mean]."

Model = Annotated[ModelName, argument(MODEL)]
Teacher = Annotated[Annotated[str, BeforeValidator(name_only)] | None, Names("model")]
NewFolder = Annotated[Path, Names("new folder")]
Pooling = Annotated[SavedPooling | None, option(POOLING)]
MaxLength = Annotated[int, option("Tokens after which a text is cut, for a bare language model.", ge=1)]
Sample = Annotated[int | None, option("Maximum number of rows of each task, sampled by the seed.", ge=1)]
TaskSample = Annotated[Sample, AfterValidator(_of_tasks)]
"""Where tasks may be left out."""
SampleSeed = Annotated[Seed, option("Random seed of the sample.")]
HELD_OUT = "Without tasks: rows of the data that score the depths and are not trained on; at most a tenth of a file."
HeldOut = Annotated[int, option(HELD_OUT, ge=10)]
Device = Annotated[str | None, option("Torch device [default: the GPU where there is one].")]
TrustRemoteCode = Annotated[bool, option("Run the model code that a repository contains.")]
