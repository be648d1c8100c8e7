"""How sure a curve of losses is: the bootstrap over batches.

A profile's loss at a depth is a mean over batches. Batches drawn again with replacement (Efron 1979) give other means,
and their spread is the spread that other data would have brought. All depths of a draw come from the same batches, so
that what batches have in common (some are harder at every depth) does not blur which depth is the lowest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.measures.curves import Rule, lowest_in_each_half

DRAWS = 2000
CONFIDENCE = 0.95
FEWEST = 5
"""Batches below which a bootstrap means nothing."""


def draws_of(losses: Tensor, seed: int, draws: int = DRAWS) -> Tensor:
    """Mean losses of batches drawn again with replacement.

    Args:
        losses: (batches, depths).
        seed: Of the drawing.
        draws: How often.

    Returns:
        (draws, depths), spread around the true mean. The bootstrap's variance is that of the sample, (n − 1) / n of
        what it estimates, which few batches feel: it is widened by as much.
    """
    batches = len(losses)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(batches, (draws, batches), generator=generator)
    counts = torch.zeros(draws, batches, dtype=torch.float64).scatter_add_(
        1, picked, torch.ones(draws, batches, dtype=torch.float64)
    )
    exact = losses.double()
    mean = exact.mean(dim=0)
    widening = (batches / max(1, batches - 1)) ** 0.5
    means: Tensor = mean + (counts @ exact / batches - mean) * widening
    return means


def intervals(draws: Tensor, confidence: float = CONFIDENCE) -> tuple[Tensor, Tensor]:
    """Percentile interval of each depth's loss: its lower and upper ends, each (depths,)."""
    tail = (1 - confidence) / 2
    return draws.quantile(tail, dim=0), draws.quantile(1 - tail, dim=0)


def chances(draws: Tensor, rule: Rule = lowest_in_each_half) -> Tensor:
    """The share of draws in which each depth is among those that a rule chooses: (depths,), each from 0 to 1."""
    chosen = rule(draws)
    counts = torch.bincount(chosen.flatten(), minlength=draws.shape[-1] + 1)[1:]
    return counts.double() / len(draws)


def is_settled(losses: Tensor, seed: int, rule: Rule = lowest_in_each_half, confidence: float = CONFIDENCE) -> bool:
    """Whether a rule would choose what it chooses now with this much confidence, each of its depths by itself.

    Args:
        losses: (batches, depths); fewer than :data:`FEWEST` batches settle nothing.
        seed: Of the drawing.
        rule: From losses to depths.
        confidence: The share of draws that must agree.
    """
    if len(losses) < FEWEST:
        return False
    now = rule(losses.double().mean(dim=0, keepdim=True))[0]
    share = (rule(draws_of(losses, seed)) == now).double().mean(dim=0)
    return bool((share >= confidence).all())
