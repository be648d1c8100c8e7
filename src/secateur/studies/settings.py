"""What a study is asked for: presets, the options of its trainings, and options that would have no effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from secateur.choosing.choose import CHOSEN
from secateur.errors import ConfigError
from secateur.options import Budget, HealOptions, HealSettings, StudyOptions, default_of
from secateur.reporting.run import TRIMMED
from secateur.studies.steps import NO_TRAINING, command_options

ITSELF = "self"
"""As a teacher: the whole model, of which the cut ones are parts."""

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
        "recipe": "l3prune",
        "gradient_checkpointing": True,
    },
    "shrink": {"teacher": ITSELF},
}
"""Options that a preset decides, where the user has not; the demo's come with its data."""

_SCOUTED = ("ladder", "polish", "layers", "held_out", *Budget.model_fields)
"""Options of a study with a scout."""
DECIDED: dict[str, Any] = {"model": "-", "data": ["-"], "columns": None, "out": "-", "seed": 42}
"""Options of a training that the study decides, until it has."""


def check_options(study: StudyOptions) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: One of a scout where the depths are named, or one of named depths where they are not.
    """
    if CHOSEN in study.depths:
        raise ConfigError("depths", CHOSEN, f"{CHOSEN} is what a scout chooses", "leave out depths")
    for name in _SCOUTED if study.depths else ("recipes",):
        given = getattr(study, name)
        if given == default_of(StudyOptions, name):
            continue
        if study.depths:
            problem = f"is for a scout, but depths names those to train: {', '.join(study.depths)}"
            raise ConfigError(name, given, problem, f"leave out depths, or {name}")
        problem = "are trained at the depths that are named, and none is"
        raise ConfigError(name, given, problem, "name depths, or set the options of heal themselves")


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
        for decided in sorted(DECIDED.keys() & own.keys()):
            raise ConfigError(f"recipes.{name}.{decided}", own, "is the study's to say", "leave it out")
        try:
            recipes[name] = command_options(HealOptions, common | own | DECIDED)
        except ConfigError as error:
            problem = error.problem.partition(": ")[2]
            raise ConfigError(f"recipes.{name}.{error.key}", error.value, problem, error.hint) from None
    return recipes
