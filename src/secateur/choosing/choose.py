"""What a person says → the blocks that stay: a number, a share, or the name of a selector."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

from secateur.choosing.budgets import Budget, within
from secateur.choosing.selectors import SEED, SELECTORS, Choice, Question, Selector, l3prune, prefix
from secateur.errors import ConfigError, IllegalDepth
from secateur.results import Profile, load

SHORT = {"small": "l3prune-small", "large": "l3prune-large"}
"""Short names of the paper's two choices."""
CHOSEN_FROM = "chosen_from"
"""Key of ``choice.json`` that holds the :func:`losses_fingerprint`; a choice written by hand needs none."""


def choose(
    profile: Profile | str | Path,
    *,
    max_params: float | None = None,
    max_bytes: float | None = None,
    max_latency_ms: float | None = None,
    max_loss_increase: float | None = None,
) -> dict[str, int]:
    """Choose depths from a profile: L3Prune's two (arXiv 2410.14578, section 3), or one within a budget.

    Args:
        profile: A profile, its file, or the folder that holds it.
        max_params: Most parameters, the token table included. With any of the limits, the choice is what
            :func:`.within` gives.
        max_bytes: Most bytes of the weights.
        max_latency_ms: Most milliseconds for one text of some 20 tokens, as measured when the profile was made.
        max_loss_increase: Most by which the loss may be above the lowest of all depths, as a share: 0.05 is 5 %.

    Returns:
        ``{"small": k, "large": k}``, numbers of blocks to keep: where the untrained model's loss is lowest, ``small``
        in the first ``depth // 2`` depths and ``large`` in the others. Of equal losses the shallowest wins. With
        limits, ``{"budget": k}``.

    Raises:
        DataError: The file is no profile, or does not tell what is asked for, as one of texts alone has no losses.
        IllegalDepth: The model has a single block.
        ConfigError: No depth is within the limits, or a limit is no number.
    """
    table = read_profile(profile)
    budget = Budget(max_params, max_bytes, max_latency_ms, max_loss_increase)
    if budget.is_given:
        return {"budget": len(within(budget, table).blocks)}
    question = Question(table.depth, table)
    return {name: len(l3prune(question, half).blocks) for half, name in enumerate(SHORT)}


def losses_fingerprint(profile: Profile) -> str:
    """Of the losses by depth, all that :func:`choose` reads: tells whether a choice was made from this profile."""
    losses = json.dumps([row.loss for row in profile.depths])
    return hashlib.sha256(losses.encode()).hexdigest()[:16]


def blocks_to_keep(
    to: str | int | float, depth: int, profile: Profile | str | Path | None = None, *, seed: int = SEED
) -> tuple[int, ...]:
    """The blocks that stay, as ``--to`` says it.

    Args:
        to: How many blocks to keep; a share to remove, between 0 and 1 (as in the paper's code, ``1`` keeps one block
            and ``0.3`` removes 30 % of them, rounding the number kept down); ``small`` or ``large``; the name of a
            selector (:data:`.SELECTORS`) that decides how many, such as ``knee``; or the name of
            another with a number: ``uniform:7``, and with a seed ``random:7:1``.
        depth: How many blocks the model has.
        profile: Of this model, for the selectors that read one.
        seed: Of what is drawn, where ``to`` names none.

    Returns:
        Indices of blocks, from 0, ascending.

    Raises:
        ConfigError: ``to`` is none of these, or the profile is missing or of another depth.
        IllegalDepth: No such depth.
        DataError: The profile does not tell what the selector reads.
    """
    number = _number(to)
    if number is None:
        return choice_of(str(to), depth, profile, seed=seed).blocks
    return prefix(_number_kept(number, to, depth))


def needs_profile(to: str | int | float) -> bool:
    """Whether only a profile tells which blocks ``to`` means.

    Raises:
        ConfigError: It is the name of no selector.
    """
    return _number(to) is None and _parse(str(to))[0].reads_profile


def is_selector(to: str | int | float) -> bool:
    """Whether ``to`` is a selector, and no number or share of blocks."""
    return _number(to) is None


def target_depth(to: str | int | float, depth: int, profile: Profile | str | Path | None = None) -> int:
    """How many of the first blocks ``--to`` keeps.

    Raises:
        As :func:`blocks_to_keep`; and ConfigError where other blocks than the first would stay.
    """
    blocks = blocks_to_keep(to, depth, profile)
    if blocks != prefix(len(blocks)):
        raise ConfigError("to", to, f"{to} keeps other blocks than the first", "a number, or a choice of a depth")
    return len(blocks)


def choice_of(name: str, depth: int, profile: Profile | str | Path | None = None, *, seed: int = SEED) -> Choice:
    """What a selector chooses, with its reason; ``name`` as in :func:`blocks_to_keep`, which see."""
    selector, count, own_seed = _parse(name)
    table = None
    if selector.reads_profile:
        if profile is None:
            hint = "give --profile DIR, or a number of blocks"
            raise ConfigError("to", name, f"is {name}, which needs a profile", hint)
        table = read_profile(profile)
        if table.depth != depth:
            problem = f"has {table.depth} depths, but the model has {depth} blocks"
            raise ConfigError("profile", table.model, problem)
    return selector.rule(Question(depth, table, count, seed if own_seed is None else own_seed))


def read_profile(profile: Profile | str | Path) -> Profile:
    """A profile, its file, or the folder that holds it."""
    return profile if isinstance(profile, Profile) else load(profile, Profile)


def _parse(text: str) -> tuple[Selector, int, int | None]:
    """``random:7:1`` → the selector, how many blocks, and the seed if it is there."""
    name, *numbers = text.split(":")
    selector = SELECTORS.get(SHORT.get(name, name))
    if selector is None:
        known = ", ".join([*SHORT, *(key if not item.counts else f"{key}:K" for key, item in SELECTORS.items())])
        hint = f"give a number of blocks, a share to remove, or one of {known}"
        raise ConfigError("to", text, f"is {text!r}", hint)
    if not selector.counts and numbers:
        raise ConfigError("to", text, f"is {text!r}, but {name} decides by itself how many blocks to keep", name)
    most = 2 if name == "random" else 1
    if selector.counts and not (1 <= len(numbers) <= most and all(re.fullmatch("[0-9]{1,9}", n) for n in numbers)):
        raise ConfigError("to", text, f"is {text!r}, but {name} must be told how many blocks to keep", f"{name}:7")
    given = list(map(int, numbers))
    return selector, given[0] if given else 0, given[1] if len(given) > 1 else None


def _number(to: str | int | float) -> float | None:
    try:
        return float(to)
    except ValueError:
        return None


def _number_kept(number: float, to: str | int | float, depth: int) -> int:
    if 0 < number < 1:
        kept = math.floor(depth * (1 - number) + 1e-9)  # 30 × (1 − 0.8) is 5.999… in floating point
    elif number.is_integer():
        kept = int(number)
    else:
        raise ConfigError("to", to, f"is {to}", "a number of blocks to keep is whole, a share to remove below 1")
    if not 1 <= kept <= depth:
        raise IllegalDepth(to, depth, f"that would keep {kept}", [1 if kept < 1 else depth])
    return kept
