"""Losses by depth → depths: the rules that read nothing but a profile's curve.

A rule takes losses (..., depths) and gives depths (..., choices), counted from 1, for each curve by itself: so it can
be asked about the measured curve and about every curve of a bootstrap over batches (:func:`draws_of`) alike. All depths
of a draw come from the same batches, so that what batches have in common (some are harder at every depth) does not blur
which depth is the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur.measures.intervals import DRAWS, mean_statistic, resample

Rule = Callable[[Tensor], Tensor]
"""Losses (..., depths) → chosen depths (..., choices), counted from 1."""

PROMINENCE = 0.05
"""Share of a smoothed curve's range that a valley must be deep, on both sides, to count as one."""
FLAT = 1e-9
"""Differences of shares below this are rounding."""


def draws_of(losses: Tensor, seed: int, draws: int = DRAWS) -> Tensor:
    """Mean losses of batches drawn again (:func:`.resample`): (batches, depths) → (draws, depths)."""
    return torch.from_numpy(resample(mean_statistic(losses.double().numpy()), len(losses), seed, draws))


def chances(draws: Tensor, rule: Rule) -> Tensor:
    """The share of draws in which each depth is among those that a rule chooses: (depths,), each from 0 to 1."""
    counts = torch.bincount(rule(draws).flatten(), minlength=draws.shape[-1] + 1)[1:]
    return counts.double() / len(draws)


def lowest_in_each_half(losses: Tensor) -> Tensor:
    """L3Prune's rule (arXiv 2410.14578, section 3): the depth of the lowest loss in each half.

    Args:
        losses: (..., depths); the first ``depths // 2`` are the first half. Of equal losses the shallowest wins.

    Returns:
        (..., 2), depths counted from 1, the smaller first; of a single depth (..., 1).
    """
    half = losses.shape[-1] // 2
    parts = [(losses[..., :half], 1), (losses[..., half:], half + 1)]
    return torch.stack([part.argmin(dim=-1) + first for part, first in parts if part.shape[-1]], dim=-1)


def valleys_in_each_half(losses: Tensor) -> Tensor:
    """The lowest true minimum of each half; of a half without any (:func:`valleys`), its lowest loss as L3Prune's.

    Args:
        losses: (..., depths), two at least.

    Returns:
        (..., 2), depths counted from 1, the smaller first.
    """
    chosen = lowest_in_each_half(losses)
    half = losses.shape[-1] // 2
    curves, depths = losses.reshape(-1, losses.shape[-1]).tolist(), chosen.reshape(-1, 2).tolist()
    for curve, pair in zip(curves, depths, strict=True):
        found = valleys(curve)
        for place, own in enumerate(([k for k in found if k <= half], [k for k in found if k > half])):
            if own:
                pair[place] = min(own, key=lambda k: curve[k - 1])
    return torch.tensor(depths).reshape(chosen.shape)


def valleys(losses: Sequence[float]) -> list[int]:
    """The depths at which a curve has a true minimum: where, smoothed, it is lower than around, and prominent.

    The prominence of a minimum is how far the smoothed curve rises on its lower side before it falls below the minimum;
    it must be :data:`PROMINENCE` of the whole smoothed curve's range. The depth is that of the lowest loss among the
    three that were averaged there. The first and the last depth are no minima: nobody knows what stands beyond. Of
    equal losses the shallowest counts.

    Args:
        losses: One for each depth.

    Returns:
        Depths counted from 1, ascending.
    """
    curve = smoothed(losses)
    enough = PROMINENCE * (max(curve) - min(curve))
    starts = [i for i in range(1, len(curve)) if curve[i] < curve[i - 1]]
    found = [(i, min(_rise(curve[i::-1]), _rise(curve[i:]))) for i in starts]
    bottoms = [i for i, prominence in found if prominence > 0 and prominence >= enough]
    inner = range(1, len(losses) - 1)
    return sorted({min((k for k in (i - 1, i, i + 1) if k in inner), key=losses.__getitem__) + 1 for i in bottoms})


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and its neighbours; of two losses at the ends."""
    windows = [losses[max(0, i - 1) : i + 2] for i in range(len(losses))]
    return [math.fsum(window) / len(window) for window in windows]  # exact: what is symmetric stays so


def _rise(walk: Sequence[float]) -> float:
    """How far a curve rises above its first value before it falls below it."""
    highest = walk[0]
    for value in walk:
        if value < walk[0]:
            break
        highest = max(highest, value)
    return highest - walk[0]


def knee(losses: Tensor) -> Tensor:
    """The depth after which more blocks bring little: Kneedle (Satopää et al. 2011) on the best loss so far.

    What is left of the fall is compared with a straight line from the first to the last depth; the knee is where the
    curve is farthest below it. Where it never is, the depth of the lowest loss.

    Args:
        losses: (..., depths).

    Returns:
        (..., 1), depths counted from 1. Of equal distances the shallowest wins.
    """
    lead = _lead(losses)
    found = torch.where(lead.max(dim=-1).values > FLAT, lead.argmax(dim=-1), losses.argmin(dim=-1))
    return found[..., None] + 1


def has_knee(losses: Tensor) -> bool:
    """Whether a curve (depths,) is anywhere below the straight line that :func:`knee` compares it with."""
    return bool(_lead(losses).max() > FLAT)


def _lead(losses: Tensor) -> Tensor:
    """The share of the whole fall that each depth has behind it, less its share of the blocks."""
    best = losses.double().cummin(dim=-1).values
    fall = best[..., :1] - best
    whole = fall[..., -1:]
    share = fall / torch.where(whole > 0, whole, torch.ones_like(whole))
    return share - torch.linspace(0, 1, losses.shape[-1], dtype=torch.float64)
