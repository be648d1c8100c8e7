"""Texts that a batch holds twice once they are cut to so many tokens: none may be a negative of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.util import all_gather, get_rank
from torch import Tensor

from secateur.healing import processes


def row_keys(features: dict[str, Any]) -> Tensor:
    """A number for each row of tokens, (rows,), the same for the same tokens whatever their padding."""
    rows = zip(features["input_ids"].cpu(), features["attention_mask"].bool().cpu(), strict=True)
    digests = [hashlib.blake2b(ids[real].numpy().tobytes(), digest_size=8).digest() for ids, real in rows]
    keys = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(keys, device=features["input_ids"].device)


def false_negatives(keys: Sequence[Tensor]) -> Tensor:
    """Candidates that only seem to be negatives: (batch, candidates of all processes).

    They are the same text as the anchor or as its positive, or positives of the same anchor.

    Args:
        keys: :func:`row_keys` of each column, (batch,).
    """
    anchors, positives = keys[0][:, None], keys[1][:, None]
    every = [all_gather(column) if processes.count() > 1 else column for column in keys]
    candidates = torch.cat(every[1:])[None]
    never = (candidates == positives) | (candidates == anchors)
    batch = every[0].shape[0]
    never[:, :batch] |= every[0][None] == anchors
    own = torch.arange(len(anchors), device=never.device)
    never[own, own + get_rank() * len(anchors)] = False
    return never
