"""The false-negative mask: candidates that a batch takes for negatives of an anchor though they are none.

The same mask serves the loss and the ranks of a profile, the training loss, and nDCG@10 on held-out pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    any positive that the batch has for the same anchor text. The positive of the anchor's own row never is.

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
