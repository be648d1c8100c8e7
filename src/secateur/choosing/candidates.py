"""What every selector would choose from one profile, side by side, with what it would cost and how sure it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.choosing.budgets import Budget, within
from secateur.choosing.choose import SHORT, choice_of, choose, read_profile
from secateur.choosing.selectors import SELECTORS, Choice, prefix
from secateur.errors import SecateurError
from secateur.profiling.parts import cost_of
from secateur.results import Profile

FULL, BUDGET = "full", "budget"
_DECIDE = [name for name, selector in SELECTORS.items() if not selector.counts]


@dataclass(frozen=True)
class Candidate:
    """One choice.

    Attributes:
        name: What ``--to`` takes to get it; ``full`` is the model as it is, ``budget`` what the limits allow.
        blocks: Indices of the blocks that stay, from 0.
        reason: Why, and ``warning`` what must be known; empty where there is nothing.
        chance: Share of bootstrap draws that choose the same; None where the rule reads no losses.
        loss: At that depth, zero-shot, with its 95 % interval from ``loss_low`` to ``loss_high``; None where other
            blocks than the first stay, since a profile measures depths.
        parameters: Counted, as are ``bytes`` and ``flops_per_token``.
        latency: Seconds for one text of some 20 tokens, from the measured times of the blocks.
        speed: Texts per second in a batch, relative to the full depth, likewise. Costs are None in a profile of an
            earlier version.
    """

    name: str
    blocks: tuple[int, ...]
    reason: str
    warning: str = ""
    chance: float | None = None
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    flops_per_token: float | None = None
    latency: float | None = None
    speed: float | None = None


@dataclass(frozen=True)
class Candidates:
    """All choices from the profile of ``model``, which has ``depth`` blocks; ``refused`` is name → why not."""

    model: str
    depth: int
    rows: tuple[Candidate, ...]
    refused: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The depths of ``small``, ``large`` and ``budget``, where they can be told; ``choices`` and ``refused``."""
        names = {BUDGET: BUDGET, **SHORT}
        told = {name: self.depths[key] for name, key in names.items() if key in self.depths}
        return {**told, "choices": [asdict(row) for row in self.rows], "refused": dict(self.refused)}

    @property
    def depths(self) -> dict[str, int]:
        """Name → depth, of the choices of a depth."""
        return {row.name: len(row.blocks) for row in self.rows if row.name in (BUDGET, *_DECIDE)}


def candidates(
    profile: Profile | str | Path,
    *,
    max_params: float | None = None,
    max_bytes: float | None = None,
    max_latency_ms: float | None = None,
    max_loss_increase: float | None = None,
) -> Candidates:
    """Ask every selector; those that must be told how many blocks to keep, for as many as ``small`` and ``large``.

    Args:
        profile: A profile, its file, or the folder that holds it.
        max_params: With any of the limits, the depth that they allow stands there too, and sets of blocks of its size.
        max_bytes: See :class:`.Budget` for all of them.
        max_latency_ms: Likewise.
        max_loss_increase: Likewise.

    Raises:
        DataError: The file is no profile.
        ConfigError: No depth is within the limits, or a limit is no number.
    """
    table = read_profile(profile)
    budget = Budget(max_params, max_bytes, max_latency_ms, max_loss_increase)
    rows = [_candidate(table, FULL, Choice(prefix(table.depth), "nothing is cut"))]
    if budget.is_given:
        rows.append(_candidate(table, BUDGET, within(budget, table)))
    refused = {}
    for name in _names(table, [len(row.blocks) for row in rows[1:]]):
        try:
            rows.append(_candidate(table, name, choice_of(name, table.depth, table)))
        except SecateurError as error:
            refused[name] = str(error)
    return Candidates(table.model, table.depth, tuple(rows), refused)


def _names(table: Profile, sizes: Sequence[int]) -> Iterator[str]:
    """What there is to ask. Without losses nothing tells a size: half of the blocks."""
    told = [*sizes, *(choose(table).values() if table.can_choose else [max(1, table.depth // 2)])]
    for name, selector in SELECTORS.items():
        if not selector.counts:
            yield name
        elif name != "first":  # the depths that stand there already
            yield from (f"{name}:{size}" for size in sorted(set(told)) if size < table.depth)


def _candidate(table: Profile, name: str, choice: Choice) -> Candidate:
    row = table.depths[len(choice.blocks) - 1] if is_prefix(choice.blocks) else None
    part = cost_of(table.parts, choice.blocks) if table.parts else None
    return Candidate(
        name=name,
        blocks=choice.blocks,
        reason=choice.reason,
        warning=choice.warning,
        chance=choice.chance,
        loss=row.loss if row else None,
        loss_low=row.loss_low if row else None,
        loss_high=row.loss_high if row else None,
        parameters=part.parameters if part else None,
        bytes=part.bytes if part else None,
        flops_per_token=part.flops_per_token if part else None,
        latency=part.latency if part else None,
        speed=cost_of(table.parts, prefix(table.depth)).seconds / part.seconds if part else None,
    )


def is_prefix(blocks: Sequence[int]) -> bool:
    """Whether they are the first blocks."""
    return tuple(blocks) == prefix(len(blocks))


def ranges(blocks: Sequence[int]) -> str:
    """Blocks as ``--keep`` takes them: ``0-5,8,11``."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1] + 1]
    runs = [(blocks[i], blocks[j - 1]) for i, j in zip(starts, [*starts[1:], len(blocks)], strict=True)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
