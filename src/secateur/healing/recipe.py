"""The numbers of a training, and named sets of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from secateur.errors import ConfigError

Trained = Literal["lora", "blocks", "all", "auto"]
LEARNING_RATES = {"lora": 2e-4, "blocks": 5e-4, "all": 5e-4}
"""Peak of the schedule by what is trained; the first is the paper's, the others were measured (docs/healing.md)."""


LARGEST_SEED = 2**32 - 1
"""That numpy takes."""

ADAPTERS_ONLY = ("lora_rank", "lora_alpha", "lora_dropout")
"""Numbers that mean nothing where there are no adapters."""


def check_count(key: str, value: Any, *, least: int = 1, most: int | None = None) -> None:
    """Refuse what is no whole number, or out of bounds; None is one that was not given.

    Raises:
        ConfigError: It is.
    """
    if value is None or (isinstance(value, int) and value >= least and (most is None or value <= most)):
        return
    bounds = f"{least} or more" if most is None else f"from {least} to {most}"
    raise ConfigError(key, value, f"is {value}", f"a whole number, {bounds}")


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training; the defaults are the paper's (L3Prune, arXiv 2410.14578, section 4).

    ``train`` is what is trained (:mod:`.trainable`), ``learning_rate`` the peak of a schedule that rises over
    the share ``warmup`` of the steps and falls linearly to 0; None takes that of :data:`LEARNING_RATES`. ``precision``
    is ``float32``, ``bfloat16`` (autocast) or ``auto``: bfloat16 where the processor multiplies in it.
    ``mini_batch_tokens`` and ``gradient_checkpointing`` save memory, cost time, and change no number.
    """

    steps: int = 1000
    batch_size: int = 64
    train: str = "lora"
    learning_rate: float | None = None
    warmup: float = 0.3
    scale: float = 50.0
    max_length: int = 512
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    mini_batch_tokens: int | None = None
    gradient_checkpointing: bool = False
    precision: str = "auto"
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse numbers that no training can run with."""
        for name in ("steps", "batch_size", "max_length", "lora_rank", "lora_alpha", "mini_batch_tokens"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0, most=LARGEST_SEED)
        for name in ("learning_rate", "scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(name, value, f"is {value}", "it must be positive, and finite")
        if self.batch_size < 2:
            raise ConfigError(
                "batch_size", self.batch_size, f"is {self.batch_size}", "in-batch negatives need at least 2"
            )
        for name in ("lora_dropout", "warmup"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(name, value, f"is {value}", "it is a share below 1")
        for name, known in (("precision", ("auto", "float32", "bfloat16")), ("train", get_args(Trained))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(name, value, f"is {value!r}", f"one of {', '.join(known)}")

    @property
    def in_bfloat16(self) -> bool:
        """``precision``, with ``auto`` decided for this machine."""
        if self.precision != "auto":
            return self.precision == "bfloat16"
        if torch.cuda.is_available():
            return bool(torch.cuda.is_bf16_supported())
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate``, or the default of what is trained, which must be decided."""
        return LEARNING_RATES[self.train] if self.learning_rate is None else self.learning_rate


L3PRUNE, DISTILL = "l3prune", "distill"
RECIPES: Mapping[str, Recipe] = {
    L3PRUNE: Recipe(),
    "everyday": Recipe(train="auto", warmup=0.1, scale=20.0, max_length=128),
    DISTILL: Recipe(train="auto", learning_rate=1e-3, warmup=0.1, scale=20.0, max_length=128),
}
"""Named sets of defaults: the paper's, one for every day, and one for a small model that a teacher teaches on texts
alone (docs/healing.md says how they were found)."""


def make_recipe(name: str = L3PRUNE, **given: Any) -> Recipe:
    """A named recipe with what is given in place of its own numbers; None leaves one as it is.

    Raises:
        ConfigError: There is no such recipe or number, a number is not valid, or it is of adapters and there are none.
    """
    if name not in RECIPES:
        raise ConfigError("recipe", name, f"is {name!r}", f"one of {', '.join(RECIPES)}")
    unknown = sorted(set(given) - {field.name for field in fields(Recipe)})
    if unknown:
        raise ConfigError(unknown[0], given[unknown[0]], "no recipe has such a number")
    made = replace(RECIPES[name], **{key: value for key, value in given.items() if value is not None})
    for key in ADAPTERS_ONLY if made.train in ("blocks", "all") else ():
        if getattr(made, key) != getattr(RECIPES[name], key):
            problem = f"there are no adapters where train is {made.train}"
            raise ConfigError(key, getattr(made, key), problem, "leave it out, or train lora")
    return made
