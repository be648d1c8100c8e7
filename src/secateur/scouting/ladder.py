"""Which depths a scout trains."""

from __future__ import annotations

from collections.abc import Sequence

RUNGS = 8
LOWEST = 1 / 5
"""Share of the layers that the lowest rung keeps."""


def ladder(depth: int, legal: Sequence[int]) -> tuple[int, ...]:
    """About eight depths from a fifth of the layers to all of them, each larger than the last by the same factor.

    Args:
        depth: How many layers the model has.
        legal: Depths that it can be cut to; each rung is moved to the nearest, the smaller of two.

    Returns:
        Distinct legal depths, ascending, the full depth as the last.
    """
    lowest = max(1.0, depth * LOWEST)
    rungs = [round(lowest * (depth / lowest) ** (step / (RUNGS - 1))) for step in range(RUNGS)]
    nearest = {min((abs(able - rung), able) for able in legal)[1] for rung in rungs}
    return (*sorted(nearest - {depth}), depth)
