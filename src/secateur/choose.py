"""A profile → the depths to cut to."""

from __future__ import annotations

import math
from pathlib import Path

from secateur.artifacts import Profile, load
from secateur.errors import ConfigError, DataError, IllegalDepth

SIZES = ("small", "large")


def choose(profile: Profile | str | Path) -> dict[str, int]:
    """L3Prune's two depths (arXiv 2410.14578, section 3): where the untrained model's loss is lowest in each half.

    Args:
        profile: A profile, its file, or the folder that holds it.

    Returns:
        ``{"small": k, "large": k}``, numbers of blocks to keep: ``small`` from the first ``depth // 2`` depths and
        ``large`` from the others. Of equal losses the shallowest wins.

    Raises:
        DataError: The file is no profile, or one of texts alone.
        IllegalDepth: The model has a single block.
    """
    table = profile if isinstance(profile, Profile) else load(profile, Profile)
    losses = [row.loss for row in table.depths if row.loss is not None]
    if len(losses) < table.depth:
        raise DataError(table.file, "has no losses", "it was made from texts alone; profile on pairs", field="loss")
    half = table.depth // 2
    if half == 0:
        raise IllegalDepth("small and large", table.depth, "a single block has no halves")
    small, large = losses[:half], losses[half:]
    return {"small": small.index(min(small)) + 1, "large": large.index(min(large)) + half + 1}


def target_depth(to: str | int | float, depth: int, profile: Profile | str | Path | None = None) -> int:
    """How many blocks ``--to`` keeps.

    Args:
        to: ``large`` or ``small`` (needs a profile), a whole number of blocks to keep, or a share of the blocks to
            remove, between 0 and 1. As in the paper's code, ``1`` keeps one block and ``0.3`` removes 30 % of them,
            rounding the number kept down.
        depth: How many blocks the model has.
        profile: Of this model.

    Raises:
        ConfigError: ``to`` is none of these, or the profile is missing or of another depth.
        IllegalDepth: No such depth.
    """
    text = str(to)
    if text in SIZES:
        return _from_profile(text, depth, profile)
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            "to", to, f"is {text!r}", "give large, small, a number of blocks, or a share to remove"
        ) from None
    if 0 < number < 1:
        kept = math.floor(depth * (1 - number) + 1e-9)  # 30 × (1 − 0.8) is 5.999… in floating point
    elif number.is_integer():
        kept = int(number)
    else:
        raise ConfigError("to", to, f"is {text}", "a number of blocks to keep is whole, a share to remove below 1")
    if not 1 <= kept <= depth:
        raise IllegalDepth(text, depth, f"that would keep {kept}", [1 if kept < 1 else depth])
    return kept


def _from_profile(size: str, depth: int, profile: Profile | str | Path | None) -> int:
    if profile is None:
        raise ConfigError("to", size, f"is {size}, which needs a profile", "give --profile DIR, or a number of blocks")
    table = profile if isinstance(profile, Profile) else load(profile, Profile)
    if table.depth != depth:
        raise ConfigError("profile", table.model, f"has {table.depth} depths, but the model has {depth} blocks")
    return choose(table)[size]
