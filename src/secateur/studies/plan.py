"""What a study will do, as plain data: steps, each of which is one command, and the models that they make.

:func:`plan_steps` is a pure function of the options, the models' depths and what their profiles say so far. Depths that
a profile chooses are not known before it is there: until then their steps stand in the plan without a command, and the
plan made anew after the profile has them.

Folders are named ``<model>-<blocks>-<state>``. The state is ``zero-shot`` or the recipe's name, after the selector
where the blocks are not the first ones, and before the seed where there are several:
``smollm2-7-uniform-healed-seed2``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from secateur.choosing.choose import blocks_to_keep, needs_profile
from secateur.errors import ConfigError, SecateurError
from secateur.options import (
    CostOptions,
    EvaluateOptions,
    HealOptions,
    HealSettings,
    Options,
    ProfileOptions,
    PruneOptions,
    StudyOptions,
    default_of,
    extra,
    make,
)
from secateur.results import Costs, Profile, Scores

O = TypeVar("O", bound=Options)  # noqa: E741 - the letter that reads as Options

CURVE = "curve.png"
"""The file of a profile that is written last."""
MODELS = "models"
"""The folder of the models that are evaluated and timed."""
ZERO_SHOT, NO_TRAINING = "zero-shot", "none"
ITSELF = "self"
"""As a teacher: the whole model, of which the cut ones are parts."""
BY_TASKS = "best-task"
"""As a depth: what the scores of the tasks at every depth choose."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {  # the experiments of L3Prune, arXiv 2410.14578, sections 4 and 5; the data are left to the user
        "models": [
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "mistralai/Mistral-7B-Instruct-v0.2",
            "Qwen/Qwen2-7B-Instruct",
            "microsoft/Phi-3-mini-4k-instruct",
        ],
        "depths": ["large", "small", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"],
        "tasks": ["MTEB(eng, v1)"],
        "gradient_checkpointing": True,
    },
    "shrink": {"depths": ["0.25", "0.5", "0.75"], "recipes": {"distilled": {}}, "teacher": ITSELF},
}
"""Options that a preset decides, where the user has not; the demo's come with its data."""

COMMANDS: Mapping[str, type[Options]] = {
    "prune": PruneOptions,
    "profile": ProfileOptions,
    "heal": HealOptions,
    "evaluate": EvaluateOptions,
    "cost": CostOptions,
}


@dataclass(frozen=True)
class Base:
    """A model to begin with: its name in the study, what the user named, and its size.

    Attributes:
        depth: Number of blocks.
        block_parameters: Parameters of one block.
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
        specs: The entries of ``depths`` that lead to its blocks; ``full`` for all of them.
        blocks: Indices of its blocks; None while a profile has to say.
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
        """Number of its blocks; of all blocks while a profile has to say."""
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
        known: Whether all options are final; else the step waits for a profile, which tells the blocks.
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

    ``failed`` are steps that can never be done, with the reason: a profile that does not tell what a depth asks of it.
    """

    steps: list[Step] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[tuple[Step, Variant]]:
        """The steps that make the study's models, and these."""
        made = [step for step in self.steps if step.output.parent.name == MODELS]
        return [(step, step.variant) for step in made if step.variant is not None]

    def add(self, kind: str, variant: Variant, output: Path, *depends_on: str, **options: Any) -> str:
        """Add a step about one model; one whose blocks are not known waits for the profile as well."""
        name = variant.base.name if kind == "profile" else variant.name
        known = variant.blocks is not None
        needed = depends_on if known else (*depends_on, f"profile {variant.base.name}")
        step = Step(f"{kind} {name}", kind, _options(COMMANDS[kind], options), output, needed, variant, known)
        self.steps.append(step)
        return step.name

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


def _options(command: type[O], values: Mapping[str, Any]) -> O:
    """A command's options, those at their defaults not set."""
    known = command.model_fields
    return make(command, {k: v for k, v in values.items() if k not in known or v != default_of(command, k)})


def plan_steps(
    study: StudyOptions, bases: Sequence[Base], profiles: Mapping[str, Profile], failed: Collection[str] = ()
) -> Plan:
    """The plan of a study.

    Args:
        study: Its options.
        bases: The models to begin with.
        profiles: Base → its profile, of those that are there.
        failed: Names of steps that failed: their models are not counted and timed with the others.

    Raises:
        ConfigError: A depth, a recipe or a seed is not valid.
        IllegalDepth: A model cannot be cut so.
    """
    recipes, plan = recipe_options(study), Plan()
    for base in bases:
        _add_base(plan, study, recipes, base, profiles.get(base.name))
    lost = {*failed, *plan.failed}
    lost |= plan.blocked(lost)
    left = [step for step, _ in plan.models if step.name not in lost]
    if left:  # all models in one step: times are compared under the same conditions
        options = _options(CostOptions, {"models": [str(step.output) for step in left], "out": study.out})
        needed, known = tuple(step.name for step in left), all(step.known for step in left)
        plan.steps.append(Step("cost all", "cost", options, study.out / Costs.file, needed, known=known))
    return plan


_DECIDED: dict[str, Any] = {"model": "-", "data": ["-"], "columns": None, "out": "-", "seed": 42}
"""Options of a training that the study decides, until it has."""


def recipe_options(study: StudyOptions) -> dict[str, HealOptions]:
    """Recipe → the options of its training, but for those that the study decides. ``none`` has none.

    Raises:
        ConfigError: A name cannot be part of a folder's, or a setting is not valid.
    """
    common = {name: getattr(study, name) for name in (*HealSettings.model_fields, "teacher")}
    recipes: dict[str, HealOptions] = {}
    for name, own in study.recipes.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigError("recipes", name, f"{name!r} is no name", "small letters, digits and _")
        if name == NO_TRAINING and own:
            raise ConfigError("recipes", own, "none has no settings", "name the recipe otherwise")
        for decided in sorted(_DECIDED.keys() & own.keys()):
            raise ConfigError(f"recipes.{name}.{decided}", own, "is the study's to say", "leave it out")
        try:
            recipes[name] = _options(HealOptions, common | own | _DECIDED)
        except ConfigError as error:
            problem = error.problem.partition(": ")[2]
            raise ConfigError(f"recipes.{name}.{error.key}", error.value, problem, error.hint) from None
    return recipes


def _add_base(
    plan: Plan, study: StudyOptions, recipes: Mapping[str, HealOptions], base: Base, profile: Profile | None
) -> None:
    """The model as it came, its profile, and every depth with every recipe and seed."""
    run, cache = study.out, study.cache or study.out / "cache"
    data = {"data": study.data, "columns": study.columns}
    whole = Variant(f"{base.name}-{base.depth}", base, ("full",), tuple(range(base.depth)))
    source = run / MODELS / f"{whole.name}-{ZERO_SHOT}"
    came = f"prune {source.name}"

    def evaluate(variant: Variant, step: str) -> None:
        out = run / "scores" / variant.name
        given = {"models": [str(run / MODELS / variant.name)], "names": [variant.name], "tasks": study.tasks}
        if study.tasks:  # by its name, wherever the run folder lies: the scores are of this study's model
            asked = {"sample": study.sample, "seed": study.seed, "cache": cache, "out": out}
            plan.add("evaluate", variant, out / Scores.file, step, **given, **asked)

    for variant, problem in [(whole, ""), *_cuts(study.depths, base, profile)]:
        is_kept = variant is whole or NO_TRAINING in recipes
        cut = replace(variant, name=f"{variant.name}-{ZERO_SHOT}") if is_kept else variant
        folder = run / (MODELS if is_kept else "pruned") / cut.name
        if variant is whole:
            blocks = {"model": base.model, "to": str(base.depth), "pooling": study.pooling}
            pruned = plan.add("prune", cut, folder, **blocks, out=folder)
        else:
            pruned = plan.add("prune", cut, folder, came, model=str(source), **_kept(variant.blocks), out=folder)
        if problem:
            plan.failed[pruned] = problem
        if is_kept:
            evaluate(cut, pruned)
        if variant is whole:
            out = run / "profiles" / base.name
            tasks = study.tasks if study.depth_scores or BY_TASKS in study.depths else []
            measured: dict[str, Any] = {
                "scale": study.profile_scale,
                "max_examples": study.max_examples,
                "dtype": study.profile_dtype,
            }
            measured |= {"seed": study.seed, "tasks": tasks, "sample": study.sample if tasks else None, "out": out}
            plan.add("profile", cut, out / CURVE, came, model=str(source), **data, **measured)
        for recipe, training in recipes.items():
            settings = {key: value for key, value in training.given().items() if key not in _DECIDED}
            itself = settings.get("teacher") == ITSELF
            if recipe == NO_TRAINING or (itself and variant is whole):  # the whole has nothing to learn from itself
                continue
            # A teacher's vectors are the same at all depths, and with all seeds.
            given = {"cache": cache if "teacher" in settings else None} | settings
            given |= {"teacher": str(source)} if itself else {}
            for seed in study.seeds or [study.seed]:
                suffix = f"-seed{seed}" if len(study.seeds) > 1 else ""
                trained = replace(variant, name=f"{variant.name}-{recipe}{suffix}", recipe=recipe, seed=seed)
                out = run / MODELS / trained.name
                step = plan.add("heal", trained, out, pruned, model=str(folder), **data, **given, seed=seed, out=out)
                evaluate(trained, step)


def _kept(blocks: tuple[int, ...] | None) -> dict[str, str]:
    """Which blocks, as ``prune`` takes it."""
    if blocks is None:
        return {}
    is_prefix = blocks == tuple(range(len(blocks)))
    return {"to": str(len(blocks))} if is_prefix else {"keep": ",".join(map(str, blocks))}


def _cuts(specs: Sequence[str], base: Base, profile: Profile | None) -> Iterator[tuple[Variant, str]]:
    """The cuts below the full depth, the deepest first, and why one cannot be told.

    Entries that lead to the same blocks are one.
    """
    known: dict[tuple[int, ...], list[str]] = {}
    unknown: dict[str, str] = {}
    for spec in specs:
        try:
            blocks = _blocks(spec, base.depth, profile)
        except SecateurError as error:
            if profile is None:  # nothing has begun
                raise
            unknown[spec] = str(error)
            continue
        if blocks is None:
            unknown[spec] = ""
        else:
            known.setdefault(blocks, []).append(spec)
    taken: set[str] = set()
    for blocks in sorted(known, key=lambda kept: (-len(kept), kept)):
        if len(blocks) < base.depth:
            label = _label(blocks, known[blocks][0], taken)
            taken.add(label)
            yield Variant(f"{base.name}-{label}", base, tuple(known[blocks]), blocks), ""
    for spec, problem in unknown.items():
        yield Variant(f"{base.name}-({spec})", base, (spec,), None), problem


def _blocks(spec: str, depth: int, profile: Profile | None) -> tuple[int, ...] | None:
    """The blocks that an entry of ``depths`` keeps; None where it takes a profile that is not there."""
    if not needs_profile(spec) or profile is not None:
        return blocks_to_keep(spec, depth, profile)
    _, counted, count = spec.partition(":")
    if counted:  # too many blocks are too many for every selector
        blocks_to_keep(count.partition(":")[0], depth)
    return None


def _label(blocks: tuple[int, ...], spec: str, taken: Collection[str]) -> str:
    """How a folder's name tells blocks: their number, and the selector unless they are the first ones."""
    if blocks == tuple(range(len(blocks))):
        return str(len(blocks))
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(rf":{len(blocks)}(?=:|$)", "", spec.lower())).strip("_")
    way = words if words[:1].isalpha() else f"chosen_{words}"
    label, number = f"{len(blocks)}-{way}", 1
    while label in taken:
        number += 1
        label = f"{len(blocks)}-{way}_{number}"
    return label
