"""Each metric against its definition, written out with loops and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from secateur.measures import metrics
from secateur.measures.metrics import contrastive_loss, cosines, false_negative_mask


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(one, other) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def test_contrastive_loss_is_the_cross_entropy_of_finding_the_own_positive():
    anchors, positives, negatives = (vectors(n, 6, seed=n).numpy().astype(float) for n in (5, 5, 3))
    anchors = anchors[:5]
    expected = []
    for i, anchor in enumerate(anchors):
        scores = [20 * cosine(anchor, other) for other in (*positives, *negatives)]
        expected.append(math.log(sum(map(math.exp, scores))) - scores[i])
    found = contrastive_loss(cosines(torch.tensor(anchors), torch.tensor(np.concatenate([positives, negatives]))), 20)
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-5)


def test_all_depths_at_once_are_each_depth_alone():
    found = cosines(vectors(4, 5, 6), vectors(4, 5, 6, seed=1))
    assert torch.allclose(contrastive_loss(found, 20), torch.stack([contrastive_loss(c, 20) for c in found]))
    assert torch.allclose(metrics.retrieval(found)[0], torch.stack([metrics.retrieval(c)[0] for c in found]))


def test_retrieval_ranks_the_own_positive():
    found = torch.full((3, 14), -1.0)
    found[0, :3] = torch.tensor([0.9, 0.5, 0.1])  # rank 1
    found[1, :3] = torch.tensor([0.9, 0.5, 0.1])  # rank 2
    found[2] = torch.linspace(1, 0.5, 14)
    found[2, 2] = 0  # rank 14
    accuracy, ndcg = metrics.retrieval(found)
    assert float(accuracy) == pytest.approx(1 / 3)
    assert float(ndcg) == pytest.approx((1 + 1 / math.log2(3) + 0) / 3)


@pytest.mark.parametrize("once", [False, True])
def test_the_false_negative_mask_is_what_its_definition_says(once: bool):
    rng = np.random.default_rng(0)
    anchors, positives, negatives = (rng.integers(0, 9, count) for count in (8, 8, 5))
    candidates = [*positives, *negatives]
    expected = np.zeros((8, 13), dtype=bool)
    for i, j in np.ndindex(8, 13):
        relevant = {anchors[i], *(positives[k] for k in range(8) if anchors[k] == anchors[i])}
        repeated = once and candidates[j] in candidates[:j]
        expected[i, j] = i != j and (candidates[j] in relevant or repeated)
    assert 20 < expected.sum() < 90
    columns = [torch.from_numpy(column) for column in (anchors, positives, negatives)]
    assert np.array_equal(false_negative_mask(*columns, once=once).numpy(), expected)
    assert np.array_equal(false_negative_mask(*columns, rows=slice(3, 6), once=once).numpy(), expected[3:6])


def test_a_model_that_gives_every_text_the_same_vector_retrieves_by_chance():
    same = torch.ones(16, 8)
    accuracy, ndcg = metrics.retrieval(metrics.cosines(same, same))
    assert float(accuracy) == pytest.approx(1 / 16)
    assert float(ndcg) == pytest.approx(sum(1 / math.log2(r + 1) for r in range(1, 11)) / 16, abs=1e-6)


def test_alignment_uniformity_and_mean_cosine():
    one, other = vectors(9, 5), vectors(9, 5, seed=1)
    unit = torch.nn.functional.normalize(one, dim=-1)
    pairs = torch.pdist(unit)
    apart = (unit - torch.nn.functional.normalize(other, dim=-1)).norm(dim=-1)
    assert float(metrics.alignment(one, other)) == pytest.approx(float(apart.square().mean()), abs=1e-5)
    assert metrics.uniformity(one) == pytest.approx(float(pairs.square().mul(-2).exp().mean().log()), abs=1e-5)
    off = [cosine(one[i].numpy(), one[j].numpy()) for i in range(9) for j in range(9) if i != j]
    assert metrics.mean_cosine(one) == pytest.approx(np.mean(off), abs=1e-6)
    assert metrics.uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_effective_rank_is_the_entropy_of_singular_values(shape):
    found = vectors(*shape)
    values = np.linalg.svd((found - found.mean(0)).numpy(), compute_uv=False)
    share = values / values.sum()
    share = share[share > 1e-7]
    assert metrics.effective_rank(found) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_effective_rank_of_one_direction_and_of_one_vector():
    assert metrics.effective_rank(torch.arange(9.0)[:, None] * torch.ones(1, 4)) == pytest.approx(1, abs=1e-5)
    assert math.isnan(metrics.effective_rank(torch.full((5, 4), 0.3)))


def test_linear_cka_against_its_definition():
    depths = vectors(3, 20, 6)
    depths[2] = depths[0] @ torch.linalg.qr(vectors(6, 6, seed=3))[0] * 1000 + 7  # turned, scaled and moved
    found = metrics.linear_cka(depths, rows=7)
    centred = [(d - d.mean(0)).double() for d in depths]
    for i, x in enumerate(centred):
        for j, y in enumerate(centred):
            expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
            assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-5)
    assert float(found[0, 2]) == pytest.approx(1, abs=1e-5)


def test_block_influence_leaves_padding_out():
    before, after = vectors(2, 3, 5), vectors(2, 3, 5, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = sum(
        1 - cosine(before[i, j].numpy(), after[i, j].numpy()) for i in range(2) for j in range(3) if mask[i, j]
    )
    assert float(metrics.block_influence(before, after, mask)) == pytest.approx(expected, abs=1e-5)
    before[0, 2] = math.nan  # some models give padding no numbers
    assert float(metrics.block_influence(before, after, mask)) == pytest.approx(expected, abs=1e-5)


def test_angular_distances():
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])
    expected = torch.tensor([[0, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 0]])
    assert torch.allclose(metrics.angular_distances(states), expected, atol=1e-6)
