"""What a user can afford → a depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from secateur.choosing.selectors import Choice, chance_of, losses_of, prefix
from secateur.errors import ConfigError, DataError
from secateur.measures.curves import Rule, lowest_in_each_half
from secateur.options import ChooseOptions, check
from secateur.profiling.parts import cost_of
from secateur.results import PartRow, Profile


@dataclass(frozen=True)
class Budget:
    """Limits, None where there is none.

    Attributes:
        max_params: Parameters, the token table included.
        max_bytes: Of the weights, as the profile counts them (:class:`.PartRow`).
        max_latency_ms: Milliseconds for one text of some 20 tokens, as measured when the profile was made.
        max_loss_increase: The share by which the loss may be above the lowest of all depths: 0.05 allows 5 % more.
            Not above that of the full depth, which is often not the lowest before healing.

    Raises:
        ConfigError: A limit is no number, or not above zero.
    """

    max_params: float | None = None
    max_bytes: float | None = None
    max_latency_ms: float | None = None
    max_loss_increase: float | None = None

    def __post_init__(self) -> None:
        check(ChooseOptions, **vars(self))

    @property
    def is_given(self) -> bool:
        """Whether there is any limit."""
        return any(getattr(self, item.name) is not None for item in fields(self))


_COSTS: dict[str, tuple[Callable[[PartRow], float], str]] = {
    "max_params": (lambda row: row.parameters, "{:,.0f} parameters"),
    "max_bytes": (lambda row: row.bytes, "{:,.0f} bytes"),
    "max_latency_ms": (lambda row: 1000 * row.latency, "{:.3g} ms"),
}
"""Limit → what it limits, and how that is said."""


def within(budget: Budget, table: Profile) -> Choice:
    """Choose a depth that a budget allows.

    With a limit of the loss the shallowest such depth. Without one, what L3Prune's rule would call ``large`` if the
    model had no more blocks than can be afforded: the lowest loss of the deeper half of them; with a profile of texts
    alone, which has no losses, the deepest of them.

    Raises:
        ConfigError: No depth is within a limit; the message tells the smallest that there is.
        DataError: The profile does not tell what a limit is about.
    """
    deepest = _deepest(budget, table)
    if budget.max_loss_increase is not None:
        return _shallowest(budget.max_loss_increase, deepest, table)
    told = f"depth {deepest} is the deepest that fits"
    if not all(row.loss is not None for row in table.depths):
        return Choice(prefix(deepest), told)
    rule: Rule = lambda losses: lowest_in_each_half(losses[..., :deepest])[..., -1:]  # noqa: E731
    depth = int(rule(losses_of(table))[0])
    told += f"; loss {losses_of(table)[depth - 1]:.4f}, the lowest of depths {deepest // 2 + 1} to {deepest}"
    return Choice(prefix(depth), told, chance=chance_of(table, rule, 0, depth))


def _deepest(budget: Budget, table: Profile) -> int:
    """The deepest depth within all limits of what a model costs."""
    deepest = table.depth
    for key, (measure, words) in _COSTS.items():
        limit = getattr(budget, key)
        if limit is None:
            continue
        if not table.parts:
            hint = "it was made by an earlier version; profile again"
            raise DataError(table.file, "does not tell what the blocks cost", hint, field="parts")
        costs = [measure(cost_of(table.parts, prefix(depth))) for depth in range(1, table.depth + 1)]
        if costs[0] > limit:
            hint = f"the smallest, depth 1, has {words.format(costs[0])}"
            raise ConfigError(key, limit, f"no depth has at most {words.format(limit)}", hint)
        deepest = min(deepest, sum(cost <= limit for cost in costs))
    return deepest


def _shallowest(increase: float, deepest: int, table: Profile) -> Choice:
    """The shallowest depth whose loss is near enough to the lowest."""

    def rule(losses: Tensor) -> Tensor:
        """0 where there is none."""
        near = losses[..., :deepest] <= (1 + increase) * losses.min(dim=-1, keepdim=True).values
        return torch.where(near.any(dim=-1), near.long().argmax(dim=-1) + 1, 0)[..., None]

    losses = losses_of(table)
    depth = int(rule(losses)[0])
    if not depth:
        above = losses[:deepest] / losses.min() - 1
        best = int(above.argmin())
        problem = f"no depth that fits (up to {deepest}) has a loss within {increase:g} of the lowest"
        raise ConfigError("max_loss_increase", increase, problem, f"{float(above[best]):.4g} allows depth {best + 1}")
    above_lowest = float(losses[depth - 1] / losses.min() - 1)
    told = f"the shallowest; loss {losses[depth - 1]:.4f}, {100 * above_lowest:.1f} % above the lowest of all depths"
    return Choice(prefix(depth), told, chance=chance_of(table, rule, 0, depth))
