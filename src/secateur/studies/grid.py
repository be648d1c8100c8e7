"""The study of separate trainings: models × depths × recipes × seeds, where the user names the depths.

Depths that a profile chooses are not known before it is there: until then their steps stand in the plan without a
command, and the plan made anew after the profile has them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.choosing.choose import blocks_to_keep, is_prefix, needs_profile
from secateur.errors import ConfigError, SecateurError
from secateur.options import HealOptions, HealSettings, StudyOptions
from secateur.reporting.run import TRIMMED, UNTRAINED
from secateur.results import Profile
from secateur.studies.steps import (
    FULL,
    ITSELF,
    MODELS,
    NO_TRAINING,
    Base,
    Plan,
    Variant,
    add_profile,
    add_scores,
    add_trimmed,
    add_whole,
    cache_of,
    command_options,
)

BY_TASKS = "best-task"
"""As a depth: what the scores of the tasks at every depth choose."""

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
        if name == TRIMMED and study.cuts_vocabulary:
            problem = "is what models are called that had their vocabulary cut alone"
            raise ConfigError("recipes", name, problem, "name the recipe otherwise")
        for decided in sorted(_DECIDED.keys() & own.keys()):
            raise ConfigError(f"recipes.{name}.{decided}", own, "is the study's to say", "leave it out")
        try:
            recipes[name] = command_options(HealOptions, common | own | _DECIDED)
        except ConfigError as error:
            problem = error.problem.partition(": ")[2]
            raise ConfigError(f"recipes.{name}.{error.key}", error.value, problem, error.hint) from None
    return recipes


def settings_of(study: StudyOptions, training: HealOptions, came: Path) -> dict[str, Any]:
    """What a training is told beside its model and data; ``came`` is the model as it came."""
    settings = {key: value for key, value in training.given().items() if key not in _DECIDED}
    if "teacher" in settings:  # its vectors are the same at all depths, and with all seeds
        settings = {"cache": cache_of(study), **settings}
    if settings.get("teacher") == ITSELF:
        settings["teacher"] = str(came)
    return settings


def add_grid(
    plan: Plan, study: StudyOptions, recipes: Mapping[str, HealOptions], base: Base, profile: Profile | None
) -> None:
    """The model as it came, with its vocabulary cut, its profile, and every depth with every recipe and seed."""
    whole, came = add_whole(plan, study, base)
    start, begun = add_trimmed(plan, study, whole, came)
    for untrained, step in {whole: came, start: begun}.items():
        add_scores(plan, study, untrained, step, study.tasks)
    scored = study.tasks if study.depth_scores or BY_TASKS in study.depths else []
    add_profile(plan, study, start, begun, scored)
    source = study.out / MODELS / start.name
    _add_trainings(plan, study, recipes, replace(whole, name=f"{base.name}-{base.depth}"), source, begun)
    untrained_state = TRIMMED if study.cuts_vocabulary else UNTRAINED
    for variant, problem in _cuts(study.depths, base, profile):
        told_by = None if variant.blocks is not None else f"profile {base.name}"
        is_kept = NO_TRAINING in recipes
        cut = replace(variant, name=f"{variant.name}-{untrained_state}") if is_kept else variant
        folder = study.out / (MODELS if is_kept else "pruned") / cut.name
        blocks = {"model": str(source), **_kept(variant.blocks)}
        pruned = plan.add("prune", cut, folder, begun, told_by=told_by, **blocks, out=folder)
        if problem:
            plan.failed[pruned] = problem
        if is_kept:
            add_scores(plan, study, cut, pruned, study.tasks, told_by)
        _add_trainings(plan, study, recipes, variant, folder, pruned, told_by)


def _add_trainings(
    plan: Plan,
    study: StudyOptions,
    recipes: Mapping[str, HealOptions],
    variant: Variant,
    folder: Path,
    pruned: str,
    told_by: str | None = None,
) -> None:
    """Train the model in a folder, which the step ``pruned`` makes, with every recipe and seed."""
    data = {"model": str(folder), "data": study.data, "columns": study.columns}
    came = study.out / MODELS / f"{variant.base.name}-{variant.base.depth}-{UNTRAINED}"
    for recipe, training in recipes.items():
        learns_nothing = training.teacher == ITSELF and variant.specs == FULL and not study.cuts_vocabulary
        if recipe == NO_TRAINING or learns_nothing:  # the whole from itself
            continue
        settings = settings_of(study, training, came)
        for seed in study.seeds or [study.seed]:
            suffix = f"-seed{seed}" if len(study.seeds) > 1 else ""
            trained = replace(variant, name=f"{variant.name}-{recipe}{suffix}", recipe=recipe, seed=seed)
            out = study.out / MODELS / trained.name
            step = plan.add("heal", trained, out, pruned, told_by=told_by, **data, **settings, seed=seed, out=out)
            add_scores(plan, study, trained, step, study.tasks, told_by)


def _kept(blocks: tuple[int, ...] | None) -> dict[str, str]:
    """Which layers, as ``prune`` takes it."""
    if blocks is None:
        return {}
    return {"to": str(len(blocks))} if is_prefix(blocks) else {"keep": ",".join(map(str, blocks))}


def _cuts(specs: Sequence[str], base: Base, profile: Profile | None) -> Iterator[tuple[Variant, str]]:
    """The cuts below the full depth, the deepest first, and why one cannot be told.

    Entries that lead to the same layers are one.
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
    """The layers that an entry of ``depths`` keeps; None where it takes a profile that is not there."""
    if not needs_profile(spec) or profile is not None:
        return blocks_to_keep(spec, depth, profile)
    _, counted, count = spec.partition(":")
    if counted:  # too many layers are too many for every selector
        blocks_to_keep(count.partition(":")[0], depth)
    return None


def _label(blocks: tuple[int, ...], spec: str, taken: Collection[str]) -> str:
    """How a folder's name tells layers: their number, and the selector unless they are the first ones."""
    if is_prefix(blocks):
        return str(len(blocks))
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(rf":{len(blocks)}(?=:|$)", "", spec.lower())).strip("_")
    way = words if words[:1].isalpha() else f"chosen_{words}"
    label, number = f"{len(blocks)}-{way}", 1
    while label in taken:
        number += 1
        label = f"{len(blocks)}-{way}_{number}"
    return label
