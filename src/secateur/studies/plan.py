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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from secateur.choosing.choose import blocks_to_keep, needs_profile
from secateur.errors import ConfigError, SecateurError
from secateur.healing.recipe import L3PRUNE, Recipe, make_recipe
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

CURVE = "curve.png"
"""The file of a profile that is written last."""
ZERO_SHOT, NO_TRAINING = "zero-shot", "none"
ITSELF = "self"
"""As a teacher: the whole model, of which the cut ones are parts."""
BY_TASKS = "best-task"
"""As a depth: what the scores of the tasks at every depth choose."""

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
class Step:
    """One command of a study.

    Attributes:
        name: The command and what it makes; unique in a study.
        kind: The command.
        options: Of the command; those at their defaults are not set.
        output: The file or folder that is there when the step is done.
        depends_on: Names of the steps that must be done before.
        base: The model it is about; empty where it is about several.
        blocks: Number of blocks of the model that it runs; those of the whole model where they are not known yet.
        known: Whether all options are final; else the step waits for a profile, which tells the blocks.
        seconds: An estimate of its time; None where nobody knows.
    """

    name: str
    kind: str
    options: Options
    output: Path
    depends_on: tuple[str, ...] = ()
    base: str = ""
    blocks: int = 0
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
        given = self.options.given()
        named = [name for name in given if extra(kind, name, "argument")]
        order = sorted(given.keys() - {"out", *named}, key=list(kind.model_fields).index)
        words = ["secateur", self.kind, *(word for name in named for word in _words(given[name]))]
        for name in sorted(order, key=lambda name: not extra(kind, name, "positional")):
            flag = name.replace("_", "-")
            words += [f"--no-{flag}"] if given[name] is False else [f"--{flag}", *_words(given[name])]
        return (*words, "-o", str(given["out"]))

    @property
    def command_line(self) -> str:
        """As :attr:`command`, to be typed; empty while the options are not final."""
        return shlex.join(self.command) if self.known else ""


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    if isinstance(value, Mapping):
        return [",".join(f"{name}={item}" for name, item in value.items())]
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


@dataclass(frozen=True)
class Variant:
    """One model that a study makes.

    Attributes:
        name: Of its folder.
        base: The model that it was cut from.
        depth: Number of blocks of that model.
        specs: The entries of ``depths`` that lead to these blocks; ``full`` for all of them.
        blocks: Indices of its blocks; None while a profile has to say.
        recipe: How it was trained; ``none``: not at all.
        seed: Of the training; None without one.
        folder: Where it is.
        step: The step that makes it.
    """

    name: str
    base: str
    depth: int
    specs: tuple[str, ...]
    blocks: tuple[int, ...] | None
    recipe: str
    seed: int | None
    folder: str
    step: str


@dataclass
class Plan:
    """The steps in an order in which they can be done, and the variants that they make.

    ``failed`` are steps that can never be done, with the reason: a profile that does not tell what a depth asks of it.
    """

    steps: list[Step] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(
        self, kind: str, name: str, output: Path, depends_on: Sequence[str], base: Base, cut: Cut, **options: Any
    ) -> str:
        """Add a step about one model; one whose blocks are not known waits for the profile as well."""
        needed = tuple(depends_on) if cut.blocks is not None else (*depends_on, f"profile {base.name}")
        blocks = base.depth if cut.blocks is None else len(cut.blocks)
        step = Step(
            f"{kind} {name}", kind, _options(kind, options), output, needed, base.name, blocks, cut.blocks is not None
        )
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
            {
                "name": step.name,
                "command": step.command_line,
                "output": str(step.output),
                "depends_on": step.depends_on,
                "seconds": step.seconds,
            }
            for step in self.steps
        ]
        return {"steps": steps, "variants": [asdict(variant) for variant in self.variants]}


def _options(kind: str, values: Mapping[str, Any]) -> Options:
    """A command's options, those at their defaults not set."""
    fields = COMMANDS[kind]
    return make(fields, {key: value for key, value in values.items() if value != default_of(fields, key)})


@dataclass(frozen=True)
class Cut:
    """Blocks to keep, the entries of ``depths`` that say so, how a name tells it, and why they cannot be told."""

    label: str
    specs: tuple[str, ...]
    blocks: tuple[int, ...] | None
    problem: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Which blocks, as ``prune`` takes it."""
        if self.blocks is None:
            return {}
        if self.blocks == tuple(range(len(self.blocks))):
            return {"to": str(len(self.blocks))}
        return {"keep": ",".join(map(str, self.blocks))}


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
    recipes = recipe_settings(study)
    plan = Plan()
    for base in bases:
        _add_base(plan, study, recipes, base, profiles.get(base.name))
    lost = {*failed, *plan.failed}
    lost |= plan.blocked(lost)
    left = [variant for variant in plan.variants if variant.step not in lost]
    if left:  # all models in one step: times are compared under the same conditions
        options = _options("cost", {"models": [variant.folder for variant in left], "out": str(study.out)})
        known = all(variant.blocks is not None for variant in left)
        needed = tuple(variant.step for variant in left)
        plan.steps.append(Step("cost all", "cost", options, study.out / Costs.file, needed, known=known))
    return plan


_DECIDED = frozenset({"model", "data", "columns", "out", "seed"})
"""Options of a training that the study decides."""


def recipe_settings(study: StudyOptions) -> dict[str, dict[str, Any]]:
    """Recipe → the options of its training that are not at their defaults, without the seed. ``none`` has none.

    Raises:
        ConfigError: A name cannot be part of a folder's, or a setting is not valid.
    """
    common = {name: getattr(study, name) for name in (*HealSettings.model_fields, "teacher")}
    recipes: dict[str, dict[str, Any]] = {}
    for name, own in study.recipes.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigError("recipes", name, f"{name!r} is no name", "small letters, digits and _")
        if name == NO_TRAINING and own:
            raise ConfigError("recipes", own, "none has no settings", "name the recipe otherwise")
        for decided in sorted(_DECIDED & own.keys()):
            raise ConfigError(f"recipes.{name}.{decided}", own, "is the study's to say", "leave it out")
        try:
            whole = make(HealOptions, common | own | {"model": "-", "data": ["-"], "out": "-"})
        except ConfigError as error:
            problem = error.problem.partition(": ")[2]
            raise ConfigError(f"recipes.{name}.{error.key}", error.value, problem, error.hint) from None
        given = {key: getattr(whole, key) for key in HealOptions.model_fields if key not in _DECIDED}
        recipes[name] = {key: value for key, value in given.items() if value != default_of(HealOptions, key)}
    return recipes


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The numbers of a training, from its options; those that are not given are the recipe's."""
    known = {field.name for field in fields(Recipe)}
    return make_recipe(settings.get("recipe") or L3PRUNE, **{k: v for k, v in settings.items() if k in known})


def _add_base(
    plan: Plan, study: StudyOptions, recipes: Mapping[str, Mapping[str, Any]], base: Base, profile: Profile | None
) -> None:
    """The model as it came, its profile, and every depth with every recipe and seed."""
    whole = Cut(str(base.depth), ("full",), tuple(range(base.depth)))
    name = f"{base.name}-{base.depth}-{ZERO_SHOT}"
    source = study.out / "models" / name
    given: dict[str, Any] = {"model": base.model, **whole.options, "pooling": study.pooling, "out": str(source)}
    came = plan.add("prune", name, source, [], base, whole, **given)
    _add_variant(plan, study, base, whole, NO_TRAINING, None, name, came)
    folder = study.out / "profiles" / base.name
    tasks = study.tasks if study.depth_scores or BY_TASKS in study.depths else []
    given = {"model": str(source), "data": study.data, "columns": study.columns, "scale": study.profile_scale}
    given |= {"max_examples": study.max_examples, "dtype": study.profile_dtype, "seed": study.seed, "tasks": tasks}
    given |= {"sample": study.sample if tasks else None, "out": str(folder)}
    plan.add("profile", base.name, folder / CURVE, [came], base, whole, **given)
    _add_trainings(plan, study, recipes, base, whole, source, came)
    for cut in _cuts(study.depths, base, profile):
        name, folder = f"{base.name}-{cut.label}", study.out / "pruned" / f"{base.name}-{cut.label}"
        if NO_TRAINING in recipes:
            name = f"{name}-{ZERO_SHOT}"
            folder = study.out / "models" / name
        given = {"model": str(source), **cut.options, "out": str(folder)}
        pruned = plan.add("prune", name, folder, [came], base, cut, **given)
        if NO_TRAINING in recipes:
            _add_variant(plan, study, base, cut, NO_TRAINING, None, name, pruned)
        if cut.problem:
            plan.failed[pruned] = cut.problem
        _add_trainings(plan, study, recipes, base, cut, folder, pruned)


def _add_trainings(
    plan: Plan,
    study: StudyOptions,
    recipes: Mapping[str, Mapping[str, Any]],
    base: Base,
    cut: Cut,
    source: Path,
    made: str,
) -> None:
    """One cut with every recipe and seed. A model that is its own teacher has nothing to learn while it is whole."""
    seeds = study.seeds or [study.seed]
    whole = study.out / "models" / f"{base.name}-{base.depth}-{ZERO_SHOT}"
    for recipe, settings in recipes.items():
        itself = settings.get("teacher") == ITSELF
        if recipe == NO_TRAINING or (itself and source == whole):
            continue
        given = {"model": str(source), "data": study.data, "columns": study.columns}
        if "teacher" in settings:  # its vectors are the same at all depths, and with all seeds
            given["cache"] = str(study.cache or study.out / "cache")
        given |= {**settings, "teacher": str(whole)} if itself else settings
        for seed in seeds:
            name = f"{base.name}-{cut.label}-{recipe}" + (f"-seed{seed}" if len(seeds) > 1 else "")
            folder = study.out / "models" / name
            step = plan.add("heal", name, folder, [made], base, cut, **given, seed=seed, out=str(folder))
            _add_variant(plan, study, base, cut, recipe, seed, name, step)


def _add_variant(
    plan: Plan, study: StudyOptions, base: Base, cut: Cut, recipe: str, seed: int | None, name: str, step: str
) -> None:
    """A model that a step makes, and its evaluation."""
    folder, out = str(study.out / "models" / name), study.out / "scores" / name
    plan.variants.append(Variant(name, base.name, base.depth, cut.specs, cut.blocks, recipe, seed, folder, step))
    if study.tasks:
        # By its name, wherever the run folder lies: the scores are of this study's model.
        given = {"models": [folder], "tasks": study.tasks, "sample": study.sample, "seed": study.seed, "names": [name]}
        given |= {"cache": str(study.cache or study.out / "cache"), "out": str(out)}
        plan.add("evaluate", name, out / Scores.file, [step], base, cut, **given)


def _cuts(specs: Sequence[str], base: Base, profile: Profile | None) -> Iterator[Cut]:
    """The cuts below the full depth, the deepest first; entries that lead to the same blocks are one."""
    known: dict[tuple[int, ...], list[str]] = {}
    unknown: list[str] = []
    for spec in specs:
        try:
            blocks = _blocks(spec, base.depth, profile)
        except SecateurError as error:
            if profile is None:  # nothing has begun
                raise
            yield Cut(f"({spec})", (spec,), None, str(error))
            continue
        if blocks is None:
            unknown.append(spec)
        else:
            known.setdefault(blocks, []).append(spec)
    taken: set[str] = set()
    for blocks in sorted(known, key=lambda kept: (-len(kept), kept)):
        if len(blocks) < base.depth:
            label = _label(blocks, known[blocks][0], taken)
            taken.add(label)
            yield Cut(label, tuple(known[blocks]), blocks)
    for spec in unknown:
        yield Cut(f"({spec})", (spec,), None)


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
