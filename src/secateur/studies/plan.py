"""What a study will do, as plain data: steps, each of which is one command, and the models that they make.

:func:`plan_steps` is a pure function of the options, the models' depths and what their profiles say so far. Depths that
a profile chooses are not known before it is there: until then their steps stand in the plan without a command, and the
plan made anew after the profile has them.

Folders tell what they hold: ``<model>-<blocks>-<state>``, where the state is ``zero-shot`` or the recipe's name, after
the way of choosing where the blocks are not the first ones, and before the seed where there are several:
``smollm2-7-healed``, ``smollm2-7-uniform-healed-seed2``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.choosing.choose import blocks_to_keep, needs_profile
from secateur.errors import ConfigError, SecateurError
from secateur.healing.recipes import TrainingConfig, training_config
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
    make,
)
from secateur.results import Costs, Profile, Scores

CURVE = "curve.png"
ZERO_SHOT, NO_TRAINING = "zero-shot", "none"
ITSELF = "self"
"""As a teacher: the whole model, of which the cut ones are parts."""
BY_TASKS = "best-task"
"""As a depth: what the scores of the tasks at every depth choose."""

_COMMANDS: dict[str, type[Options]] = {
    "prune": PruneOptions,
    "profile": ProfileOptions,
    "heal": HealOptions,
    "evaluate": EvaluateOptions,
    "cost": CostOptions,
}


@dataclass(frozen=True)
class Base:
    """A model to begin with: what the study calls it, what the user named, and how many blocks it has.

    ``block_parameters`` are those of one block, ``other_parameters`` those outside the blocks that every token runs
    through (no look-up tables), ``bytes`` those of all weights in float32.
    """

    name: str
    model: str
    depth: int
    block_parameters: int = 0
    other_parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: Its kind and what it makes; the steps of a study have different names.
        kind: The command: ``prune``, ``profile``, ``heal``, ``evaluate`` or ``cost``.
        options: Of the command, those at their defaults left out.
        makes: The file or folder that is there, whole, when the step is done.
        needs: Names of the steps that must be done before.
        base: The model it is about; empty where it is about several.
        blocks: How many blocks run in it; those of the whole model where they are not known yet.
        known: Whether all of the options are final; else the step waits for a profile, which tells the blocks.
        seconds: An estimate of its time; None where nobody knows.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    makes: str
    needs: tuple[str, ...] = ()
    base: str = ""
    blocks: int = 0
    known: bool = True
    seconds: float | None = None

    @property
    def alone(self) -> bool:
        """Whether nothing else may run meanwhile: what is timed is not disturbed."""
        return self.kind == "cost"

    @property
    def command(self) -> tuple[str, ...]:
        """The same work as a command line."""
        return command_words(self.kind, self.options)

    @property
    def command_line(self) -> str:
        """As :attr:`command`, to be typed."""
        return shlex.join(self.command) if self.known else ""


@dataclass(frozen=True)
class Variant:
    """One model that a study makes.

    Attributes:
        name: Of its folder.
        base: The model that it was cut from.
        depth: How many blocks that has.
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


@dataclass(frozen=True)
class Plan:
    """The steps in an order in which they can be done, and the variants that they make.

    ``failed`` are steps that can never be done, with the reason: a profile that does not tell what a depth asks of it.
    """

    steps: tuple[Step, ...]
    variants: tuple[Variant, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        steps = [asdict(step) | {"command": step.command_line} for step in self.steps]
        return {"steps": steps, "variants": [asdict(variant) for variant in self.variants]}


def plan_steps(
    study: StudyOptions,
    bases: Sequence[Base],
    profiles: Mapping[str, Profile],
    failed: Collection[str] = (),
) -> Plan:
    """The plan of a study.

    Args:
        study: Its options.
        bases: The models to begin with.
        profiles: Base → its profile, of those that are there.
        failed: Names of steps that failed: their models are not counted and timed with the others.

    Raises:
        ConfigError: A depth, a recipe or a seed is not right.
        IllegalDepth: A model cannot be cut so.
    """
    recipes = recipe_settings(study)
    found = [_of_base(study, recipes, base, profiles.get(base.name)) for base in bases]
    steps = [step for plan in found for step in plan.steps]
    variants = [variant for plan in found for variant in plan.variants]
    never = {name: reason for plan in found for name, reason in plan.failed.items()}
    lost = _lost(steps, {*failed, *never})
    left = [variant for variant in variants if variant.step not in lost]
    return Plan((*steps, *_cost(study, left)), tuple(variants), never)


def recipe_settings(study: StudyOptions) -> dict[str, dict[str, Any]]:
    """Recipe → the options of its training that are not at their defaults, without the seed. ``none`` has none.

    Raises:
        ConfigError: A name cannot be part of a folder's, or a setting is not right.
    """
    common = {name: getattr(study, name) for name in (*HealSettings.model_fields, "teacher")}
    recipes: dict[str, dict[str, Any]] = {}
    for name, own in study.recipes.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigError("recipes", name, f"{name!r} is no name", "small letters, digits and _")
        if name == NO_TRAINING and own:
            raise ConfigError("recipes", own, "none has no settings", "name the recipe otherwise")
        decided = sorted(_DECIDED & own.keys())
        if decided:
            raise ConfigError(f"recipes.{name}.{decided[0]}", own, "is the study's to say", "leave it out")
        try:
            whole = make(HealOptions, common | own | {"model": "-", "data": ["-"], "out": "-"})
        except ConfigError as error:
            raise ConfigError(f"recipes.{name}.{error.key}", error.value, *_said(error)) from None
        given = {key: getattr(whole, key) for key in HealOptions.model_fields.keys() - _DECIDED}
        ordered = {key: given[key] for key in HealOptions.model_fields if key in given}
        recipes[name] = {key: value for key, value in ordered.items() if value != default_of(HealOptions, key)}
    return recipes


_DECIDED = frozenset({"model", "data", "columns", "out", "seed"})


def numbers_of(settings: Mapping[str, Any]) -> TrainingConfig:
    """The numbers of a training, from its options; those that are not given are the recipe's."""
    return training_config(make(HealOptions, {"model": "-", "data": ["-"], "out": "-"} | dict(settings)))


def _said(error: ConfigError) -> tuple[str, str]:
    return error.problem.partition(": ")[2], error.hint


def command_words(kind: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Options as the words of a command line; ``-o`` comes last."""
    fields = _COMMANDS[kind].model_fields
    extras = {
        name: info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        for name, info in fields.items()
    }
    arguments = [word for name in options if extras[name].get("argument") for word in _values(options[name])]
    words = ["secateur", kind, *arguments]
    for name, value in options.items():
        if name != "out" and value is not None and not extras[name].get("argument"):
            flag = name.replace("_", "-")
            words += [f"--no-{flag}"] if value is False else [f"--{flag}", *_values(value)]
    return (*words, "-o", str(options["out"]))


def _values(value: Any) -> list[str]:
    if value is True:
        return []
    if isinstance(value, Mapping):
        return [",".join(f"{name}={item}" for name, item in value.items())]
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


@dataclass(frozen=True)
class _Cut:
    """Blocks to keep, the entries of ``depths`` that say so, how a name tells it, and why they cannot be told."""

    label: str
    specs: tuple[str, ...]
    blocks: tuple[int, ...] | None
    problem: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Which blocks, as ``prune`` wants it."""
        if self.blocks is None:
            return {}
        if self.blocks == tuple(range(len(self.blocks))):
            return {"to": str(len(self.blocks))}
        return {"keep": ",".join(map(str, self.blocks))}


@dataclass
class _Making:
    """The steps and variants of one base, while they are put together."""

    study: StudyOptions
    base: Base
    profiled: str
    steps: list[Step] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.study.out

    def add(
        self, kind: str, name: str, options: Mapping[str, Any], makes: Path, needs: Sequence[str], cut: _Cut
    ) -> str:
        """Add a step; one whose blocks are not known waits for the profile as well."""
        known = cut.blocks is not None
        blocks = self.base.depth if cut.blocks is None else len(cut.blocks)
        step = Step(
            f"{kind} {name}",
            kind,
            options,
            str(makes),
            tuple(needs) if known else (*needs, self.profiled),
            self.base.name,
            blocks,
            known,
        )
        self.steps.append(step)
        return step.name

    def add_variant(self, cut: _Cut, recipe: str, seed: int | None, name: str, step: str) -> None:
        folder = str(self.run / "models" / name)
        self.variants.append(
            Variant(name, self.base.name, self.base.depth, cut.specs, cut.blocks, recipe, seed, folder, step)
        )
        if self.study.tasks:
            out = self.run / "scores" / name
            options: dict[str, Any] = {"models": [folder], "tasks": list(self.study.tasks), "sample": self.study.sample}
            options |= _unless_default(EvaluateOptions, seed=self.study.seed)
            # By its name, wherever the run folder lies: the scores are of this study's model.
            options |= {"names": [name], "cache": str(self.study.cache or self.run / "cache"), "out": str(out)}
            self.add("evaluate", name, options, out / Scores.file, [step], cut)


def _of_base(
    study: StudyOptions, recipes: Mapping[str, Mapping[str, Any]], base: Base, profile: Profile | None
) -> Plan:
    """The model as it came, its profile, and every depth with every recipe and seed."""
    full = _Cut(str(base.depth), ("full",), tuple(range(base.depth)))
    making = _Making(study, base, f"profile {base.name}")
    source = study.out / "models" / f"{base.name}-{full.label}-{ZERO_SHOT}"
    options = {"model": base.model, **full.options, "pooling": study.pooling, "out": str(source)}
    came = making.add("prune", source.name, options, source, [], full)
    making.add_variant(full, NO_TRAINING, None, source.name, came)
    profiled = study.out / "profiles" / base.name
    measured = {"model": str(source), "data": [str(file) for file in study.data]}
    measured |= _unless_default(
        ProfileOptions,
        columns=study.columns,
        scale=study.profile_scale,
        max_examples=study.max_examples,
        dtype=study.profile_dtype,
        seed=study.seed,
        tasks=_tasks_by_depth(study),
        sample=study.sample if _tasks_by_depth(study) else None,
    )
    making.add("profile", base.name, measured | {"out": str(profiled)}, profiled / CURVE, [came], full)
    _train(making, recipes, full, source, came)
    for cut in _cuts(study.depths, base, profile):
        name = f"{base.name}-{cut.label}"
        folder = study.out / "pruned" / name
        if NO_TRAINING in recipes:
            name = f"{name}-{ZERO_SHOT}"
            folder = study.out / "models" / name
        pruned = making.add(
            "prune", name, {"model": str(source), **cut.options, "out": str(folder)}, folder, [came], cut
        )
        if NO_TRAINING in recipes:
            making.add_variant(cut, NO_TRAINING, None, name, pruned)
        if cut.problem:
            making.failed[pruned] = cut.problem
        _train(making, recipes, cut, folder, pruned)
    return Plan(tuple(making.steps), tuple(making.variants), making.failed)


def _tasks_by_depth(study: StudyOptions) -> list[str]:
    """The tasks that profiles score at every depth: all, where that is asked for or a depth is chosen by it."""
    return study.tasks if study.depth_scores or BY_TASKS in study.depths else []


def _train(making: _Making, recipes: Mapping[str, Mapping[str, Any]], cut: _Cut, source: Path, made: str) -> None:
    """One cut with every recipe and seed. A model that is its own teacher has nothing to learn while it is whole."""
    seeds = making.study.seeds or [making.study.seed]
    whole = making.run / "models" / f"{making.base.name}-{making.base.depth}-{ZERO_SHOT}"
    for recipe, given in recipes.items():
        if given.get("teacher") == ITSELF and source == whole:
            continue
        settings = {**given, "teacher": str(whole)} if given.get("teacher") == ITSELF else given
        if "teacher" in settings:  # its vectors are the same at all depths, and with all seeds
            settings = {"cache": str(making.study.cache or making.run / "cache"), **settings}
        for seed in seeds if recipe != NO_TRAINING else ():
            suffix = f"-seed{seed}" if len(seeds) > 1 else ""
            name = f"{making.base.name}-{cut.label}-{recipe}{suffix}"
            folder = making.run / "models" / name
            options = {"model": str(source), "data": [str(file) for file in making.study.data], **settings}
            options |= _unless_default(HealOptions, columns=making.study.columns, seed=seed) | {"out": str(folder)}
            step = making.add("heal", name, options, folder, [made], cut)
            making.add_variant(cut, recipe, seed, name, step)


def _cuts(specs: Sequence[str], base: Base, profile: Profile | None) -> Iterator[_Cut]:
    """The cuts below the full depth, the deepest first; entries that lead to the same blocks are one."""
    known: dict[tuple[int, ...], list[str]] = {}
    unknown: list[str] = []
    for spec in specs:
        try:
            blocks = _blocks(spec, base.depth, profile)
        except SecateurError as error:
            if profile is None:  # nothing has begun
                raise
            yield _Cut(f"({spec})", (spec,), None, str(error))
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
            yield _Cut(label, tuple(known[blocks]), blocks)
    for spec in unknown:
        yield _Cut(f"({spec})", (spec,), None)


def _blocks(spec: str, depth: int, profile: Profile | None) -> tuple[int, ...] | None:
    """The blocks that an entry of ``depths`` keeps; None where it takes a profile that is not there."""
    if not needs_profile(spec) or profile is not None:
        return blocks_to_keep(spec, depth, profile)
    _, counted, count = spec.partition(":")
    if counted:  # too many blocks are too many for every way of choosing them
        blocks_to_keep(count.partition(":")[0], depth)
    return None


def _label(blocks: tuple[int, ...], spec: str, taken: Collection[str]) -> str:
    """How a folder's name tells blocks: their number, and how they were chosen unless they are the first ones."""
    if blocks == tuple(range(len(blocks))):
        return str(len(blocks))
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(rf":{len(blocks)}(?=:|$)", "", spec.lower())).strip("_")
    way = words if words[:1].isalpha() else f"chosen_{words}"
    label, number = f"{len(blocks)}-{way}", 1
    while label in taken:
        number += 1
        label = f"{len(blocks)}-{way}_{number}"
    return label


def _cost(study: StudyOptions, variants: Sequence[Variant]) -> list[Step]:
    """All models side by side, in one step: times are compared under the same conditions."""
    if not variants:
        return []
    known = all(variant.blocks is not None for variant in variants)
    options = {"models": [variant.folder for variant in variants], "out": str(study.out)}
    needs = tuple(variant.step for variant in variants)
    return [Step("cost all", "cost", options, str(study.out / Costs.file), needs, known=known)]


def _lost(steps: Sequence[Step], failed: Collection[str]) -> set[str]:
    """Steps that failed, and those that need them."""
    lost = set(failed)
    for step in steps:  # in the order of the work
        if lost.intersection(step.needs):
            lost.add(step.name)
    return lost


def blocked(plan: Plan, failed: Collection[str]) -> set[str]:
    """Steps that cannot be done because of others that failed."""
    return _lost(plan.steps, failed) - set(failed)


def _unless_default(options: type[Options], **values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != default_of(options, name)}
