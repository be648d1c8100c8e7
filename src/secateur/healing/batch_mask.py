"""The false-negative mask of a training batch, of all processes together: texts are equal if their tokens are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.util import all_gather, get_rank
from torch import Tensor

from secateur.healing import processes
from secateur.measures.metrics import false_negative_mask


def row_keys(features: dict[str, Any]) -> Tensor:
    """A number for each row of tokens, (rows,), the same for the same tokens whatever their padding."""
    rows = zip(features["input_ids"].cpu(), features["attention_mask"].bool().cpu(), strict=True)
    digests = [hashlib.blake2b(ids[real].numpy().tobytes(), digest_size=8).digest() for ids, real in rows]
    keys = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(keys, device=features["input_ids"].device)


def batch_mask(keys: Sequence[Tensor]) -> Tensor:
    """:func:`.false_negative_mask` of this process's anchors: (batch, candidates of all processes).

    Args:
        keys: :func:`row_keys` of each column (anchors, positives, any number of negatives), each (batch,).
    """
    anchors, positives, *negatives = (all_gather(column) if processes.count() > 1 else column for column in keys)
    start = get_rank() * len(keys[0])
    rows = slice(start, start + len(keys[0]))
    return false_negative_mask(anchors, positives, torch.cat(negatives) if negatives else None, rows=rows)
