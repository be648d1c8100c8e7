"""What a study is made of, as plain data: models, the layers that they keep, and steps, each of which is one command.

Folders are named ``<model>-<depth>-<state>``. The state is ``zero-shot`` for a model as it came, ``trimmed`` for one
that is not trained either, but had its vocabulary cut, ``scout`` after the training of several depths, ``polished``
after the one that follows it, or a recipe's name; after the selector where the layers are not the first ones, and
before the seed where there are several: ``smollm2-7-uniform-healed-seed2``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from secateur import options as config
from secateur.choosing.choose import blocks_to_keep, is_prefix, needs_profile
from secateur.errors import SecateurError
from secateur.options import Options, default_of, extra, make
from secateur.results import Profile, Scores

O = TypeVar("O", bound=Options)  # noqa: E741 - the letter that reads as Options

LAST = {"profile": "curve.png", "scout": "frontier.png", "evaluate": Scores.file}
"""Command → the file of its folder that is written last; of the others the folder appears whole."""
MODELS = "models"
"""The folder of the models that are evaluated and timed."""
PRUNED, TRAINED = "pruned", "trained"
"""The folders of models on the way to these: cut and not trained; trained, with all tokens."""
NO_TRAINING = "none"
FULL = ("full",)
"""The entry of ``depths`` that stands for all layers."""

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

    @property
    def layers(self) -> dict[str, str]:
        """Which layers, as ``prune`` takes it; nothing while a profile or a scout has to say."""
        if self.blocks is None:
            return {}
        return {"to": str(self.depth)} if is_prefix(self.blocks) else {"keep": ",".join(map(str, self.blocks))}


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: The command, or ``trim`` where one cuts the vocabulary, and what it makes; unique in a study.
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
        self,
        kind: str,
        variant: Variant,
        *depends_on: str,
        told_by: str | None = None,
        title: str | None = None,
        **options: Any,
    ) -> str:
        """Add a step about one model, and give its name.

        Args:
            kind: The command.
            variant: The model that it makes or measures.
            depends_on: Names of steps.
            told_by: The step that has to tell some of the options yet.
            title: What the step's name says in place of the command.
            options: Of the command.
        """
        name = f"{title or kind} {variant.base.name if kind == 'profile' else variant.name}"
        needed = depends_on if told_by is None else tuple(dict.fromkeys((*depends_on, told_by)))
        made = command_options(COMMANDS[kind], options)
        output = options["out"] / LAST.get(kind, "")
        self.steps.append(Step(name, kind, made, output, needed, variant, told_by is None))
        return name

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


def cuts_of(specs: Sequence[str], base: Base, profile: Profile | None) -> Iterator[tuple[Variant, str]]:
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
