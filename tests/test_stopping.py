"""The sequential test of ``--until-sure``: how often it is wrong, by simulation, and that it stops where it can."""

from __future__ import annotations

import pytest
import torch

from secateur.measures import stopping

BATCHES = 40


def stops_at(losses: torch.Tensor) -> int | None:
    """After how many batches a profile of these losses (batches, depths) would be settled."""
    looks = stopping.looks(len(losses))
    return next((n for n in looks if stopping.is_settled(losses[:n], len(looks))), None)


def test_looks_are_fixed_by_the_number_of_batches():
    assert stopping.looks(4) == ()
    assert stopping.looks(5) == (5,)
    assert stopping.looks(20) == (5, 10, 20)
    assert stopping.looks(60) == (5, 10, 20, 40, 60)


@pytest.mark.slow
@pytest.mark.parametrize("rivals", [1, 7], ids=["two near depths", "eight near depths"])
@pytest.mark.parametrize("gap", [1e-6, 0.1, 0.3])
def test_over_all_looks_a_wrong_depth_is_settled_on_once_in_twenty_at_most(rivals: int, gap: float):
    generator = torch.Generator().manual_seed(round(1000 * gap) + rivals)
    means = torch.full((16,), 50.0).double()  # far above
    means[[3, 11]] = 1 - gap  # the lowest of each half
    means[4 : 4 + rivals] = 1.0
    means[[12]] = 1.0
    wrong, tries = 0, 1000
    for _ in range(tries):
        shared = 3 * torch.randn(BATCHES, 1, generator=generator).double()
        losses = means + shared + torch.randn(BATCHES, 16, generator=generator).double()
        stop = stops_at(losses)
        if stop is not None:
            found = losses[:stop].mean(dim=0)
            wrong += (int(found[:8].argmin()), int(found[8:].argmin())) != (3, 3)
    assert wrong / tries <= 0.05


def test_what_batches_share_does_not_keep_it_from_stopping_and_ties_do():
    generator = torch.Generator().manual_seed(0)
    shared = 3 * torch.randn(BATCHES, 1, generator=generator).double()
    apart = torch.tensor([1.0, 0.9, 2.0, 1.9]) + shared + 0.02 * torch.randn(BATCHES, 4, generator=generator)
    assert stops_at(apart) == 5
    assert stops_at(shared.expand(-1, 4)) is None  # all depths are equal
    assert not stopping.is_settled(apart[:4]), "four batches settle nothing"
    assert stopping.is_settled(apart[:, :1]), "a single depth has no rival"
