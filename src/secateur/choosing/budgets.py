"""What a choice costs, and which depths the limits allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from secateur.choosing.selectors import prefix
from secateur.errors import ConfigError, DataError
from secateur.options import Budget
from secateur.results import LayerCost, Profile, Scout

_COSTS: dict[str, tuple[Callable[[LayerCost], float], str]] = {
    "max_params": (lambda row: row.parameters, "{:,.0f} parameters"),
    "max_bytes": (lambda row: row.bytes, "{:,.0f} bytes"),
    "max_latency_ms": (lambda row: 1000 * row.latency, "{:.3g} ms"),
}
"""Limit of a cost → what it limits, and how that is said."""


def cost_of(parts: Sequence[LayerCost], blocks: Sequence[int]) -> LayerCost:
    """What a model costs that keeps these layers, by index from 0: a row whose ``layer`` is their number."""
    kept = [parts[0], *(parts[index + 1] for index in blocks)]
    sums = {item.name: sum(getattr(row, item.name) for row in kept) for item in fields(LayerCost)}
    return LayerCost(**sums | {"layer": len(blocks)})


@dataclass(frozen=True, kw_only=True)
class CutCost:
    """What a cut costs (:class:`.LayerCost`); None where a table of an earlier version does not tell.

    ``latency`` is seconds for one text of some 20 tokens, ``speed`` texts per second in a batch, relative to the full
    depth.
    """

    parameters: int | None = None
    bytes: int | None = None
    flops_per_token: float | None = None
    latency: float | None = None
    speed: float | None = None


def cut_cost(table: Profile | Scout, blocks: Sequence[int]) -> CutCost:
    """The costs of the model cut to some of its layers, by index from 0."""
    if not table.layer_costs:
        return CutCost()
    own, full = (cost_of(table.layer_costs, kept) for kept in (blocks, prefix(table.depth)))
    speed = full.seconds / own.seconds
    return CutCost(
        parameters=own.parameters,
        bytes=own.bytes,
        flops_per_token=own.flops_per_token,
        latency=own.latency,
        speed=speed,
    )


def cost_limits(options: Budget) -> dict[str, float]:
    """The limits of costs that are given."""
    return {name: limit for name in _COSTS if (limit := getattr(options, name)) is not None}


def check_costs(table: Profile | Scout) -> None:
    """Refuse a table that does not tell costs.

    Raises:
        DataError: It does not.
    """
    if not table.layer_costs:
        hint = f"it was made by an earlier version; {table.kind} again"
        raise DataError(table.file, "has no costs of the layers", hint, field="layer_costs")


def fits(options: Budget, table: Profile | Scout, blocks: Sequence[int]) -> bool:
    """Whether a cut is within all limits of costs."""
    cost = cost_of(table.layer_costs, blocks)
    return all(_COSTS[key][0](cost) <= limit for key, limit in cost_limits(options).items())


def affordable(options: Budget, table: Profile | Scout, depths: Sequence[int]) -> list[int]:
    """Those of the depths (ascending) that are within all limits.

    Raises:
        ConfigError: None is; the message tells what the smallest costs.
        DataError: The table does not tell costs.
    """
    left = list(depths)
    for key, limit in cost_limits(options).items():
        measure, words = _COSTS[key]
        check_costs(table)
        found = {depth: measure(cost_of(table.layer_costs, prefix(depth))) for depth in depths}
        if found[depths[0]] > limit:
            hint = f"the smallest, depth {depths[0]}, has {words.format(found[depths[0]])}"
            raise ConfigError(key, limit, f"no depth has at most {words.format(limit)}", hint)
        left = [depth for depth in left if found[depth] <= limit]
    return left
