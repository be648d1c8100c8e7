"""Losses and metrics of a depth: pure functions on vectors and states.

Leading dimensions, written ``...``, are free: one call does one depth, or all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

TIE = 1e-6
"""Cosines closer than this are equal: float32 rounds the same text in two columns of a product differently."""


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of each row of (..., n, dimension) with each of (..., m, dimension), in float32: (..., n, m)."""
    return functional.normalize(one.float(), dim=-1) @ functional.normalize(other.float(), dim=-1).mT


def contrastive_loss(found: Tensor, scale: float) -> Tensor:
    """InfoNCE with in-batch and hard negatives, as L3Prune (arXiv 2410.14578) selects depths and trains by.

    Args:
        found: Cosines (..., batch, candidates), candidate i being anchor i's own; -inf for one that does not count
            (:func:`false_negative_mask`).
        scale: Inverse temperature; 20 for selection and 50 for training in the paper's code.

    Returns:
        The mean loss over the batch, in nats: (...); ``log(candidates)`` is what random vectors give.
    """
    own = found.diagonal(dim1=-2, dim2=-1)
    return ((found * scale).logsumexp(dim=-1) - own * scale).mean(dim=-1)


def false_negative_mask(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    rows: slice = slice(None),
    once: bool = False,
) -> Tensor:
    """Which candidates must not count as negatives of an anchor.

    The candidates are all positives, then all negatives. One is masked where its text is the anchor's own, or that of
    any positive that the batch has for the same anchor text, but for the positive of the anchor's own row.

    Args:
        anchors: A number for each text, (batch,): equal texts have equal numbers, in all three arguments.
        positives: (batch,), row i belonging to anchor i.
        negatives: (any,), or None.
        rows: The anchors that are asked for.
        once: Also mask all copies of a text but the first. Ranks need it: equal passages are one document.

    Returns:
        (anchors asked for, candidates).
    """
    batch = len(anchors)
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    texts, numbers = torch.unique(torch.cat([anchors, candidates]), return_inverse=True)
    every_anchor, documents = numbers[:batch], numbers[batch:]
    own = torch.arange(batch, device=anchors.device)[rows]
    asked = every_anchor[rows]
    places = torch.arange(len(own), device=anchors.device)

    relevant = torch.zeros(len(own), len(texts), dtype=torch.bool, device=anchors.device)
    place, row = (asked[:, None] == every_anchor).nonzero(as_tuple=True)
    relevant[place, documents[row]] = True
    relevant[places, asked] = True
    mask = relevant[:, documents]
    if once:
        columns = torch.arange(len(documents), device=anchors.device)
        first = torch.full_like(texts, len(columns)).scatter_reduce(0, documents, columns, "amin")
        mask |= first[documents] != columns
    mask[places, own] = False
    return mask


def text_numbers(*columns: Sequence[str]) -> list[Tensor]:
    """A number for each text of each column, equal for equal texts."""
    known: dict[str, int] = {}
    return [
        torch.tensor([known.setdefault(text, len(known)) for text in column], dtype=torch.long) for column in columns
    ]


class Retrieval(NamedTuple):
    """How anchors find their own positives; each (...)."""

    accuracy: Tensor
    ndcg_at_10: Tensor


def retrieval(found: Tensor, own: Tensor | None = None) -> Retrieval:
    """Accuracy at 1 and nDCG@10 of finding each anchor's own positive among all candidates of its batch.

    With one relevant candidate at rank r, nDCG@10 is 1 / log2(r + 1) for r ≤ 10, else 0 (Järvelin & Kekäläinen 2002).
    Candidates with the same cosine are in random order: the expected value is returned.

    Args:
        found: Cosines (..., batch, candidates); -inf for a candidate that is none of this anchor
            (:func:`false_negative_mask`).
        own: Which candidate is each anchor's own, (batch,); None: candidate i is anchor i's.
    """
    anchors = torch.arange(found.shape[-2], device=found.device)
    wanted = found[..., anchors, anchors if own is None else own].unsqueeze(-1)
    better = (found > wanted + TIE).sum(dim=-1)
    tied = ((found - wanted).abs() <= TIE).sum(dim=-1)  # with itself
    gains = torch.zeros(found.shape[-1] + 1, device=found.device)
    top = min(10, found.shape[-1])
    gains[1 : top + 1] = 1 / torch.arange(2, top + 2, device=found.device).log2()
    total = gains.cumsum(0)
    ndcg = (total[better + tied] - total[better]) / tied
    return Retrieval(((better == 0) / tied).mean(dim=-1), ndcg.mean(dim=-1))


def alignment(anchors: Tensor, positives: Tensor) -> Tensor:
    """Mean squared distance of texts to their positives on the unit sphere: Wang & Isola (arXiv 2005.10242), α = 2.

    From 0 (the same direction) to 4: (...), of two times (..., pairs, dimension).
    """
    return (2 - 2 * functional.cosine_similarity(anchors.float(), positives.float(), dim=-1)).mean(dim=-1)


def uniformity(vectors: Tensor) -> float:
    """How evenly vectors (rows, dimension) spread over the unit sphere: log of the mean exp(−2‖x − y‖²) over pairs.

    Wang & Isola (arXiv 2005.10242), t = 2; 0 where all are the same, more negative is more even.
    """
    squared = 2 - 2 * cosines(vectors, vectors)
    rows = len(vectors)
    # Each row's distance to itself is 0 and adds 1 to the sum, which runs over pairs of different rows only.
    return float(((-2 * squared).exp().double().sum() - rows).clamp_min(1e-300).log() - math.log(rows * (rows - 1)))


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine over pairs of different rows of (rows, dimension): anisotropy, Ethayarajh (arXiv 1909.00512)."""
    total = functional.normalize(vectors.double(), dim=-1).sum(dim=0)
    rows = len(vectors)
    return float((total @ total - rows) / (rows * (rows - 1)))


def effective_rank(vectors: Tensor) -> float:
    """How many directions vectors really use: exp of the entropy of their normalised singular values.

    Roy & Vetterli, *The effective rank* (EUSIPCO 2007), of the centred vectors (rows, dimension): from 1 to the
    smaller side of the matrix. NaN where all vectors are the same.
    """
    centred = _centred(vectors)
    if not bool(centred.any()):
        return math.nan
    # The singular values by way of the smaller product, in float64: several times faster than decomposing itself.
    square = centred.mT @ centred if centred.shape[0] >= centred.shape[1] else centred @ centred.mT
    singular = torch.linalg.eigvalsh(square).clamp_min(0).sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def _centred(vectors: Tensor) -> Tensor:
    """In float64, without the mean; what is only rounding of equal vectors is zero."""
    exact = vectors.double()
    centred = exact - exact.mean(dim=0)
    return centred if centred.abs().max() > 1e-6 * exact.abs().max() else torch.zeros_like(centred)


def linear_cka(vectors: Tensor, *, rows: int = 128) -> Tensor:
    """Linear centred kernel alignment between all pairs of depths: Kornblith et al. (arXiv 1905.00414).

    ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of the centred vectors (depths, texts, dimension), computed as the cosine of the two Gram
    matrices, some ``rows`` of them at a time: (depths, depths), from 0 to 1; NaN where all vectors are the same.
    """
    centred = torch.stack([_centred(v).float() for v in vectors])
    # Gram matrices are compared by direction only; without this their squares may leave float32.
    centred /= centred.abs().amax(dim=(1, 2), keepdim=True)
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in range(0, centred.shape[1], rows):
        gram = (centred[:, start : start + rows] @ centred.mT).flatten(1)
        products += (gram @ gram.T).double().cpu()
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms[None, :])


def block_influence(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """How much a layer turns its input: sum over tokens of 1 − cosine(input, output), ShortGPT (arXiv 2403.03853).

    Divided by the number of tokens it is the Block Influence, from 0 (idle) to 2. Of states (batch, length, width);
    where ``mask`` (batch, length) is 0, there is padding, which is not counted, whatever its states are.
    """
    found = functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return torch.where(mask != 0, (1 - found) * mask, 0).sum()


def angular_distances(states: Tensor) -> Tensor:
    """Angle between a token's states at all pairs of depths, arccos(cosine) / π.

    *The Unreasonable Ineffectiveness of the Deeper Layers* (arXiv 2403.17887), which takes each text's last token. The
    mean over texts of (texts, depths, width): (depths, depths), from 0 (the same direction) to 1 (opposite).
    """
    found = cosines(states, states).clamp(-1, 1)
    # arccos turns float32's rounding of 1 into an angle of 1e-4; a state's angle with itself is 0.
    found.diagonal(dim1=-2, dim2=-1).fill_(1)
    return (found.arccos() / math.pi).mean(dim=0)


def nearest_rows(vectors: NDArray[np.floating[Any]], k: int, *, at_once: int = 1024) -> NDArray[np.int64]:
    """The k nearest other rows of each row (rows, dimension) by cosine, nearest first, some at a time: (rows, k)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = []
    for start in range(0, len(unit), at_once):
        cosine = unit[start : start + at_once] @ unit.T
        cosine[np.arange(len(cosine)), np.arange(start, start + len(cosine))] = -np.inf
        found.append(np.argsort(-cosine, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)


def similarity_to(others: NDArray[np.int64], vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """How similar each row of vectors (rows, dimension) is to some others (rows, k), above chance: (rows, k).

    It is (s - m) / (1 - m) for a cosine s, whose mean over all other rows is m: 1 is the same direction, 0 a row drawn
    at random.
    """
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    mean = (unit @ unit.sum(axis=0) - (unit**2).sum(axis=1)) / (len(unit) - 1)
    cosine = np.stack([unit[own] @ row for own, row in zip(others, unit, strict=True)])
    return (cosine - mean[:, None]) / np.maximum(1 - mean[:, None], 1e-12)


def paired_cosines(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each row with the row beside it, (rows,), in double precision.

    Two rows of zeros are the same: 1. One row of zeros is like nothing: 0. A row that is not finite gives -1.
    """
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both = ~a.any(axis=1) & ~b.any(axis=1)
    result: NDArray[np.float64] = np.where(both, 1.0, (a * b).sum(axis=1) / np.where(lengths == 0, 1.0, lengths))
    return np.nan_to_num(result, nan=-1.0)
