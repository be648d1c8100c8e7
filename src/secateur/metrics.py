"""What a depth is worth, in numbers: pure functions on vectors and states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def contrastive_loss(anchors: Tensor, positives: Tensor, negatives: Tensor | None, scale: float) -> Tensor:
    """InfoNCE with in-batch and hard negatives, as L3Prune (arXiv 2410.14578) selects depths and trains by.

    Cross-entropy of finding anchor i's own positive among all positives and all hard negatives of the batch, by
    cosine × ``scale``.

    Args:
        anchors: (batch, dimension).
        positives: (batch, dimension), row i belonging to anchor i.
        negatives: (any, dimension), or None.
        scale: Inverse temperature; 20 for selection and 50 for training in the paper's code.

    Returns:
        The mean loss over the batch, in nats: a scalar; ``log(number of candidates)`` is what chance gives.
    """
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    cosines = functional.normalize(anchors.float(), dim=-1) @ functional.normalize(candidates.float(), dim=-1).T
    own = torch.arange(len(anchors), device=anchors.device)
    return functional.cross_entropy(cosines * scale, own)


def block_influence(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """How much a block turns its input: sum over tokens of 1 − cosine(input, output), ShortGPT (arXiv 2403.03853).

    Args:
        before: The block's input states (batch, length, width).
        after: Its output states, same shape.
        mask: (batch, length), 0 for padding, which is not counted.

    Returns:
        The sum, a scalar; divided by the number of tokens it is the Block Influence, from 0 (idle) to 2.
    """
    cosines = functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return ((1 - cosines) * mask).sum()


def effective_rank(vectors: Tensor) -> float:
    """How many directions vectors really use: exp of the entropy of their normalised singular values.

    Roy & Vetterli, *The effective rank* (EUSIPCO 2007), of the centred vectors (rows, dimension): from 1 to the
    smaller side of the matrix. NaN where all vectors are the same.
    """
    centred = vectors.float() - vectors.float().mean(dim=0)
    singular = torch.linalg.svdvals(centred)
    share = singular / singular.sum()
    entropy = -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum()
    return float(entropy.exp())
