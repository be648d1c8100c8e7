"""When a profile has read enough: a group-sequential test of L3Prune's choice.

A test that is asked again after every batch finds something sooner or later, whatever there is to find. Here the looks
are fixed before the first batch (:func:`looks`), and each spends an equal share of the whole error (Bonferroni's rule,
which holds however the looks depend on each other).

At a look the choice is settled when the chosen depth of each half is significantly below every other depth of its half,
by two-sided paired t-tests over batches. Comparing the lowest with each other one at the level of a single test needs
no further correction: the error is largest where just two depths are near each other (Gutmann and Maymin 1987, "Is the
selected population the best?"). Both halves must pass, so that they do not add up either.
"""

from __future__ import annotations

from scipy.stats import t
from torch import Tensor

from secateur.measures.intervals import CONFIDENCE, FEWEST


def looks(batches: int) -> tuple[int, ...]:
    """After how many of the batches to look: 5, 10, 20, …, and after all of them; never with fewer than 5."""
    if batches < FEWEST:
        return ()
    found = [FEWEST]
    while found[-1] < batches:
        found.append(min(batches, 2 * found[-1]))
    return tuple(found)


def is_settled(losses: Tensor, looks: int = 1, confidence: float = CONFIDENCE) -> bool:
    """Whether the lowest depth of each half is significantly the lowest.

    Args:
        losses: (batches, depths); fewer than five batches settle nothing.
        looks: How many looks there are in all, this one included.
        confidence: 1 less the chance, over all looks, to settle on a depth that is not the lowest.
    """
    batches, depths = losses.shape
    if batches < FEWEST:
        return False
    needed = float(t.ppf(1 - (1 - confidence) / (2 * looks), batches - 1))
    halves = losses[:, : depths // 2].double(), losses[:, depths // 2 :].double()
    return all(_lowest_is_apart(half, needed) for half in halves)


def _lowest_is_apart(losses: Tensor, needed: float) -> bool:
    """Whether each other depth is above the lowest by more than ``needed`` standard errors of their difference."""
    if losses.shape[1] < 2:
        return True
    lowest = int(losses.mean(dim=0).argmin())
    above = (losses - losses[:, lowest : lowest + 1])[:, [k for k in range(losses.shape[1]) if k != lowest]]
    error = above.std(dim=0) / len(above) ** 0.5
    return bool((above.mean(dim=0) > needed * error).all())
