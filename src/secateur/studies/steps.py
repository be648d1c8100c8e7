"""What a study is made of, as plain data: models to begin with, and steps, each of which is one command.

How folders are named is told in :mod:`.reporting.run`, which reads them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from secateur import options as config
from secateur.choosing.choose import blocks_to_keep, needs_profile
from secateur.choosing.selectors import is_prefix
from secateur.errors import ConfigError, SecateurError
from secateur.options import Options, command_words
from secateur.results import Profile, Scores

Blocks = tuple[int, ...]
"""Indices of layers."""

LAST = {"profile": "curve.png", "scout": "frontier.png", "evaluate": Scores.file}
"""Command → the file of its folder that is written last; of the others the folder appears whole."""
MODELS = "models"
"""The folder of the models that are evaluated and timed."""
COMMANDS: Mapping[str, type[Options]] = {
    "prune": config.PruneOptions,
    "profile": config.ProfileOptions,
    "heal": config.HealOptions,
    "scout": config.ScoutOptions,
    "evaluate": config.EvaluateOptions,
    "cost": config.CostOptions,
}


@dataclass(frozen=True)
class Base:
    """A model to begin with: its name in the study, what the user named, and how large it, and one layer, is."""

    name: str
    model: str
    depth: Annotated[int, Field(gt=0)]
    block_parameters: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: The command, or ``trim`` where one cuts the vocabulary, and what it makes; unique in a study.
        options: Of the command ``kind``; those at their defaults are not set.
        output: The file or folder that is there when the step is done.
        depends_on: Names of the steps that must be done before.
        base: The model that it begins with; None where there are several.
        depth: Layers of the model that it makes or measures, all while a profile or a scout has to say; 0 for one that
            the study does not make.
        seconds: An estimate of its time; None where nobody knows.
    """

    name: str
    kind: str
    options: Options
    output: Path
    depends_on: tuple[str, ...] = ()
    base: Base | None = None
    depth: int = 0
    seconds: float | None = None

    @property
    def stem(self) -> str:
        """Of the names of its log and its record."""
        return self.name.replace(" ", "-")

    @property
    def command(self) -> tuple[str, ...]:
        """The words of the same work on the command line."""
        return command_words(self.kind, self.options)

    @property
    def command_line(self) -> str:
        """As :attr:`command`, to be typed."""
        return shlex.join(self.command)


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
    def models(self) -> list[Step]:
        """The steps that make the study's models."""
        return [step for step in self.steps if step.kind in ("prune", "heal") and step.output.parent.name == MODELS]

    def blocked(self, failed: Collection[str]) -> set[str]:
        """Steps that cannot be done because of others that failed."""
        lost = set(failed)
        for step in self.steps:  # in the order of the work
            if lost.intersection(step.depends_on):
                lost.add(step.name)
        return lost - set(failed)


def cuts_of(specs: Sequence[str], depth: int, profile: Profile | None) -> Iterator[tuple[str, Blocks | None, str]]:
    """The cuts below the full depth that entries of ``depths`` ask for, the deepest first.

    Of each its label in a folder's name, its layers, and why they cannot be told. Entries that lead to the same layers
    are one; those that a profile has to tell come last, without layers.
    """
    known: dict[Blocks, str] = {}
    unknown: dict[str, str] = {}
    for spec in specs:
        try:
            if profile is None and needs_profile(spec):
                _, counted, count = spec.partition(":")
                if counted:  # too many layers are too many for every selector
                    blocks_to_keep(count.partition(":")[0], depth)
                unknown[spec] = ""
            else:
                known.setdefault(blocks_to_keep(spec, depth, profile), spec)
        except SecateurError as error:
            told = error.of("depths") if isinstance(error, ConfigError) and error.key == "to" else error
            if profile is None:  # nothing has begun
                raise told from None
            unknown[spec] = str(told)
    taken: set[str] = set()
    for blocks in sorted(known, key=lambda kept: (-len(kept), kept)):
        if len(blocks) < depth:
            label = _label(blocks, known[blocks], taken)
            taken.add(label)
            yield label, blocks, ""
    for spec, problem in unknown.items():
        yield f"({spec})", None, problem


def _label(blocks: Blocks, spec: str, taken: Collection[str]) -> str:
    """How a folder's name tells layers: their number, and the selector unless they are the first ones."""
    if is_prefix(blocks):
        return str(len(blocks))
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(rf":{len(blocks)}(?=:|$)", "", spec.lower())).strip("_")
    stem = f"{len(blocks)}-{words if words[:1].isalpha() else f'chosen_{words}'}"
    return next(label for label in (stem, *(f"{stem}_{n}" for n in range(2, len(taken) + 3))) if label not in taken)


def layers_option(blocks: Blocks | None) -> dict[str, str]:
    """Layers as ``prune`` takes them; nothing while a profile or a scout has to say."""
    if blocks is None:
        return {}
    return {"to": str(len(blocks))} if is_prefix(blocks) else {"keep": ",".join(map(str, blocks))}
