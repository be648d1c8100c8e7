"""Which blocks stay, as a person says it: ``--to 7`` or ``--to knee``, ``--keep 0-5,8,11`` or ``--drop 20-27``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.choosing.choose import blocks_to_keep, is_selector, read_profile
from secateur.errors import ConfigError
from secateur.results import Profile


@dataclass(frozen=True)
class Selection:
    """Which blocks stay, as the user said it; exactly one of ``to``, ``keep`` and ``drop``."""

    to: str | int | float | None
    keep: str | Sequence[int] | None
    drop: str | Sequence[int] | None
    profile: Profile | str | Path | None

    def __post_init__(self) -> None:
        given = [name for name in ("to", "keep", "drop") if getattr(self, name) is not None]
        if len(given) != 1:
            problem = f"cannot go with {' and '.join(given[1:])}" if given else "is missing, as are keep and drop"
            raise ConfigError(given[0] if given else "to", None, problem, "give exactly one of to, keep and drop")
        said = getattr(self, given[0])
        if isinstance(said, bool) or (self.to is None and not isinstance(said, (str, Sequence))):
            hint = "a number, a share or a selector" if self.to is not None else "blocks from 0, such as 0-5,8,11"
            raise ConfigError(given[0], said, f"{said!r} is not valid", hint)
        if self.profile is not None and (self.to is None or not is_selector(self.to)):
            raise ConfigError(
                "profile", self.profile, f"is not asked: {given[0]} {said} tells the blocks", "leave it out"
            )

    def check_pooling(self, pooling: str | None) -> None:
        """Refuse a pooling by which the depths were not measured.

        Raises:
            ConfigError: The profile is of another.
        """
        if self.profile is None or pooling is None:
            return
        measured = read_profile(self.profile).pooling
        if {"l3prune": "weighted_mean"}.get(
            measured, measured
        ) != pooling:  # a folder has the stock form of the paper's
            hint = f"profile with --pooling {pooling}, or cut with {measured}"
            raise ConfigError("pooling", pooling, f"is {pooling}, but the profile was measured with {measured}", hint)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Indices of the blocks that stay, of ``depth`` blocks.

        Raises:
            ConfigError: A piece of the choice is no block of this model.
        """
        if self.to is not None:
            return blocks_to_keep(self.to, depth, self.profile)
        if self.keep is not None:
            return _parse("keep", self.keep, depth)
        assert self.drop is not None
        gone = _parse("drop", self.drop, depth)
        if len(gone) == depth:
            raise ConfigError("drop", self.drop, f"would leave none of the {depth} blocks")
        return tuple(i for i in range(depth) if i not in gone)


def _parse(option: str, given: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """``"0-5,8,11"`` → indices."""
    blocks: list[int] = []
    for piece in given.split(",") if isinstance(given, str) else map(str, given):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", piece)
        shown = repr(piece.strip())
        if match is None:
            raise ConfigError(option, given, f"{shown} is no block and no range of blocks", "such as 0-5,8,11")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(option, given, f"{shown} runs backwards", f"{last}-{first}")
        if last >= depth:
            raise ConfigError(option, given, f"{shown} is not in the model", f"its blocks are 0 to {depth - 1}")
        if blocks and first <= blocks[-1]:
            raise ConfigError(
                option, given, f"{shown} does not come after {blocks[-1]}", "name each block once, in order"
            )
        blocks += range(first, last + 1)
    if not blocks:
        raise ConfigError(option, given, "names no block", "such as 0-5,8,11")
    return tuple(blocks)
