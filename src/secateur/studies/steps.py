"""What a study is made of, as plain data: models to begin with, and steps, each of which is one command.

How folders are named is told in :mod:`.reporting.run`, which reads them.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from secateur import options as config
from secateur.choosing.choose import blocks_to_keep, needs_profile
from secateur.choosing.selectors import is_prefix
from secateur.document import Table, duration
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


@dataclass
class State:
    """How far a study is. ``seconds`` are those of the finished steps, ``failed`` says why, ``running`` since when.

    ``slots`` is how many steps run at once.
    """

    plan: Plan = field(default_factory=Plan)
    done: Collection[str] = ()
    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    slots: int = 1

    @property
    def expected(self) -> dict[str, float | None]:
        """Step → the seconds that it took, or will take, about; None where nobody knows.

        Estimates are multiplied by what the finished steps took beside theirs, as if a further tenth of the plan had
        taken what was estimated: one short step alone says little of the long ones.
        """
        done = [step for step in self.plan.steps if step.name in self.seconds and step.seconds]
        as_estimated = sum(step.seconds or 0 for step in self.plan.steps) / 10
        estimated = sum(step.seconds or 0 for step in done) + as_estimated
        factor = (sum(self.seconds[step.name] for step in done) + as_estimated) / estimated if estimated else 1.0
        left = {step.name: step.seconds and step.seconds * factor for step in self.plan.steps}
        return {name: self.seconds.get(name, seconds) for name, seconds in left.items()}

    @property
    def seconds_left(self) -> float:
        """Estimated time of the steps that are left and can be done, as many at once as there are slots."""
        now, expected = time.time(), self.expected
        left = [step.name for step in self.plan.steps if self.of(step) in ("waiting", "running")]
        work = sum(max(0.0, (expected[name] or 0.0) - (now - self.running.get(name, now))) for name in left)
        return work / self.slots

    def of(self, step: Step) -> str:
        """``done``, ``running``, ``failed``, ``blocked`` (by one that failed) or ``waiting``."""
        for name, steps in (("done", self.done), ("running", self.running), ("failed", self.failed)):
            if step.name in steps:
                return name
        return "blocked" if step.name in self.plan.blocked(self.failed) else "waiting"

    @property
    def summary(self) -> str:
        """``5 done, 1 running, 7 waiting; about 12 min left``."""
        found = [self.of(step) for step in self.plan.steps]
        words = ("done", "running", "waiting", "failed", "blocked")
        counts = ", ".join(f"{found.count(word)} {word}" for word in words if word in found)
        return counts + (f"; about {duration(left)} left" if (left := self.seconds_left) else "")

    @property
    def table(self) -> Table:
        """The steps in their order; times are estimates where a step has not finished."""
        rows, expected = [], self.expected
        for step in self.plan.steps:
            seconds, about = expected[step.name], "" if step.name in self.seconds else "about "
            needs = ", ".join(step.depends_on) if len(step.depends_on) < 4 else f"{len(step.depends_on)} steps"
            word = self.of(step)
            took = "" if word == "done" and about else "?" if seconds is None else about + duration(seconds)
            rows.append((step.name, word, needs, took))
        return Table(self.summary, ("step", "state", "needs", "time"), rows, texts=3)

    def _repr_html_(self) -> str:
        return self.table.to_html()


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
