"""What a study is made of, as plain data: models, and steps, each of which is one command.

Folders are named ``<model>-<depth>-<state>``. The state is ``zero-shot`` for a model as it came, ``trimmed`` for one
that is not trained either, but had its vocabulary cut, ``scout`` after the training of several depths, ``polished``
after the one that follows it, or a recipe's name; after the selector where the
layers are not the first ones, and before the seed where there are several: ``smollm2-7-uniform-healed-seed2``.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import ConfigError
from secateur.models import model_label
from secateur.options import (
    CostOptions,
    EvaluateOptions,
    HealOptions,
    Options,
    ProfileOptions,
    PruneOptions,
    ScoutOptions,
    StudyOptions,
    default_of,
    extra,
    make,
)
from secateur.reporting.run import BASELINE, TRIMMED, UNTRAINED
from secateur.results import Scores

O = TypeVar("O", bound=Options)  # noqa: E741 - the letter that reads as Options

CURVE, FRONTIER = "curve.png", "frontier.png"
"""The files of a profile and of a scout that are written last."""
MODELS = "models"
"""The folder of the models that are evaluated and timed."""
NO_TRAINING = "none"
ITSELF = "self"
"""As a teacher: the whole model, of which the cut ones are parts."""
FULL = ("full",)
"""The entry of ``depths`` that stands for all layers."""

COMMANDS: Mapping[str, type[Options]] = {
    "prune": PruneOptions,
    "profile": ProfileOptions,
    "heal": HealOptions,
    "scout": ScoutOptions,
    "evaluate": EvaluateOptions,
    "cost": CostOptions,
}


@dataclass(frozen=True)
class Base:
    """A model to begin with: its name in the study, what the user named, and its size.

    Attributes:
        depth: Number of layers.
        block_parameters: Parameters of one layer.
        parameters: Parameters of the whole model.
    """

    name: str
    model: str
    depth: int
    block_parameters: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Variant:
    """One model of a study.

    Attributes:
        name: Of its folder.
        base: The model that it is cut from.
        specs: The entries of ``depths`` that lead to its layers; ``full`` for all of them, ``chosen`` for those that
            a scout's scores choose.
        blocks: Indices of its layers; None while a profile or a scout has to say.
        recipe: How it is trained; ``none``: not at all.
        seed: Of the training; None without one.
    """

    name: str
    base: Base
    specs: tuple[str, ...]
    blocks: tuple[int, ...] | None
    recipe: str = NO_TRAINING
    seed: int | None = None

    @property
    def depth(self) -> int:
        """Number of its layers; of all layers while a profile or a scout has to say."""
        return self.base.depth if self.blocks is None else len(self.blocks)


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: The command and what it makes; unique in a study.
        kind: The command.
        options: Of the command; those at their defaults are not set.
        output: The file or folder that is there when the step is done.
        depends_on: Names of the steps that must be done before.
        variant: The model that it makes or measures; None where there are several.
        known: Whether all options are final; else the step waits for a profile or a scout, which tells the others.
        seconds: An estimate of its time; None where nobody knows.
    """

    name: str
    kind: str
    options: Options
    output: Path
    depends_on: tuple[str, ...] = ()
    variant: Variant | None = None
    known: bool = True
    seconds: float | None = None

    @property
    def exclusive(self) -> bool:
        """Whether nothing else may run meanwhile, because the step measures times."""
        return self.kind == "cost"

    @property
    def command(self) -> tuple[str, ...]:
        """The words of the same work on the command line; ``-o`` comes last."""
        kind = type(self.options)
        given = {name: getattr(self.options, name) for name in kind.model_fields if name in self.options.given()}
        out = str(given.pop("out"))
        words = ["secateur", self.kind]
        for name in sorted(given, key=lambda name: not extra(kind, name, "positional")):
            flag, value = name.replace("_", "-"), given[name]
            if isinstance(value, Mapping):
                value = ",".join(f"{key}={item}" for key, item in value.items())
            if not extra(kind, name, "argument"):
                words.append(f"--no-{flag}" if value is False else f"--{flag}")
            words += [] if isinstance(value, bool) else map(str, value if isinstance(value, list) else [value])
        return (*words, "-o", out)

    @property
    def command_line(self) -> str:
        """As :attr:`command`, to be typed; empty while the options are not final."""
        return shlex.join(self.command) if self.known else ""


@dataclass
class Plan:
    """The steps, in an order in which they can be done.

    ``failed`` are steps that can never be done, with the reason: a profile or a scout that does not tell a depth.
    ``notes`` are what the user must know of what is done.
    """

    steps: list[Step] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[tuple[Step, Variant]]:
        """The steps that make the study's models, and these."""
        kinds = ("prune", "heal")
        made = [step for step in self.steps if step.kind in kinds and step.output.parent.name == MODELS]
        return [(step, step.variant) for step in made if step.variant is not None]

    def add(
        self, kind: str, variant: Variant, output: Path, *depends_on: str, told_by: str | None = None, **options: Any
    ) -> str:
        """Add a step about one model, and give its name.

        Args:
            kind: The command.
            variant: The model that it makes or measures.
            output: What is there when it is done.
            depends_on: Names of steps.
            told_by: The step that has to tell some of the options yet.
            options: Of the command.
        """
        name = variant.base.name if kind == "profile" else variant.name
        needed = depends_on if told_by is None else tuple(dict.fromkeys((*depends_on, told_by)))
        made = command_options(COMMANDS[kind], options)
        self.steps.append(Step(f"{kind} {name}", kind, made, output, needed, variant, told_by is None))
        return f"{kind} {name}"

    def blocked(self, failed: Collection[str]) -> set[str]:
        """Steps that cannot be done because of others that failed."""
        lost = set(failed)
        for step in self.steps:  # in the order of the work
            if lost.intersection(step.depends_on):
                lost.add(step.name)
        return lost - set(failed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        steps = [
            {"name": step.name, "command": step.command_line, "output": str(step.output), "seconds": step.seconds}
            | {"depends_on": step.depends_on}
            for step in self.steps
        ]
        variants = [
            {"name": v.name, "base": v.base.name, "depth": v.base.depth, "specs": v.specs, "blocks": v.blocks}
            | {"recipe": v.recipe, "seed": v.seed, "folder": str(step.output), "step": step.name}
            for step, v in self.models
        ]
        return {"steps": steps, "variants": variants}


def command_options(command: type[O], values: Mapping[str, Any]) -> O:
    """A command's options, those at their defaults not set."""
    known = command.model_fields
    return make(command, {k: v for k, v in values.items() if k not in known or v != default_of(command, k)})


# What both kinds of studies have --------------------------------------------------------------------------------------


def add_whole(plan: Plan, study: StudyOptions, base: Base) -> tuple[Variant, str]:
    """The model as it came; gives it and its step."""
    whole = Variant(f"{base.name}-{base.depth}-{UNTRAINED}", base, FULL, tuple(range(base.depth)))
    out = study.out / MODELS / whole.name
    blocks = {"model": base.model, "to": str(base.depth), "pooling": study.pooling}
    return whole, plan.add("prune", whole, out, **blocks, out=out)


def add_trimmed(plan: Plan, study: StudyOptions, whole: Variant, came: str) -> tuple[Variant, str]:
    """The model that all others are cut from, and its step: as it came, or with a smaller vocabulary."""
    if not study.cuts_vocabulary:
        return whole, came
    trimmed = replace(whole, name=f"{whole.base.name}-{whole.depth}-{TRIMMED}")
    out = study.out / MODELS / trimmed.name
    options: dict[str, Any] = {"vocab": study.vocab or study.data, "columns": study.columns}
    options |= {"vocab_size": study.vocab_size, "vocab_coverage": study.vocab_coverage}
    options |= {"vocab_tasks": [task for task in study.tasks if Path(task).is_dir()]}
    options["model"] = str(study.out / MODELS / whole.name)
    return trimmed, plan.add("prune", trimmed, out, came, **options, out=out)


def add_profile(plan: Plan, study: StudyOptions, whole: Variant, came: str, tasks: Sequence[str]) -> None:
    """The profile of a model that is not trained; it scores ``tasks``, too."""
    out = study.out / "profiles" / whole.base.name
    options: dict[str, Any] = {"data": study.data, "columns": study.columns}
    options |= {"max_examples": study.max_examples, "seed": study.seed}
    options |= {"scale": study.profile_scale, "dtype": study.profile_dtype}
    options |= {"tasks": tasks, "sample": study.sample if tasks else None}
    plan.add("profile", whole, out / CURVE, came, model=str(study.out / MODELS / whole.name), **options, out=out)


def add_scores(
    plan: Plan,
    study: StudyOptions,
    variant: Variant,
    step: str | None,
    tasks: Sequence[str],
    told_by: str | None = None,
) -> None:
    """The scores of a model, if there are tasks: of one that ``step`` makes, or of a baseline."""
    if not tasks:
        return
    out = study.out / "scores" / variant.name
    model = variant.base.model if step is None else str(study.out / MODELS / variant.name)
    # By its name, wherever the run folder lies: the scores are of this study's model.
    options: dict[str, Any] = {"models": [model], "names": [variant.name], "tasks": tasks}
    options |= {"sample": study.sample, "seed": study.seed, "cache": cache_of(study)}
    needed = () if step is None else (step,)
    plan.add("evaluate", variant, out / Scores.file, *needed, told_by=told_by, **options, out=out)


def add_baselines(plan: Plan, study: StudyOptions, tasks: Sequence[str], told_by: str | None = None) -> None:
    """The scores of the models to compare with, which the study only opens.

    Raises:
        ConfigError: One has the name of a model of the study.
    """
    made = {variant.name for _, variant in plan.models}
    for model in study.baselines:
        if (name := model_label(model)) in made:
            raise ConfigError("baselines", model, f"{name} is a model of the study", "rename the folder")
        add_scores(plan, study, Variant(name, Base(name, model, 0), (), (), BASELINE), None, tasks, told_by)


def cache_of(study: StudyOptions) -> Path:
    """The folder that keeps vectors."""
    return study.cache or study.out / "cache"
